"""Inductor engines on the CPU, against other people's results and against eager modules."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stg_trt import VideoPipeline
from stg_trt.cli.doctor import backend_states
from stg_trt.engines import inductor_chain
from stg_trt.engines.inductor import InductorEngine, Scratch
from stg_trt.engines.inductor_chain import Chain, check_machine, machine_facts
from stg_trt.engines.store import Build, EngineRequest, EngineStore
from stg_trt.errors import EngineRejected
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.segment import engine_outputs
from stg_trt.runtime.device import Cpu
from stg_trt.system.gpu import find_gpu
from tests.support.family_cases import LTX
from tests.support.golden_calls import arguments, every_step, flipped, joined

MAX_ROWS = 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["segmented", "twin"])
def pipeline(request: pytest.FixtureRequest, ltx_checkpoint: Path, inductor_engines: Path) -> VideoPipeline:
    return VideoPipeline.from_pretrained(ltx_checkpoint, engines=inductor_engines, layout=request.param)


@pytest.fixture(scope="module")
def build(inductor_engines: Path) -> Build:
    return EngineStore.open(inductor_engines).find(EngineRequest(layout="segmented"))


@pytest.fixture
def copied(build: Build, tmp_path: Path) -> Build:
    """The segmented build, free to be damaged."""
    return Build(Path(shutil.copytree(build.folder, tmp_path / build.folder.name)), build.manifest)


def load(build: Build, name: str) -> InductorEngine:
    record = build.manifest.record(name)
    assert record is not None
    return InductorEngine([build.folder / file.name for file in record.files], CPU, Scratch(CPU))


def run(engine: InductorEngine, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs of an engine, in memory that was not a number before."""
    context, rows = engine.context(), len(next(iter(inputs.values())))
    specs = {spec.name: spec for spec in engine.chain.tensors}
    outputs = []
    for name, tensor in inputs.items():
        context.bind(name, tensor)
    for name, output in zip(
        engine_outputs(engine.chain.inputs, engine.chain.outputs), engine.chain.outputs, strict=True
    ):
        outputs.append(torch.full(specs[output].with_rows(rows), float("nan")))
        context.bind(name, outputs[-1])
    context.enqueue(0)
    return outputs


@pytest.mark.parametrize("case", LTX.golden_names)
def test_every_step_matches(pipeline: VideoPipeline, ltx_checkpoint: Path, case: str) -> None:
    expected = load_file(ltx_checkpoint / f"{case}.safetensors")
    for i, latents in enumerate(every_step(pipeline, **arguments(case, ltx_checkpoint))):
        assert (latents - expected[f"expected_step_{i:02d}"]).abs().max() <= 1e-4, f"step {i}"


@pytest.mark.parametrize("case", LTX.golden_names)
def test_two_videos_equal_one_by_one(pipeline: VideoPipeline, ltx_checkpoint: Path, case: str) -> None:
    call = arguments(case, ltx_checkpoint)
    other = flipped(call)
    together = pipeline(**joined(call, other)).frames
    apart = torch.cat([pipeline(**call).frames, pipeline(**other).frames])
    assert not torch.allclose(apart[0], apart[1], atol=1e-2)
    assert (together - apart).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["text", "front", "block_1", "mid_2_2", "back"])
