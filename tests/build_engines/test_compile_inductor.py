"""The inductor build: what shares a package, what the gates see, and what is taken over."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend

from stg_trt import build
from stg_trt.build_engines import aoti_package, compile_inductor
from stg_trt.build_engines.aoti_package import attention_kernels, compile_package, fused_attentions
from stg_trt.build_engines.compiler import Job
from stg_trt.build_engines.inductor_runs import InductorRuns, KernelRefused
from stg_trt.build_engines.pieces import pieces_of
from stg_trt.build_engines.reusable_files import ReusableFiles
from stg_trt.build_engines.trace import trace
from stg_trt.engines import cuda_toolkit
from stg_trt.engines import manifest as manifests
from stg_trt.engines.store import Build, EngineRequest, EngineStore
from stg_trt.errors import BackendUnavailable, GateMissed
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.segment import TEXT, Segment
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.runtime.device import Cpu
from tests.support.cli import assert_one_line_error, contents, invoke
from tests.support.family_cases import CASES, LTX, FamilyCase
from tests.support.frozen_segments import BranchesOnRows, ViewsTwoRows
from tests.support.inductor_compiler import compiler_of

X = TensorSpec("x", "float32", (ROWS, 4, 6))
Y = TensorSpec("y", "float32", (ROWS, 4, 6))
CPU = torch.device("cpu")
SKIPPED = Segment("skipped", 1, 4, True, True, skipped=Perturbation("stg-a", (2,)))
FLAGS = ("--height=128", "--width=160", "--num-frames=17", "--text-length=9", "--max-batch=2")


class Doubled(SegmentModule):
    """Twice its input."""

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": 2 * tensors["x"]}


class Literal(SegmentModule):
    """Makes a tensor while it runs."""

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": tensors["x"] + torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])}


@pytest.fixture
def segmented(inductor_engines: Path) -> Build:
    return EngineStore.open(inductor_engines).find(EngineRequest(layout="segmented"))


@pytest.fixture
def beside(segmented: Build, tmp_path: Path) -> Path:
    """A folder for engines in which the segmented build already lies."""
    shutil.copytree(segmented.folder, tmp_path / "engines" / segmented.folder.name)
    return tmp_path / "engines"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the packages that a build compiles."""
    names: list[str] = []

    def recorded(program: Any, path: Path, device: torch.device, attention: Sequence[SDPBackend]) -> Path:
        names.append(path.name.split("-")[0])
        return compile_package(program, path, device, attention)

    monkeypatch.setattr(compile_inductor, "compile_package", recorded)
    return names


def build_on_cpu(checkpoint: Path, output: Path, blocks: list[int], mode: str) -> list[Path]:
    return build(
        checkpoint,
        output,
        **LTX.sizes,
        backend="inductor",
        target="cpu",
        max_batch=2,
        stg_blocks=blocks,
        stg_mode=mode,
    )


@pytest.mark.parametrize("max_rows", [1, 6])
@pytest.mark.parametrize(
    ("module", "specs"),
    [(ViewsTwoRows(("x",), ("out",), True), (X,)), (BranchesOnRows(("x", "y"), ("out",), True), (X, Y))],
    ids=["view", "branch"],
)
def test_frozen_rows_are_named(module: SegmentModule, specs: tuple[TensorSpec, ...], max_rows: int) -> None:
    with pytest.raises(GateMissed, match=f"seg: expected any number of rows from 1 to {max_rows}, got an op"):
        trace("seg", module, specs, (X,), max_rows)


