"""The steps of a call, one at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.preview import Frames

from .output import VideoPipelineOutput
from .previews import Previews
from .stages import StageClock

if TYPE_CHECKING:
    from .sampler import SampledStep
    from .schedule import Schedule


@dataclass(frozen=True)
class StreamedStep:
    """A step that has been taken: `index` of `steps`, from 0; its timestep; its noise level, 1 for noise; the
    seconds it took; and the packed latents after it, float32.

    `distances` has, for every other pass, how far its prediction is from cond's, as a share of cond's length.
    `preview` (videos, latent frames, rows, columns, 3) is what the video may become, one pixel for each
    position; None if the build has no map for it, or the output is latents.
    """

    index: int
    steps: int
    timestep: float
    noise_level: float
    seconds: float
    latents: Tensor
    distances: Mapping[str, float]
    preview: Frames | None


class StepViewer:
    """Shows the steps of a run."""

    def __init__(self, schedule: Schedule, clock: StageClock, previews: Previews | None) -> None:
        self._schedule = schedule
        self._clock = clock
        self._previews = previews
        self._before = 0.0

    def show(self, step: SampledStep) -> StreamedStep:
        """Every step once, in order."""
        now = self._clock.seconds["denoise"]
        seconds, self._before = now - self._before, now
        solver, latents = self._schedule.solver, step.latents
        return StreamedStep(
            index=step.index,
            steps=self._schedule.guidance.num_steps,
            timestep=step.timestep,
            noise_level=solver.noise_levels[step.index],
            seconds=seconds,
            latents=latents,
            distances=step.distances,
            preview=None if self._previews is None else self._previews.after(step.index, latents),
        )


class VideoStream(Iterator[StreamedStep]):
    """Takes a step whenever the next one is asked for; after the last, `output` has the video.

    To stop early with what there is, set the pipeline's `interrupt`. `close` stops without a video; until
    the stream has ended, other calls of its pipeline wait for it.
    """

    def __init__(self, run: Generator[StreamedStep, None, VideoPipelineOutput]) -> None:
        self._run = run
        self._output: VideoPipelineOutput | None = None

    def __next__(self) -> StreamedStep:
        try:
            return next(self._run)
        except StopIteration as end:
            if end.value is not None:
                self._output = end.value
            raise StopIteration from None

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the call; the pipeline is free for another."""
        self._run.close()

    @property
    def output(self) -> VideoPipelineOutput:
        """What the call would have returned; raises InvalidRequest before the end of the stream."""
        if self._output is None:
            raise InvalidRequest(
                "stream: expected its last step to be taken before its output is read, got an earlier end: "
                "iterate to the end"
            )
        return self._output
