"""What a run is heading for, as small pictures, after every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stg_trt.guidance.solver import SolverTable
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.image import ImageCondition
from stg_trt.models.preview import Frames, PreviewMap
from stg_trt.models.workload import Workload


class Previews:
    """The pictures of a run that starts from packed latents.

    Latents are clean * video + noise * randomness, with shares (clean, noise) that the schedule has for the
    start of each step and the end: `shares`. The latents around a step say what video it moves towards.
    Without `shares` the latents are shown as they are. `decoder` is diffusers' pipeline with the VAE.
    """

    def __init__(
        self,
        colours: PreviewMap,
        family: ModelFamily,
        workload: Workload,
        decoder: Any,
        shares: Sequence[tuple[float, float]] | None,
        image: ImageCondition | None,
        start: Tensor,
    ) -> None:
        self._colours = colours
        self._family = family
        self._workload = workload
        self._decoder = decoder
        self._shares = shares
        self._image = image
        self._last = start.cpu().float()

    def after(self, step: int, latents: Tensor) -> Frames:
        """(videos, frames, rows, columns, 3), from the packed latents after a step."""
        now = latents.cpu().float()
        estimate = now
        if self._shares is not None:
            (clean, noise), (next_clean, next_noise) = self._shares[step : step + 2]
            estimate = (noise * now - next_noise * self._last) / (noise * next_clean - next_noise * clean)
        self._last = now
        finished = self._family.finished(estimate, self._workload, self._image)
        device = next(self._decoder.vae.parameters()).device
        return self._colours.frames(
            self._family.vae_latents(self._decoder, finished.to(device), self._workload)
        )


def shares_of(solver: SolverTable, scheduler: Any) -> Sequence[tuple[float, float]] | None:
    """The shares of video and noise before each step and after the last; None if unknown."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if solver.sigmas and solver.noise_scale > 1:
        shares = [(1.0, sigma) for sigma in solver.sigmas]
    elif solver.sigmas and max(solver.sigmas) <= 1:
        shares = [(1 - sigma, sigma) for sigma in solver.sigmas]
    elif alphas is not None:
        chosen = [float(alphas[int(timestep)]) for timestep in solver.timesteps]
        shares = [(alpha**0.5, (1 - alpha) ** 0.5) for alpha in chosen]
    else:
        return None
    return [*shares, (1.0, 0.0)]