@pytest.mark.slow(reason="traces pieces of every family")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_segment_is_the_chain_of_its_pieces(case: FamilyCase) -> None:
    """Run one after the other they are the segment, whatever is perturbed; rows stay free.

    Of the blocks, the one that may keep its attention or skip it is traced: it does what the others do.
    """
    family, transformer = case.family, case.checkpoint.load_transformer()
    last, traced = family.num_blocks, set[object]()
    for segment, count in (
        (Segment("block_2", 2, 3, keep_input=True), 1),
        *([(TEXT, 1)] if family.has_text_segment else []),
        (Segment("front", 0, 3, front=True), 4),
        (Segment("front", 0, 0, front=True), 1),
        (Segment("back", last - 2, last, back=True), 3),
        (Segment("skipped", 0, last, True, True, skipped=Perturbation("stg-r", (1, 2))), last),
        (Segment("skipped", 0, last, True, True, skipped=Perturbation("stg-r", tuple(range(last)))), 1),
        (Segment("skipped", 0, last, True, True, skipped=Perturbation("stg-a", (2,))), last + 2),
    ):
        pieces = pieces_of(segment)
        assert len(pieces) == count
        module = family.module(transformer, segment, expand_masks=False)
        inputs = family.trace_inputs(segment, case.workload, 2)
        state = dict(zip(module.inputs, inputs, strict=True))
        with torch.no_grad():
            wanted = dict(zip(module.outputs, module(*inputs), strict=True))
            for piece in pieces:
                part = family.module(transformer, piece, expand_masks=False)
                results = part(*(state[name] for name in part.inputs))
                state |= dict(zip(part.outputs, results, strict=True))
                shapes = tuple(weight.shape for weight in part.parameters())
                if shapes not in traced:
                    specs = family.inputs(piece, case.workload), family.outputs(piece, case.workload)
                    assert trace(piece.name, part, *specs, 6).reads
                traced.add(shapes)
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


