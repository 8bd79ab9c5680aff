from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from stg_trt.build_engines.compiler import FLOAT32, Run, Tolerance
from stg_trt.build_engines.onnx_compiler import open_session, session_runner
from stg_trt.build_engines.pieces import pieces_of
from stg_trt.build_engines.reference import Reference, State
from stg_trt.build_engines.verify import verify
from stg_trt.engines.store import Build, EngineRequest, EngineStore
from stg_trt.errors import GateMissed
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.segment import TEXT, Segment

NAME = "front"
# Timesteps, and for each of them the inputs and the outputs of the segment.
Eager = tuple[list[float], list[State], list[State]]


@pytest.fixture(scope="module")
def build(ltx_engines: Path) -> Build:
    return EngineStore.open(ltx_engines).find(EngineRequest(layout="segmented"))


@pytest.fixture(scope="module")
def segments(build: Build) -> tuple[Segment, ...]:
    return tuple(record.segment for record in build.manifest.segments)


def reference(checkpoint: Checkpoint, build: Build, segments: tuple[Segment, ...], count: int) -> Reference:
    return Reference(checkpoint, build.manifest.workload, segments, count, rows=2)


@pytest.fixture(scope="module")
def eager(ltx_checkpoint: Path, build: Build, segments: tuple[Segment, ...]) -> Eager:
    """Timesteps, inputs and eager outputs of the front."""
    return run(Checkpoint.open(ltx_checkpoint), build, segments)


def run(checkpoint: Checkpoint, build: Build, segments: tuple[Segment, ...]) -> Eager:
    chain = reference(checkpoint, build, segments, 3)
    segment = next(segment for segment in segments if segment.name == NAME)
    inputs = chain.inputs(segment)
    for piece in pieces_of(segment):
        chain.run(piece, chain.module(piece, expand_masks=True))
    return chain.timesteps, inputs, chain.outputs(segment)


def graph(build: Build) -> Run:
    return session_runner(open_session(onnx.load(build.folder / f"{NAME}.onnx")), {})


def test_the_right_graph_passes_at_every_timestep(build: Build, eager: Eager) -> None:
    timesteps, inputs, expected = eager
    results = verify(NAME, graph(build), timesteps, inputs, expected)
    assert [result.timestep for result in results] == timesteps
    assert all(r.relative_l2 <= 1e-5 and r.cosine > 1 - 1e-9 and r.max_abs < 1e-3 for r in results)
    record = build.manifest.record(NAME)
    # Of the farthest piece, each on its own input: the chain of them is as near.
    assert record is not None and [found.timestep for found in record.verification] == timesteps
    assert all(0 < found.relative_l2 <= 1e-5 for found in record.verification)


def test_timesteps_are_first_middle_and_last(
    ltx_checkpoint: Path, build: Build, segments: tuple[Segment, ...]
) -> None:
    checkpoint = Checkpoint.open(ltx_checkpoint)
    scheduler = checkpoint.scheduler()
    family = checkpoint.family
    family.set_timesteps(scheduler, family.defaults.num_inference_steps, build.manifest.workload)
    every = [float(timestep) for timestep in scheduler.timesteps]
    wanted = {0: [], 1: every[:1], 2: [every[0], every[-1]], 3: [every[0], every[20], every[-1]]}
    for count, timesteps in wanted.items():
        assert reference(checkpoint, build, segments, count).timesteps == timesteps
    assert len(every) == 40


def test_a_graph_of_other_weights_is_caught(
    ltx_checkpoint: Path, build: Build, segments: tuple[Segment, ...]
) -> None:
    others = Checkpoint.open(ltx_checkpoint, random_weights=True)
    with pytest.raises(GateMissed, match=r"front: numerics: expected relative L2 <= 0\.0001 .* at timestep"):
        verify(NAME, graph(build), *run(others, build, segments))


@pytest.mark.parametrize("output", ["hidden_states", "temb", "embedded_timestep"])
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("error", [3 * FLOAT32.relative_l2, float("nan"), float("inf")], ids=str)
def test_one_wrong_output_at_one_timestep_is_caught(
    build: Build, eager: Eager, output: str, step: int, error: float
) -> None:
    timesteps, inputs, expected = eager
    wrong: list[dict[str, Tensor]] = [dict(state) for state in expected]
    wrong[step][output] = wrong[step][output] * (1 + error)
    with pytest.raises(GateMissed, match=f"front: numerics: .* at timestep {timesteps[step]}"):
        verify(NAME, graph(build), timesteps, inputs, wrong)


def test_the_tolerance_is_the_compilers(build: Build, eager: Eager) -> None:
    timesteps, inputs, expected = eager
    wrong = [{name: tensor * 1.01 for name, tensor in state.items()} for state in expected]
    verify(NAME, graph(build), timesteps, inputs, wrong, Tolerance(2e-2, 0.999))
    for tight in (Tolerance(5e-3, 0.999), Tolerance(2e-2, 1.1)):
        with pytest.raises(GateMissed, match=f"expected relative L2 <= {tight.relative_l2} .* got 9.90e-03"):
            verify(NAME, graph(build), timesteps, inputs, wrong, tight)


def test_the_reference_feeds_each_segment_what_those_before_it_made(
    ltx_checkpoint: Path, build: Build, segments: tuple[Segment, ...]
) -> None:
    """Asked for the last segment only, it runs the others; its text is padded, its last row perturbed."""
    chain = reference(Checkpoint.open(ltx_checkpoint), build, segments, 1)
    (last,) = chain.inputs(segments[-1])
    again = reference(Checkpoint.open(ltx_checkpoint), build, segments, 1)
    for segment in segments[:-1]:
        again.run(segment, again.module(segment, expand_masks=False))
        again.outputs(segment)
    assert all(torch.equal(last[name], tensor) for name, tensor in again.inputs(segments[-1])[0].items())
    assert last["hidden_states"].abs().sum() > 0 and (last["text_bias"] < 0).any()
    (block,) = again.inputs(segments[2])
    assert block["keep_attention"].tolist() == [True, False]
    assert segments[0] == TEXT
