"""The diffusers transformer, with the perturbation as public STG pipelines write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stg_trt.guidance.combine import combine
from stg_trt.models.passes import UNCOND
from stg_trt.models.text import TextCondition
from stg_trt.runtime.noise import draw
from stg_trt.runtime.step_key import StepKey

from .diffusers_models import diffusers_model
from .scenario import Inputs, Scenario

Forward = Callable[..., Any]

# As transformers name them, in the order of the blocks' numbers.
_BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks", "running_order")


@contextmanager
def perturbed_skip_row(scenario: Scenario, model: Any) -> Iterator[None]:
    """The last row of the batch perturbed, if it is a skip row; the model is restored afterwards."""
    if not scenario.stg:
        yield
        return
    known, perturbation = diffusers_model(scenario.family), scenario.perturbation
    every = [block for name in _BLOCK_LISTS for block in getattr(model, name, ())]
    blocks = [every[block] for block in perturbation.blocks]
    attentions = [getattr(block, name) for block in blocks for name in known.attentions]
    processors = [attention.processor for attention in attentions]
    try:
        for block in blocks if perturbation.mode == "stg-r" else ():
            block.forward = _keeping_skip_row(block.forward)
        for attention in attentions if perturbation.mode == "stg-a" else ():
            attention.processor = known.skipping(attention.processor)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
        for attention, processor in zip(attentions, processors, strict=True):
            attention.processor = processor


def _keeping_skip_row(forward: Forward) -> Forward:
    """stg-r: the block runs for all rows, then the last row of every stream is put back as it was."""

    def run(hidden_states: Tensor, *others: Any, **options: Any) -> Any:
        after = forward(hidden_states, *others, **options)
        if isinstance(after, Tensor):
            return torch.cat([after[:-1], hidden_states[-1:]])
        # A sound, by its name, or the text, which is also the first after the video.
        named = options.get("audio_hidden_states", options.get("encoder_hidden_states"))
        streams = zip(after, (hidden_states, others[0] if named is None else named), strict=True)
        return tuple(torch.cat([new[:-1], old[-1:]]) for new, old in streams)

    return run


def lower_precision(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights in `dtype`, except those that diffusers keeps in float32 when it loads."""
    wide = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if wide.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


class EagerStep:
    """A step on the whole diffusers model, its passes in one batch of a row each.

    `model` is a diffusers transformer of the scenario, or what torch.compile makes of it; the caller
    perturbs its skip row.
    """

    def __init__(
        self, scenario: Scenario, model: Any, inputs: Inputs, dtype: torch.dtype, device: Any
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._passes = scenario.passes
        self._solver = inputs.solver
        self._guidance = scenario.guidance(inputs.solver)
        self._initial = inputs.noise.to(device)
        generator, draws = inputs.generator(), sum(inputs.solver.draws)
        self._noise = [draw(inputs.noise.shape, generator).to(device) for _ in range(draws)]
        self._timesteps = torch.tensor(inputs.solver.timesteps, device=device)
        texts = [inputs.uncond if one == UNCOND else inputs.cond for one in self._passes]
        text = TextCondition.stacked(texts).to(device, dtype)
        family, workload = scenario.family, scenario.workload
        self._arguments = diffusers_model(family).arguments(family, text, workload, inputs.frame_rate)
        if inputs.audio_noise is not None:
            sound = inputs.audio_noise.expand(len(texts), -1, -1)
            self._arguments["audio_hidden_states"] = sound.to(device, dtype)

    @torch.no_grad()
    def preds(self, latents: Tensor, step: int) -> Tensor:
        """Predictions of a video's step, one row per pass, from its latents (1, ...) in float32.

        A sound stays what it starts from.
        """
        scaled = latents * self._solver.input_scale[step]
        rows = scaled.expand(len(self._passes), *latents.shape[1:]).to(self._dtype)
        timestep = self._timesteps[step].expand(len(rows))
        arguments = self._arguments
        if "audio_hidden_states" in arguments:
            arguments = {**arguments, "sigma": timestep}
        pred: Tensor = self._model(hidden_states=rows, timestep=timestep, **arguments, return_dict=False)[0]
        return pred

    def step(self, latents: Tensor, step: int, preds: list[Tensor]) -> Tensor:
        """The latents after a step; its guided prediction is added to those of the steps before it."""
        key = StepKey.of(self._guidance, self._solver, step)
        pred = combine(
            self.preds(latents, step).unflatten(0, (len(key.passes), 1)),
            torch.tensor(self._guidance.weights(step), device=latents.device),
            key.cond,
            rescale=self._guidance.rescale[step],
            zero_star=key.zero_star,
        )
        preds.append(pred)
        return self._solver.advance(step, latents, preds, self._initial, self._noise)
