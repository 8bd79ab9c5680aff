"""FP8 calibration: the largest inputs of a model's layers over a short run, and what FP8 then costs.

The float32 model runs a few prompts for a few steps with the family's guidance. Hooks see the inputs of every
layer that becomes FP8. Then it runs again beside the same model with FP8 layers, on the same latents.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pydantic
import torch
from torch import Tensor, nn

from stg_trt.engines.float8_record import Float8Record, StepError
from stg_trt.engines.key import digest, export_version
from stg_trt.errors import GateMissed
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.float8 import Float8Rule, neighbours
from stg_trt.models.passes import COND, Pass, all_blocks
from stg_trt.models.plan import SegmentRun
from stg_trt.models.segment import Segment
from stg_trt.system.files import write_atomically

from .calibration_texts import can_encode, encode, random_texts
from .float8_linear import Float8Linear
from .guided_run import GuidedRun, RunOptions
from .progress import Progress
from .streamed_model import Change, State, StreamedModel, unchanged

_log = logging.getLogger(__name__)
# Raised when the same facts give another calibration.
_VERSION = 1
# Errors are measured on the first prompts of the list: FP8 is slow to emulate, and they are much alike.
_MEASURED_PROMPTS = 2
LARGEST_PRED_ERROR = 0.15
LARGEST_SKIP_ERROR = 0.5


@dataclass(frozen=True)
class Calibrator:
    """One calibration; `prompts` are not read where they cannot be encoded."""

    run: RunOptions
    prompts: tuple[str, ...]
    output: Path
    progress: Progress

    def calibrate(self) -> Float8Record:
        """The record of an earlier build below `output` with the same facts, or a new one, kept there.

        Raises GateMissed if FP8 changes the predictions, or what STG adds to them, too much.
        """
        facts = self._facts()
        path = self.output / f"calibration-{digest(facts)[:8]}.json"
        record = _read(path, facts)
        if record is None:
            record = self._measured()
            body = {"facts": facts, "record": record.model_dump(mode="json")}
            write_atomically(path, (json.dumps(body, indent=1) + "\n").encode())
        _check(record)
        return record

    def _facts(self) -> dict[str, object]:
        """All that decides what is found."""
        run = self.run
        checkpoint, family = run.checkpoint, run.checkpoint.family
        workload = replace(run.workload, precision="fp32", activations=None)
        return {
            "version": _VERSION,
            "weights": checkpoint.fingerprint(),
            "lora": [str(lora) for lora in checkpoint.applied_lora],
            "export_version": export_version(family),
            "workload": asdict(workload),
            "segments": [segment.name for segment in run.segments],
            "stg_mode": run.stg_mode,
            "skips": {name: list(blocks) for name, blocks in run.skips.items()},
            "prompts": list(self.prompts) if can_encode(checkpoint) else None,
            "steps": run.steps,
            "rule": asdict(_rule(run)),
        }

    def _measured(self) -> Float8Record:
        run, family = self.run, self.run.checkpoint.family
        reads = can_encode(run.checkpoint)
        texts = (
            encode(run.checkpoint, run.workload, self.prompts)
            if reads
            else random_texts(run.checkpoint, run.workload)
        )
        largest = self._largest_inputs(GuidedRun(run, texts))
        guided = GuidedRun(run, replace(texts, conds=texts.conds[:_MEASURED_PROMPTS]))
        rule, blocks = _rule(run), family.num_blocks
        kept = rule.end_blocks(blocks)
        record = Float8Record(
            prompts=self.prompts if reads else None,
            num_steps=guided.num_steps,
            kept_blocks=tuple(sorted(kept)),
            largest_inputs=_without(largest, kept),
            steps=(),
            segments={},
        )
        measured = self._with_errors(record, guided)
        # What is perturbed, what it reads and what reads it, in full precision: if that leaves any FP8.
        kept |= neighbours(all_blocks(run.skips), blocks)
        fewer = _without(largest, kept)
        if not _allows(measured) and fewer:
            changes = {"kept_blocks": tuple(sorted(kept)), "largest_inputs": fewer}
            measured = self._with_errors(record.model_copy(update=changes), guided)
        return measured

    def _largest_inputs(self, guided: GuidedRun) -> dict[str, float]:
        """Of every layer that can be FP8, by its name."""
        largest: dict[str, float] = {}
        model = StreamedModel(self.run.checkpoint, self.run.workload, _watching(self.run, largest))
        for step, _, states in guided.trajectory():
            self.progress.calibrate(f"largest inputs, step {step + 1} of {guided.num_steps}")
            for one in guided.runs(step):
                model.run(one, guided.guidance.passes(step), states)
        return dict(sorted(largest.items()))

    def _with_errors(self, record: Float8Record, guided: GuidedRun) -> Float8Record:
        """The record with what its layers cost."""
        checkpoint, workload = self.run.checkpoint, self.run.workload
        exact = StreamedModel(checkpoint, workload, unchanged)
        rounded = StreamedModel(checkpoint, workload, converting(record, checkpoint.family.transformers))
        steps, segments = [], dict.fromkeys((one.name for one in self.run.segments), 0.0)
        for step, every, states in guided.trajectory():
            self.progress.calibrate(f"errors, step {step + 1} of {guided.num_steps}")
            passes = guided.guidance.passes(step)
            others = guided.states(step, every)
            for one in guided.runs(step):
                exact.run(one, passes, states)
                rounded.run(one, passes, others)
                name = one.segment.name
                segments[name] = max(segments[name], self._segment_error(one, passes, states, others))
            sums = [
                [guided.guided(step, state, latents) for state, latents in zip(found, every, strict=True)]
                for found in (states, others)
            ]
            preds = [(one.pred, one.latents) for one in checkpoint.family.streams]
            compared = [
                _step_error(
                    guided.solver.timesteps[step],
                    passes,
                    *(torch.stack([state[pred] for state in found], 1) for found in (states, others)),
                    *(torch.stack([latents[name] for latents in found]) for found in sums),
                )
                for pred, name in preds
            ]
            steps.append(max(compared, key=lambda found: found.pred))
        return record.model_copy(update={"steps": tuple(steps), "segments": segments})

    def _segment_error(
        self, one: SegmentRun, passes: Sequence[Pass], states: Sequence[State], others: Sequence[State]
    ) -> float:
        """The largest of what a segment has made."""
        rows = [passes.index(computed) for computed in one.passes]
        names = self.run.checkpoint.family.borders(one.segment)[1]
        return max(
            _relative(torch.stack([state[name][rows] for state in others]),
                      torch.stack([state[name][rows] for state in states]))
            for name in names
        )  # fmt: skip


def converting(record: Float8Record, parts: Sequence[str]) -> Change:
    """Makes the layers of a piece FP8 that a record has inputs of; `parts` are the transformers' names."""

    def convert(piece: Segment, module: SegmentModule) -> None:
        for name, layer in _linears(module):
            largest = record.largest_inputs.get(f"{parts[piece.expert]}.{name}")
            if largest is not None:
                parent, _, child = name.rpartition(".")
                setattr(module.get_submodule(parent), child, Float8Linear(layer, largest))

    return convert


