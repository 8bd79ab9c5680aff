"""What inductor makes of a perturbable block of every family, for the CPU; the rest is traced elsewhere.

Most of a package's time goes into what all packages have, so that all blocks are compiled into one.
"""

from __future__ import annotations

import copy
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stg_trt.build_engines.aoti_package import attention_kernels, compile_package, fused_attentions
from stg_trt.build_engines.compiler import BFLOAT16
from stg_trt.build_engines.trace import Trace, trace
from stg_trt.build_engines.weights import weights_of
from stg_trt.models.families.keep_flags import KEEP_ATTENTION
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from tests.support.family_cases import COGVIDEOX, HUNYUAN_VIDEO, LTX, MOCHI, WAN, FamilyCase

pytestmark = pytest.mark.slow(reason="compiles a package with AOTInductor")

MAX_ROWS = 6
X = TensorSpec("x", "float32", (ROWS, 4, 6))
# LTX-Video is compiled whole elsewhere. HunyuanVideo has blocks of two kinds.
BLOCKS = ((WAN, 2), (MOCHI, 2), (HUNYUAN_VIDEO, 0), (HUNYUAN_VIDEO, 4), (COGVIDEOX["2b"], 2))


class Foldable(SegmentModule):
    """Weights that a compiler likes to make part of its code: short, uniform, a scalar."""

    def __init__(self) -> None:
        super().__init__(("x",), ("x",), False)
        self.short = nn.Parameter(torch.arange(6.0))
        self.uniform = nn.Parameter(torch.ones(4, 6))
        self.scalar = nn.Parameter(torch.tensor(2.0))

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": tensors["x"] * self.uniform + self.short * self.scalar}


class Unfused(SegmentModule):
    """Two attentions, of which one writes its softmax out."""

    def __init__(self) -> None:
        super().__init__(("x",), ("x",), False)

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        x = tensors["x"][:, None]
        weights = (x @ x.transpose(2, 3) * x.shape[3] ** -0.5).exp()
        by_hand = (weights / weights.sum(dim=3, keepdim=True)) @ x
        return {"x": (by_hand + functional.scaled_dot_product_attention(x, x, 2 * x))[:, 0]}


class Folded(SegmentModule):
    """What gelu_epilogue.py makes of a product for a GPU; on a CPU the operator has the erf GELU."""

    def __init__(self) -> None:
        super().__init__(("x",), ("x",), False)
        self.weight = nn.Parameter(torch.arange(36.0).reshape(6, 6) / 36 - 0.5)
        self.bias = nn.Parameter(torch.arange(6.0) / 6)

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = tensors["x"].reshape(-1, 6)
        product = torch.ops.aten._addmm_activation(self.bias, rows, self.weight.t(), use_gelu=True)
        return {"x": product.reshape(-1, 4, 6)}


@dataclass(frozen=True)
class Part:
    """A module with its borders and how many fused attentions it must become."""

    module: SegmentModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attentions: int = 0

    @classmethod
    def of(cls, case: FamilyCase, segment: Segment, precision: str = "fp32") -> Part:
        family, workload = case.family, replace(case.workload, precision=precision)
        module = family.module(case.checkpoint.load_transformer(segment.blocks), segment, expand_masks=False)
        family.lower_precision(module, getattr(torch, workload.dtype))
        borders = tuple(family.inputs(segment, workload)), tuple(family.outputs(segment, workload))
        return cls(module, *borders, family.attentions(segment))


class Together(SegmentModule):
    """All parts at once; the names at their borders begin with the name of the part."""

    def __init__(self, parts: dict[str, Part]) -> None:
        named = {name: part.module for name, part in parts.items()}
        inputs = (f"{name}.{tensor}" for name, module in named.items() for tensor in module.inputs)
        outputs = (f"{name}.{tensor}" for name, module in named.items() for tensor in module.outputs)
        super().__init__(tuple(inputs), tuple(outputs), False)
        self.parts = nn.ModuleDict(named)

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        results: dict[str, Tensor] = {}
        for name, module in self.parts.items():
            assert isinstance(module, SegmentModule)
            given = module(*(tensors[f"{name}.{tensor}"] for tensor in module.inputs))
            results |= {f"{name}.{tensor}": out for tensor, out in zip(module.outputs, given, strict=True)}
        return results


