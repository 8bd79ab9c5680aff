"""Steps that a call lists itself, as diffusers' `retrieve_timesteps` hands them to a scheduler."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest

Numbers = Iterable[float] | Tensor
"""A list, a tuple, an array or a tensor of one number per step."""

# Of the training steps; float32 rounds to 1e-4.
_SAME_TIMESTEP = 1e-2


@dataclass(frozen=True)
class CustomSteps:
    """One value per step, falling: `timesteps` for the network, such as 1000 to 0, or `sigmas` from 1 to 0.

    What the scheduler makes of them is its own affair: it may shift sigmas, which moves the timesteps too.
    """

    name: Literal["timesteps", "sigmas"]
    values: tuple[float, ...]

    @classmethod
    def read(cls, timesteps: Numbers | None, sigmas: Numbers | None) -> CustomSteps | None:
        """Those of a call, None if it lists none; raises InvalidRequest for both and for other values."""
        if timesteps is not None and sigmas is not None:
            raise InvalidRequest("timesteps: expected timesteps or sigmas, got both: leave one out")
        if timesteps is not None:
            return cls("timesteps", _falling("timesteps", timesteps))
        return None if sigmas is None else cls("sigmas", _falling("sigmas", sigmas))

    def set_on(self, scheduler: Any, **shift: float) -> None:
        """Calls its set_timesteps; raises InvalidRequest for a scheduler that makes its own steps."""
        if self.name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise InvalidRequest(
                f"{self.name}: expected a scheduler that takes {self.name}, got {type(scheduler).__name__}, "
                "which makes its own: give num_inference_steps or another scheduler"
            )
        scheduler.set_timesteps(**{self.name: np.array(self.values)}, **shift)

    def check_kept(self, scheduler: Any) -> None:
        """Raises InvalidRequest if the scheduler of a flow model changed the timesteps or steps elsewhere."""
        if self.name != "timesteps":
            return
        given = torch.tensor(self.values, dtype=torch.float64)
        sigmas = getattr(scheduler, "sigmas", torch.empty(0))[: len(given)]
        stepped = (scheduler.timesteps, sigmas * scheduler.config.num_train_timesteps)
        if not all(
            len(other) == len(given) and torch.allclose(other.double(), given, rtol=0, atol=_SAME_TIMESTEP)
            for other in stepped
        ):
            raise InvalidRequest(
                "timesteps: expected a scheduler that steps between them as they are, got "
                f"{type(scheduler).__name__}, which changes them: give sigmas, or turn its shift off"
            )


def _falling(name: str, values: Numbers) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(
            f"{name}: expected a list with one number per step, got {values!r}: correct it"
        ) from error
    if not numbers or not all(map(math.isfinite, numbers)) or any(a <= b for a, b in pairwise(numbers)):
        raise InvalidRequest(
            f"{name}: expected one number per step, the noisiest first, got {[*numbers]}: sort them"
        )
    return numbers
