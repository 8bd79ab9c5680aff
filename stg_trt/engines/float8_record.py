"""What a build's manifest says of FP8: which layers, made from which inputs, and how far off they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import pydantic


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class StepError(_Record):
    """A step of the calibration's run with FP8, on the latents of the run without.

    Relative L2 errors: of cond's prediction, of the guided sum, and of cond - skip for every skip pass.
    `along` is what cond - skip has along the exact one, as a fraction of it.
    """

    timestep: float
    pred: float
    guided: float
    skip: dict[str, float]
    along: dict[str, float]


class Float8Record(_Record):
    """The calibration of a build.

    `prompts` are those of its run, None if prompts could not be read, and one with random text was run
    instead. `largest_inputs` are by layer; those of `kept_blocks` and small ones are not FP8. `segments` are
    the errors of the tensors behind each segment, all steps and segments before it included.
    """

    prompts: tuple[str, ...] | None
    num_steps: int
    kept_blocks: tuple[int, ...]
    largest_inputs: dict[str, float]
    steps: tuple[StepError, ...]
    segments: dict[str, float]

    @property
    def pred_error(self) -> float:
        """The largest of a step's conditional prediction."""
        return max(step.pred for step in self.steps)

    @property
    def skip_error(self) -> float | None:
        """The largest of a step's cond - skip; None if no step has a skip pass."""
        return max((error for step in self.steps for error in step.skip.values()), default=None)

    def digest(self, part: str, blocks: Iterable[int]) -> str:
        """SHA-256 of the FP8 layers of some blocks of a transformer; empty if there are none."""
        prefixes = tuple(f"{part}.blocks.{block}." for block in blocks)
        found = {
            layer: largest for layer, largest in self.largest_inputs.items() if layer.startswith(prefixes)
        }
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() if found else ""