class Package:
    """All parts in one package, which is loaded without weights."""

    def __init__(self, folder: Path, parts: dict[str, Part]) -> None:
        self.parts = parts
        self.together = Together(parts)
        self.traced: Trace = trace(
            "all", self.together, self._specs("inputs"), self._specs("outputs"), MAX_ROWS
        )
        cpu = torch.device("cpu")
        self.path = compile_package(self.traced.program, folder / "all.pt2", cpu, attention_kernels(cpu))
        self._loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(self.path), "model", True, 1, -1)

    def outputs(self, inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of all parts, by name; an input that is not given is zeros."""
        rows = len(next(iter(inputs.values())))
        self._loader.load_constants(weights, False, True, True)
        given = [inputs.get(spec.name, _empty(spec, rows, 0)) for spec in self._specs("inputs")]
        outputs = [_empty(spec, rows, torch.nan) for spec in self._specs("outputs")]
        self._loader.run([*given, *outputs])
        return dict(zip(self.together.outputs, outputs, strict=True))

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.traced.weights_of(self.together)

    @property
    def constants(self) -> set[str]:
        return {*self._loader.get_constant_fqns()}

    def _specs(self, side: str) -> list[TensorSpec]:
        return [
            replace(spec, name=f"{name}.{spec.name}")
            for name, part in self.parts.items()
            for spec in getattr(part, side)
        ]


def _empty(spec: TensorSpec, rows: int, value: float) -> Tensor:
    return torch.full(spec.with_rows(rows), value, dtype=spec.torch_dtype)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    parts = {
        f"{case}_{block}": Part.of(case, Segment("block", block, block + 1, keep_input=True))
        for case, block in BLOCKS
    }
    skipped = Segment("mid", 1, 2, skipped=Perturbation("stg-a", (1,)))
    parts["rounded"] = Part.of(LTX, skipped, "bf16")
    parts["foldable"] = Part(Foldable(), (X,), (X,))
    parts["folded"] = Part(Folded(), (X,), (X,))
    parts["unfused"] = Part(Unfused(), (X,), (X,), attentions=1)
    return Package(tmp_path_factory.mktemp("package"), parts)


def test_fused_attentions_are_counted_and_others_are_not(package: Package) -> None:
    wanted = sum(part.attentions for part in package.parts.values())
    assert fused_attentions(package.path) == {"flash": wanted}
    assert list(package.path.parent.iterdir()) == [package.path]


@pytest.mark.parametrize(("case", "block"), BLOCKS, ids=str)
def test_a_compiled_block_equals_the_module(package: Package, case: FamilyCase, block: int) -> None:
    """For numbers of rows that it was not traced with; some rows skip their attention."""
    name = f"{case}_{block}"
    part = package.parts[name]
    segment = Segment("block", block, block + 1, keep_input=True)
    for rows in (1, 2, 3, MAX_ROWS):
        inputs = dict(
            zip(part.module.inputs, case.family.trace_inputs(segment, case.workload, rows), strict=True)
        )
        inputs[KEEP_ATTENTION] = torch.arange(rows) % 2 == 0
        got = package.outputs(
            {f"{name}.{tensor}": value for tensor, value in inputs.items()}, package.weights
        )
        with torch.no_grad():
            expected = part.module(*inputs.values())
        for output, wanted in zip(part.module.outputs, expected, strict=True):
            torch.testing.assert_close(got[f"{name}.{output}"], wanted, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_within_its_own_tolerance(package: Package) -> None:
    """One block whose self-attention is skipped, against eager float32 of the same rounded weights."""
    part = package.parts["rounded"]
    generator = torch.Generator().manual_seed(1)
    inputs = {
        spec.name: torch.randn(spec.with_rows(2), generator=generator)
        if spec.torch_dtype.is_floating_point
        else spec.random(2, generator)
        for spec in part.inputs
    }
    rounded = {f"rounded.{spec.name}": inputs[spec.name].to(spec.torch_dtype) for spec in part.inputs}
    (name,) = (f"rounded.{spec.name}" for spec in part.outputs)
    got = package.outputs(rounded, package.weights)[name]
    with torch.no_grad():
        (wanted,) = copy.deepcopy(part.module).float()(*inputs.values())
    assert got.dtype == torch.bfloat16
    difference = float((got.float() - wanted).norm() / wanted.norm())
    assert 1e-4 < difference < BFLOAT16.relative_l2 / 2


def test_no_weight_becomes_part_of_a_package(package: Package) -> None:
    weights = package.weights
    assert package.constants == weights.keys()
    largest = max(weights.values(), key=torch.numel).detach().contiguous().numpy().tobytes()
    with zipfile.ZipFile(package.path) as archive:
        assert not any(largest in archive.read(name) for name in archive.namelist())
    places = [name for name, _ in weights_of(package.together)]
    names = [f"w{places.index(f'parts.foldable.{name}')}" for name in ("short", "uniform", "scalar")]
    for change in (1.0, 3.0):
        short, uniform, scalar = changed = [weights[name] * change + change for name in names]
        given = weights | dict(zip(names, changed, strict=True))
        x = torch.randn(3, 4, 6)
        got = package.outputs({"foldable.x": x}, given)["foldable.x"]
        torch.testing.assert_close(got, x * uniform + short * scalar)


def test_a_product_with_gelu_is_compiled(package: Package) -> None:
    x, module = torch.randn(3, 4, 6), package.parts["folded"].module
    got = package.outputs({"folded.x": x}, package.weights)["folded.x"]
    with torch.no_grad():
        expected = functional.gelu(functional.linear(x, module.weight, module.bias))  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
