"""A whole sampling call: total time, time per step by guidance state, and what the loop adds to its steps."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.guidance.skips import SkipSchedule
from stg_trt.guidance.tables import Guidance
from stg_trt.models.stream import SOUND
from stg_trt.runtime.device import Device
from stg_trt.runtime.sampler import SampledStep
from stg_trt.runtime.step_key import StepKey

from . import record
from .clock import Work, alternate, record_event, synchronize
from .eager_step import EagerStep, lower_precision, perturbed_skip_row
from .loaded_build import LoadedBuild
from .scenario import Inputs, Scenario
from .verify import finite_or_none, limit_for, load_model, relative_l2

_VERIFIED_STEPS = 2
_ALONE_ROUNDS = 10


@dataclass(frozen=True)
class Call:
    """Seconds of one call: in all, as the host waits for it, and of each step on the device."""

    total_s: float
    steps_s: list[float]


@dataclass(frozen=True)
class SampleBenchmark:
    """Samples latents with CFG and STG on every step, on the middle half, and with CFG alone, in turns."""

    scenario: Scenario
    layout: str
    steps: int | None
    rounds: int

    def run(self, output: Path, engines: Path | None) -> None:
        """Builds, verifies the first steps, times, prints a table and writes the JSON."""
        scenario = self.scenario
        scenario.check()
        if SOUND in scenario.family.streams:
            raise InvalidRequest(
                f"checkpoint: expected a model without sound, got {scenario.family.name}, whose eager loop "
                "this benchmark does not have: use stg-trt bench step"
            )
        facts = {"layout": self.layout, "rounds": self.rounds}
        results = record.Record(output, "sample", **scenario.to_json(), **facts)
        device, inputs = scenario.device(), scenario.inputs(self.steps)
        results.result["steps"] = len(inputs.solver.timesteps)
        exact, limit = _eager_latents(scenario, inputs, device)
        with ExitStack() as stack:
            root = engines or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            loaded = LoadedBuild(scenario, scenario.build(self.layout, root), inputs, device)
            results.add(memory=loaded.to_json())
            _verify(loaded, inputs, exact, limit, results)
            guidances = {
                name: _guidance(scenario, inputs, name) for name in ("stg", "stg in the middle", "cfg")
            }
            calls = _alternate(loaded, inputs, guidances, self.rounds, device)
            alone = _steps_alone(loaded, inputs, guidances.values(), device)
            results.add(
                calls={name: _call_result(calls[name], g, inputs, alone) for name, g in guidances.items()},
                step_alone_ms={_state(key): round(seconds * 1e3, 4) for key, seconds in alone.items()},
            )
        _print(results.result)
        results.finish()


def _guidance(scenario: Scenario, inputs: Inputs, name: str) -> Guidance:
    """`stg` on every step, on the middle half of them, or on none."""
    given = scenario.guidance(inputs.solver, stg=name != "cfg")
    if name != "stg in the middle":
        return given
    count = given.num_steps
    middle = range(count // 4, max(count // 4 + 1, count - count // 4))

    def in_middle(skip: SkipSchedule) -> SkipSchedule:
        return replace(skip, scale=tuple(s if i in middle else 0.0 for i, s in enumerate(skip.scale)))

    return replace(given, skips=tuple(map(in_middle, given.skips)))


def _sampled(loaded: LoadedBuild, inputs: Inputs, guidance: Guidance, stop: int) -> Tensor:
    """Latents after at most `stop` steps."""
    return list(islice(_steps(loaded, inputs, guidance), stop))[-1].latents


def _steps(loaded: LoadedBuild, inputs: Inputs, guidance: Guidance) -> Iterator[SampledStep]:
    return loaded.sampler.steps(inputs.run(guidance))


def _eager_latents(scenario: Scenario, inputs: Inputs, device: Device) -> tuple[Tensor, float]:
    """Float32 latents of the eager loop after the verified steps, and how far others may be from them."""
    model = load_model(scenario, device)
    exact = _eager_loop(scenario, model, inputs, torch.float32, device)
    dtype = getattr(torch, scenario.workload.dtype)
    if dtype == torch.float32:
        return exact, limit_for(None)
    lowered = _eager_loop(scenario, lower_precision(model, dtype), inputs, dtype, device)
    return exact, limit_for(relative_l2(lowered, exact))


def _eager_loop(scenario: Scenario, model: Any, inputs: Inputs, dtype: torch.dtype, device: Device) -> Tensor:
    preds: list[Tensor] = []
    with device.scope(), perturbed_skip_row(scenario, model):
        eager = EagerStep(scenario, model, inputs, dtype, device.torch_device)
        latents = inputs.noise.to(device.torch_device)
        for i in range(min(_VERIFIED_STEPS, len(inputs.solver.timesteps))):
            latents = eager.step(latents, i, preds)
        return latents


def _verify(loaded: LoadedBuild, inputs: Inputs, exact: Tensor, limit: float, results: record.Record) -> None:
    """Records how far the sampler's latents are from the eager loop's, and a doubt if that is too far."""
    error = relative_l2(_sampled(loaded, inputs, loaded.guidance, _VERIFIED_STEPS), exact)
    found = {"relative_l2": finite_or_none(error), "limit": finite_or_none(limit)}
    results.add(verification={"steps": _VERIFIED_STEPS, **found})
    if not error <= limit < math.inf:
        results.distrust(
            [
                f"sample: expected latents within a relative L2 of {limit:.1e} of the eager loop after "
                f"{_VERIFIED_STEPS} steps, got {error:.1e}"
            ]
        )


def _alternate(
    loaded: LoadedBuild, inputs: Inputs, guidances: dict[str, Guidance], rounds: int, device: Device
) -> dict[str, list[Call]]:
    """Calls in turns; the first round warms up, and captures."""
    calls: dict[str, list[Call]] = {name: [] for name in guidances}
    for i in range(1 + rounds):
        for name, guidance in guidances.items():
            call = _timed_call(loaded, inputs, guidance, device)
            if i:
                calls[name].append(call)
    return calls


def _timed_call(loaded: LoadedBuild, inputs: Inputs, guidance: Guidance, device: Device) -> Call:
    synchronize(device)
    start = time.perf_counter()
    steps = _steps(loaded, inputs, guidance)
    with device.scope():
        events = [record_event(device)]
        for _ in steps:
            events.append(record_event(device))
    synchronize(device)
    total_s = time.perf_counter() - start
    return Call(total_s, [after.since(before) for before, after in pairwise(events)])


def _steps_alone(
    loaded: LoadedBuild, inputs: Inputs, guidances: Iterable[Guidance], device: Device
) -> dict[StepKey, float]:
    """Median seconds of every guidance state's step, run over and over with no loop around it."""
    keys = {StepKey.of(guidance, inputs.solver, i) for guidance in guidances for i in _indices(inputs)}
    works = {_state(key): Work(loaded.sampler.step(key, loaded.state).enqueue, loaded.reset) for key in keys}
    times = alternate(works, _ALONE_ROUNDS, device)
    return {key: median(times[_state(key)].device_s) for key in keys}