@pytest.mark.slow(reason="traces a block five times")
def test_pieces_trace_equally_where_only_their_weights_differ(ltx_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(ltx_checkpoint)
    family, workload = checkpoint.family, LTX.workload
    other = Checkpoint.open(ltx_checkpoint, random_weights=True).load_transformer()

    def traced(piece: Segment, transformer: Any, max_rows: int = 6) -> str:
        module = family.module(transformer, piece, expand_masks=False)
        specs = family.inputs(piece, workload), family.outputs(piece, workload)
        return trace("x", module, *specs, max_rows).fingerprint

    transformer = checkpoint.load_transformer()
    first = traced(Segment("block", 0, 1), transformer)
    assert first == traced(Segment("block", 3, 4), other)
    skipped = Segment("block", 0, 1, skipped=Perturbation("stg-a", (0,)))
    others = [
        traced(Segment("block", 0, 1, keep_input=True), transformer),
        traced(skipped, transformer),
        traced(Segment("block", 0, 1), transformer, max_rows=3),
    ]
    assert len({first, *others}) == 4


def test_a_tensor_made_while_it_runs_is_refused() -> None:
    with pytest.raises(GateMissed, match="seg: expected all weights to be parameters or buffers, got 1"):
        trace("seg", Literal(("x",), ("x",), False), (X,), (X,), 6)


def test_an_attention_that_is_not_fused_misses_its_gate(
    beside: Path, ltx_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packages are those of the build beside it; what counts their attentions misses one a block."""

    def one_less(package: Path) -> Counter[str]:
        return fused_attentions(package) - Counter(flash=int(package.name.startswith("block")))

    monkeypatch.setattr(compile_inductor, "fused_attentions", one_less)
    with pytest.raises(GateMissed, match="block_1: expected 2 fused attentions, got 1: an attention of this"):
        build_on_cpu(ltx_checkpoint, beside, [1], "stg-r")
    (folder,) = beside.glob("segmented-stg-r-1-*")
    assert {path.suffix for path in folder.iterdir() if path.name != ".lock"} == {
        ".json", ".pt2", ".safetensors",
    }  # fmt: skip
    # Both are the same in the build beside it.
    assert [record.segment.name for record in manifests.load(folder).segments] == ["text", "front"]


def test_the_next_attention_kernel_takes_the_place_of_one_that_refuses(
    segmented: Build, tmp_path: Path, ltx_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU's first run shows it; all that follows is compiled without the kernel."""
    tried: list[tuple[str, str]] = []
    package = next(path for path in segmented.folder.glob("block-*.pt2"))

    def first_refuses(self: InductorRuns) -> None:
        if tried[-1][1] == "FLASH_ATTENTION":
            raise KernelRefused("front: the compiled engine cannot run: no plan")

    def copied(program: Any, path: Path, device: torch.device, attention: Sequence[SDPBackend]) -> Path:
        tried.append((path.name, attention[0].name))
        return Path(shutil.copyfile(package, path))

    monkeypatch.setattr(InductorRuns, "activation_bytes", first_refuses)
    monkeypatch.setattr(compile_inductor, "compile_package", copied)
    compiler = compiler_of(ltx_checkpoint, tmp_path, "fp32")
    family, segment = LTX.family, Segment("block", 1, 2)
    specs = tuple(family.inputs(segment, LTX.workload)), tuple(family.outputs(segment, LTX.workload))
    job = Job(segment, *specs, (1, 3, 6), tmp_path, lambda phase: None)
    module = family.module(LTX.checkpoint.load_transformer(segment.blocks), segment, expand_masks=False)
    export = compiler.export(job)
    export.append(segment, module)
    exported = export.finish()
    nothing = ReusableFiles(tmp_path, segmented.manifest.model_copy(update={"segments": ()}))
    with pytest.warns(UserWarning, match="no plan; compiling it again without FLASH_ATTENTION, .*CUDNN_ATT"):
        compiled = compiler.compile(job, exported, "cpu", nothing)
    assert [kernel for _, kernel in tried] == ["FLASH_ATTENTION", "CUDNN_ATTENTION"]
    assert tried[0][0] != tried[1][0] and compiled.attention_kernels == ("flash",)
    compiler.compile(job, exported, "cpu", nothing)
    assert tried[2] == tried[1]


def test_what_inductor_refuses_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no such\n\nkernel")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuses)
    program = trace("x", Doubled(("x",), ("x",), False), (X,), (X,), 6).program
    with pytest.raises(GateMissed, match=r"^x: inductor cannot compile it: no such kernel$"):
        compile_package(program, tmp_path / "x.pt2", CPU, attention_kernels(CPU))
    assert not list(tmp_path.iterdir())


def test_a_finished_package_is_taken_over_only_whole(segmented: Build, beside: Path, tmp_path: Path) -> None:
    own = Build(beside / segmented.folder.name, segmented.manifest)
    text = next(own.folder.glob("text-*.pt2"))
    work = tmp_path / "work"
    work.mkdir()
    assert ReusableFiles(own.folder, own.manifest).take(text.name, work) == text
    empty = segmented.manifest.model_copy(update={"segments": ()})
    other = ReusableFiles(beside / "new", empty)
    copied = other.take(text.name, work)
    assert copied == work / text.name and copied.read_bytes() == text.read_bytes() and text.exists()
    assert other.take("head-0.pt2", work) is None
    text.write_bytes(text.read_bytes()[:-1] + b"\xff")
    assert other.take(text.name, work) is None
    assert ReusableFiles(own.folder, own.manifest).take(text.name, work) is None


def test_an_interrupted_build_is_finished(
    segmented: Build, beside: Path, ltx_checkpoint: Path, compiled: list[str]
) -> None:
    """Killed in the second segment; its packages come from a whole build beside it."""
    (folder,) = beside.iterdir()
    shutil.copytree(folder, beside / "whole")
    before, kept = contents(folder), segmented.manifest.segments[:1]
    manifests.save(segmented.manifest.model_copy(update={"segments": kept, "complete": False}), folder)
    for path in (*folder.glob("*.pt2"), *folder.glob("*.safetensors")):
        if path.name not in {file.name for record in kept for file in record.files}:
            path.unlink()
    assert build_on_cpu(ltx_checkpoint, beside, [1, 3], "stg-a") == [folder]
    after = contents(folder)
    assert compiled == [] and after.keys() == before.keys()
    assert all(after[name] == before[name] for name in after if name != "manifest.json")
    assert EngineStore.open(beside).builds[0].load_engines(Cpu())


def test_the_command_line_builds_and_generates(
    beside: Path, ltx_checkpoint: Path, embeds: Path, tmp_path: Path
) -> None:
    """All packages lie in the build beside it, since `build` compiles in the same way."""
    (other,) = beside.iterdir()
    options = ("--backend=inductor", "--target=cpu", *FLAGS, "--stg-blocks=1", "--stg-mode=stg-a")
    result = invoke("build", ltx_checkpoint, "--output", beside, *options)
    assert result.returncode == 0 and "back: done" in result.stderr, result.stderr
    shutil.rmtree(other)
    (folder,) = beside.iterdir()
    record = manifests.load(folder).record("front")
    assert record is not None and all(v.relative_l2 <= 1e-4 for v in record.verification)
    assert record.seconds.keys() == {"reference", "export", "compile", "verify"}
    shown = invoke("inspect", beside)
    assert "inductor for cpu" in shown.stdout and "2/2" in shown.stdout, shown.stderr
    output = tmp_path / "x.safetensors"
    sizes = ("--backend=inductor", "--num-inference-steps=4", "--embeds", embeds, "--output", output)
    made = invoke("generate", ltx_checkpoint, "--engines", beside, *sizes)
    (stages,) = made.stderr.splitlines()  # And no warning.
    assert made.returncode == 0 and stages.startswith("load "), made.stderr
    assert torch.isfinite(load_file(output)["latents"]).all()


def test_a_missing_compiler_is_told_in_one_line(
    tmp_path: Path, ltx_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    output = tmp_path / "new" / "engines"
    options = ("--output", output, "--backend=inductor", "--target=cpu", *FLAGS, "--stg-blocks=")
    result = invoke("build", ltx_checkpoint, *options)
    assert_one_line_error(result, r"inductor: expected a C\+\+ compiler, got no g\+\+ on the PATH: install g")
    assert not list(tmp_path.iterdir())


def test_what_a_target_needs(tmp_path: Path, ltx_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        BackendUnavailable, match="an NVIDIA GPU for --target this-gpu, got none: use --target"
    ):
        compiler_of(ltx_checkpoint, tmp_path, "bf16", "this-gpu").version  # noqa: B018
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("stg_trt.engines.inductor_chain.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="expected the Python module triton, got no such module"):
        compiler_of(ltx_checkpoint, tmp_path, "bf16", "this-gpu").version  # noqa: B018
    monkeypatch.setattr("stg_trt.engines.inductor_chain.find_spec", lambda name: name)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_toolkit, "_USUAL_PLACE", tmp_path)
    monkeypatch.setattr(cuda_toolkit, "_wheels", list)
    with pytest.raises(
        BackendUnavailable, match=r"CUDA toolkit, got no include/cuda\.h in .*CUDA_HOME to it"
    ):
        compiler_of(ltx_checkpoint, tmp_path, "bf16", "this-gpu").version  # noqa: B018


def test_a_failed_compile_is_told_in_the_compilers_words() -> None:
    said = "C++ compile error\n\nCommand:\ng++ " + 100 * "-I/include " + "\n\nOutput:\nld: cannot find -lcuda"
    assert aoti_package._reason(RuntimeError(said)) == "C++ compile error ld: cannot find -lcuda"


def test_the_fastest_attention_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, first in (((9, 0), "CUDNN_ATTENTION"), ((8, 9), "FLASH_ATTENTION")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        kernels = [kernel.name for kernel in attention_kernels(torch.device("cuda"))]
        assert kernels[0] == first and kernels[-1] == "MATH" and len(set(kernels)) == 4