def _watching(run: RunOptions, largest: dict[str, float]) -> Change:
    """Records the largest inputs of the layers that the family's rule takes."""
    rule, parts = _rule(run), run.checkpoint.family.transformers

    def watch(piece: Segment, module: SegmentModule) -> None:
        for name, layer in _linears(module):
            if rule.takes(name, ()):
                layer.register_forward_pre_hook(watch_input(f"{parts[piece.expert]}.{name}", largest))

    return watch


def watch_input(name: str, largest: dict[str, float]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that keeps the largest absolute input of all that it sees."""

    def see(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        largest[name] = max(largest.get(name, 0.0), float(inputs[0].abs().max()))

    return see


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in [*module.named_modules()]:
        if isinstance(layer, nn.Linear):
            yield name, layer


def _rule(run: RunOptions) -> Float8Rule:
    """The family's."""
    rule = run.checkpoint.family.float8
    assert rule is not None
    return rule


def _without(largest: Mapping[str, float], kept: frozenset[int]) -> dict[str, float]:
    """The inputs of layers outside of some blocks."""
    return {
        name: value
        for name, value in largest.items()
        if int(name.partition(".blocks.")[2].partition(".")[0]) not in kept
    }


def _step_error(
    timestep: float, passes: Sequence[Pass], exact: Tensor, rounded: Tensor, guided: Tensor, other: Tensor
) -> StepError:
    """Of predictions (passes, prompts, ...) and their guided sums (prompts, ...)."""
    cond = passes.index(COND)
    skip, along = {}, {}
    for row, one in enumerate(passes):
        if one.is_skip:
            wanted, got = exact[cond] - exact[row], rounded[cond] - rounded[row]
            skip[one.name] = _relative(got, wanted)
            along[one.name] = float((got * wanted).sum() / wanted.square().sum())
    pred = _relative(rounded[cond], exact[cond])
    return StepError(timestep=timestep, pred=pred, guided=_relative(other, guided), skip=skip, along=along)


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _allows(record: Float8Record) -> bool:
    skip = record.skip_error
    return record.pred_error <= LARGEST_PRED_ERROR and (skip is None or skip <= LARGEST_SKIP_ERROR)


def _check(record: Float8Record) -> None:
    """The gate on the whole model, with random weights too."""
    if not _allows(record):
        skip = record.skip_error
        raise GateMissed(
            f"fp8: expected relative errors of at most {LARGEST_PRED_ERROR} of the prediction and "
            f"{LARGEST_SKIP_ERROR} of cond - skip, got {record.pred_error:.2f} and "
            f"{'none' if skip is None else f'{skip:.2f}'}: use --precision bf16, or other --stg-blocks"
        )


def _read(path: Path, facts: Mapping[str, object]) -> Float8Record | None:
    """The record of a file with these facts; None if there is none."""
    try:
        body = json.loads(path.read_text("utf-8"))
        if body["facts"] != facts:
            return None
        return Float8Record.model_validate(body["record"])
    except (OSError, ValueError, KeyError, TypeError, pydantic.ValidationError) as error:
        _log.info("%s: calibrating anew (%s)", path, error)
        return None