def test_any_number_of_rows_equals_the_module(build: Build, ltx_checkpoint: Path, name: str) -> None:
    record, checkpoint = build.manifest.record(name), Checkpoint.open(ltx_checkpoint)
    assert record is not None
    family, workload = checkpoint.family, build.manifest.workload
    module = family.module(checkpoint.load_transformer(), record.segment, expand_masks=False)
    engine = load(build, name)
    for rows in (1, 2, 3, MAX_ROWS):
        inputs = dict(zip(module.inputs, family.trace_inputs(record.segment, workload, rows), strict=True))
        if "keep_attention" in inputs:
            inputs["keep_attention"][-1] = False
        with torch.no_grad():
            expected = module(*inputs.values())
        for got, wanted in zip(run(engine, inputs), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_equal_blocks_share_one_package(build: Build) -> None:
    chains = {
        record.segment.name: load(build, record.segment.name).chain for record in build.manifest.segments
    }
    packages = {name: [piece.package for piece in chain.pieces] for name, chain in chains.items()}
    assert [len(pieces) for pieces in packages.values()] == [1, 2, 1, 1, 1, 2]
    assert packages["front"][1] == packages["mid_2_2"][0] == packages["back"][0]
    assert packages["block_1"] == packages["block_3"] != packages["mid_2_2"]
    names = {name for pieces in packages.values() for name in pieces}
    assert names == {path.name for path in build.folder.glob("*.pt2")} and len(names) == 5


def test_the_twins_share_their_packages_too(inductor_engines: Path) -> None:
    request = EngineRequest(layout="twin")
    twins = [b for b in EngineStore.open(inductor_engines).builds if request.rejects(b.manifest) is None]
    for twin in twins:
        normal, skipped = (load(twin, name).chain.pieces for name in ("normal", "skipped"))
        assert len({piece.package for piece in normal}) == 3 and len(normal) == 7
        assert len(skipped) == (6 if twin.manifest.stg_mode == "stg-r" else 7)
        assert len({piece.package for piece in (*normal, *skipped)}) == (
            3 if twin.manifest.stg_mode == "stg-r" else 4
        )


def test_weights_are_in_memory_once_and_packages_hold_none(build: Build) -> None:
    """Packages read the engine's own memory: what is changed there changes the results."""
    engine = load(build, "block_1")
    family = Checkpoint.open(Path("tests/goldens/ltx")).family
    inputs = dict(
        zip(
            engine.chain.inputs,
            family.trace_inputs(build.manifest.segments[2].segment, build.manifest.workload, 2),
            strict=True,
        )
    )
    (before,) = run(engine, inputs)
    for tensor in engine.weights.values():
        tensor.zero_()
    (after,) = run(engine, inputs)
    assert not torch.equal(before, inputs["hidden_states"])
    torch.testing.assert_close(after, inputs["hidden_states"])


def test_what_crosses_pieces_lies_in_two_sides_of_one_memory(
    inductor_engines: Path, ltx_checkpoint: Path
) -> None:
    twin = EngineStore.open(inductor_engines).find(EngineRequest(layout="twin"))
    engines = twin.load_engines(Cpu())
    normal = engines["normal"]
    assert isinstance(normal, InductorEngine)
    family = Checkpoint.open(ltx_checkpoint).family
    record = twin.manifest.record("normal")
    assert record is not None
    values = family.trace_inputs(record.segment, twin.manifest.workload, 2)
    run(normal, dict(zip(normal.chain.inputs, values, strict=True)))
    sides = [spec.name for spec, rows, side in normal.scratch._tensors]
    assert sorted(sides) == ["embedded_timestep", "hidden_states", "hidden_states", "temb"]
    assert len({engine.scratch for engine in engines.values() if isinstance(engine, InductorEngine)}) == 1


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(MAX_ROWS + 1, 9, 24), "at most 6 rows of prompt_embeds, got .7, 9, 24.: rebuild with"),
        (
            torch.zeros(2, 8, 24),
            r"prompt_embeds as torch.float32 of shape .'rows', 9, 24., got .* .2, 8, 24.",
        ),
        (torch.zeros(2, 9), "prompt_embeds as torch.float32"),
        (torch.zeros(2, 9, 24).half(), "prompt_embeds as torch.float32 .* got torch.float16"),
    ],
    ids=["rows", "shape", "rank", "dtype"],
)
def test_tensors_that_do_not_fit(build: Build, tensor: Tensor, message: str) -> None:
    with pytest.raises(EngineRejected, match=message):
        load(build, "text").context().bind("prompt_embeds", tensor)


def test_everything_must_be_bound(build: Build) -> None:
    context = load(build, "text").context()
    context.bind("prompt_embeds", torch.zeros(2, 9, 24))
    with pytest.raises(AssertionError, match="text"):
        context.enqueue(0)


@pytest.mark.parametrize("suffix", [".pt2", ".safetensors"])
def test_a_changed_file_is_not_loaded(copied: Build, suffix: str) -> None:
    path = next(copied.folder.glob(f"*{suffix}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(EngineRejected, match=f"{path.name}: its contents changed after the build"):
        copied.load_engines(Cpu())


def test_weights_of_something_else(build: Build, tmp_path: Path) -> None:
    save_file({"0.w0": torch.zeros(1)}, tmp_path / "text.safetensors")
    with pytest.raises(EngineRejected, match="expected the weights of an inductor engine, got another file"):
        InductorEngine([tmp_path / "text.safetensors"], CPU, Scratch(CPU))


def test_a_package_of_another_piece(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    block, weights = next(build.folder.glob("block-*.pt2")), build.folder / "text.safetensors"
    chain = load(build, "text").chain
    other = dataclasses.replace(chain, pieces=(dataclasses.replace(chain.pieces[0], package=block.name),))
    monkeypatch.setattr(Chain, "from_metadata", lambda metadata, path: other)
    with pytest.raises(EngineRejected, match=f"{block.name}: inductor cannot load it: .*build the engines"):
        InductorEngine([weights, block], CPU, Scratch(CPU))


def test_another_torch_or_machine(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, path = load(build, "text").chain, Path("text.safetensors")
    assert chain.machine == machine_facts("cpu") and len(chain.machine) > 2
    check_machine(chain, "cpu", path)
    with pytest.raises(EngineRejected, match=r"expected torch 1\.0, which it was built with, got .*here"):
        check_machine(dataclasses.replace(chain, torch="1.0"), "cpu", path)
    for fact in ("sm_90", "avx4096"):
        with pytest.raises(EngineRejected, match=f"a machine with {fact}, got .* without it: .* again here"):
            check_machine(dataclasses.replace(chain, machine=(*chain.machine, fact)), "cpu", path)
    monkeypatch.setattr(inductor_chain, "machine_facts", lambda device: chain.machine[1:])
    with pytest.raises(EngineRejected, match=f"a machine with {chain.machine[0]}"):
        load(build, "text")


def test_the_doctor_tells_what_inductor_can(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {name: (builds, runs) for name, builds, runs in backend_states(find_gpu())}
    if not torch.cuda.is_available():
        assert states["inductor"][0].startswith("for the CPU only: inductor: expected an NVIDIA GPU")
        assert states["inductor"][1] == "on the CPU only: there is no NVIDIA GPU"
    monkeypatch.setenv("CXX", "no-such-compiler")
    states = {name: (builds, runs) for name, builds, runs in backend_states(find_gpu())}
    assert states["inductor"][0].startswith("no: inductor: expected a C++ compiler, got no no-such-compiler")
