"""The samplers of a pipeline, each made when a call first needs its build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from stg_trt.engines.backends import backend_for
from stg_trt.engines.store import Build
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.ranks import check_ranks

from .device import Device, open_device
from .ranks import Ranks
from .run_inputs import RunInputs
from .sampler import SampledStep, Sampler
from .stages import StageClock


class Samplers:
    """A sampler for each build, and with `guidance_parallel` above 1 the ranks that take steps with it.

    Raises InvalidRequest for a number of ranks that no step could use.
    """

    def __init__(self, family: ModelFamily, clock: StageClock, guidance_parallel: int) -> None:
        check_ranks(guidance_parallel)
        self._family = family
        self._clock = clock
        self._ranks = Ranks(guidance_parallel) if guidance_parallel > 1 else None
        self._samplers: dict[Path, Sampler] = {}
        self._devices: dict[str, Device] = {}

    def device(self, build: Build) -> Device:
        """One device for all builds of a kind, so that graphs share memory."""
        name = backend_for(build.manifest.backend).target(build.manifest.target).device
        if name not in self._devices:
            self._devices[name] = open_device(name)
        return self._devices[name]

    def steps(self, build: Build, inputs: RunInputs) -> Iterator[SampledStep]:
        """The steps of a run on a build; raises RankLost if a rank's process ends before the run."""
        sampler = self._sampler(build)
        return sampler.steps(inputs) if self._ranks is None else self._ranks.steps(sampler, build, inputs)

    def _sampler(self, build: Build) -> Sampler:
        """Made anew if the ranks that it was made with are gone."""
        known = self._samplers.get(build.folder)
        if known is not None and (self._ranks is None or self._ranks.has(known.ranks)):
            return known
        # Its memory is free before that of the next is taken.
        del known
        self._samplers.pop(build.folder, None)
        device = self.device(build)
        with self._clock.stage("load"):
            group = None if self._ranks is None else self._ranks.group(device)
            with nullcontext() if self._ranks is None else self._ranks.loading(build, self._family):
                engines = build.load_engines(device)
        self._samplers[build.folder] = Sampler(self._family, build.manifest, engines, device, group)
        return self._samplers[build.folder]
