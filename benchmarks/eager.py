"""The uncut diffusers transformer, with the perturbation as public STG pipelines write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stg_trt.families.base import Workload
from stg_trt.guidance import Guidance, combined
from stg_trt.perturbation import Perturbation
from stg_trt.step_plan import GROUPS

from .setting import Inputs, Setting

Forward = Callable[..., Any]


class ValuesOnlyInSkipRow:
    """stg-a as an attention processor: the stock one for the other rows, to_out(V) for the last."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is None and attention_mask is None and image_rotary_emb is not None
        cos, sin = image_rotary_emb
        attended = self.stock(attn, hidden_states[:-1], image_rotary_emb=(cos[:-1], sin[:-1]))
        values = attn.to_out[0](attn.to_v(hidden_states[-1:]))
        return torch.cat([attended, values])


@contextmanager
def perturbed_skip_row(model: Any, perturbation: Perturbation) -> Iterator[None]:
    """The last row of the batch perturbed; the model is restored afterwards."""
    blocks = [model.transformer_blocks[block] for block in perturbation.blocks]
    processors = [block.attn1.processor for block in blocks]
    try:
        for block, processor in zip(blocks, processors, strict=True):
            if perturbation.mode == "stg-r":
                block.forward = _keeping_skip_row(block.forward)
            else:
                block.attn1.set_processor(ValuesOnlyInSkipRow(processor))
        yield
    finally:
        for block, processor in zip(blocks, processors, strict=True):
            vars(block).pop("forward", None)
            block.attn1.set_processor(processor)


def _keeping_skip_row(forward: Forward) -> Forward:
    """stg-r: the block runs for all rows, then the last row is put back as it was."""

    def run(hidden_states: Tensor, *others: Any, **options: Any) -> Tensor:
        return torch.cat([forward(hidden_states, *others, **options)[:-1], hidden_states[-1:]])

    return run


def _ltx_video_options(family: Any, workload: Workload, frame_rate: float) -> dict[str, Any]:
    _, frames, height, width = family.latent_shape(workload)
    temporal, spatial = family.compression
    return {
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (temporal / frame_rate, spatial, spatial),
        "return_dict": False,
    }


# family -> how its diffusers transformer is called, beside the four tensors
_OPTIONS = {"ltx-video": _ltx_video_options}


class EagerStep:
    """A CFG+STG step on the uncut model: uncond, cond and skip rows in one batch of three.

    `model` is a diffusers transformer of the setting, or what torch.compile makes of it; the caller
    perturbs its skip row.
    """

    def __init__(self, setting: Setting, model: Any, inputs: Inputs, dtype: torch.dtype, device: Any) -> None:
        family = setting.family
        self._model = model
        self._dtype = dtype
        texts = (inputs.uncond, inputs.cond, inputs.cond)
        self._embeds = torch.cat([text.embeds for text in texts]).to(device, dtype)
        self._mask = torch.cat([text.mask for text in texts]).to(device)
        self._options = _OPTIONS[family.name](family, setting.workload, inputs.frame_rate)

    @torch.no_grad()
    def preds(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Predictions (3, tokens, channels) of uncond, cond, skip; latents (1, tokens, channels) float32."""
        rows = latents.expand(len(GROUPS), -1, -1).to(self._dtype)
        pred: Tensor = self._model(
            rows, self._embeds, timestep.expand(len(GROUPS)), self._mask, **self._options
        )[0]
        return pred

    def step(self, latents: Tensor, timestep: Tensor, guidance: Guidance, inputs: Inputs, i: int) -> Tensor:
        """The latents after step `i` of a two-term solver."""
        uncond, cond, skip = self.preds(latents, timestep).float().split(1)
        pred = combined(
            cond,
            uncond,
            skip if guidance.stg_scale[i] != 0 else None,
            cfg_scale=guidance.cfg_scale[i],
            stg_scale=guidance.stg_scale[i],
            rescale=guidance.rescale[i],
            cfg_zero_star=guidance.cfg_zero_star,
        )
        factors = inputs.solver.two_term[i]
        assert factors is not None
        return latents * factors[0] + pred * factors[1]