def _indices(inputs: Inputs) -> range:
    return range(len(inputs.solver.timesteps))


def _state(key: StepKey) -> str:
    """A guidance state as it is shown: its passes, and whether the prediction is rescaled."""
    return key.name + (", rescaled" if key.rescaled else "")


def _call_result(
    calls: list[Call], guidance: Guidance, inputs: Inputs, alone: dict[StepKey, float]
) -> dict[str, Any]:
    """Percentiles of the total and of the steps by state, and what is not the steps themselves.

    `overhead` is 1 - (steps alone)/total, with the tables and the constants that come before the first;
    `loop_overhead` is the same without the first step and what comes before it.
    """
    keys = [StepKey.of(guidance, inputs.solver, i) for i in _indices(inputs)]
    by_state: dict[str, list[float]] = {}
    for call in calls:
        for key, seconds in zip(keys, call.steps_s, strict=True):
            by_state.setdefault(_state(key), []).append(seconds)
    total_s = [call.total_s for call in calls]
    loop_s = median(sum(call.steps_s[1:]) for call in calls)
    return {
        "total": record.percentiles(total_s),
        "steps": {
            state: {"count": len(seconds) // len(calls), **record.percentiles(seconds)}
            for state, seconds in by_state.items()
        },
        "overhead": round(1 - sum(alone[key] for key in keys) / median(total_s), 4),
        "loop_overhead": round(1 - sum(alone[key] for key in keys[1:]) / loop_s, 4),
        "setup_ms": round((median(call.steps_s[0] for call in calls) - alone[keys[0]]) * 1e3, 4),
    }


def _print(result: dict[str, Any]) -> None:
    table = Table(
        title=f"{result['model']}, {result['steps']} steps on {result['backend']}", title_justify="left"
    )
    for column in ("guidance", "total ms", "p10", "p90", "set-up ms", "loop overhead"):
        table.add_column(column, justify="left" if column == "guidance" else "right")
    for name, call in result["calls"].items():
        times = (f"{call['total'][key]:.2f}" for key in ("median_ms", "p10_ms", "p90_ms"))
        table.add_row(name, *times, f"{call['setup_ms']:.1f}", f"{call['loop_overhead']:.1%}")
    Console().print(table)
