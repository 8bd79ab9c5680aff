"""Every family: the cut model against that of diffusers, both eager, on the goldens' weights."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.passes import COND, Pass
from stg_trt.models.perturbation import MODES
from stg_trt.models.plan import plan_step
from stg_trt.models.segment import LAYOUTS, TEXT, Segment, cut
from stg_trt.models.text import TextCondition
from stg_trt.runtime.bound_plan import BoundPlan
from stg_trt.runtime.device import Cpu
from stg_trt.runtime.state import StepBuffers, find_ping_pong
from tests.support.eager_engine import EagerEngine
from tests.support.eager_reference import perturbed
from tests.support.family_cases import CASES, TIMESTEP, FamilyCase
from tests.support.passes import UNCOND_COND, skip_pass

BLOCK_SETS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "first": lambda count: (0,),
    "last": lambda count: (count - 1,),
    "apart": lambda count: (1, 3),
    "ends": lambda count: (0, 1, count - 1),
    "all": lambda count: tuple(range(count)),
}
FRAME_RATE = 25.0
VIDEOS = 2
# Uncond, cond and up to three skip passes.
GROUPS = 5
CPU = torch.device("cpu")
Reference = Callable[[str, tuple[int, ...]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def family(case: FamilyCase) -> ModelFamily:
    return case.family


@pytest.fixture(scope="module")
def cut_model(case: FamilyCase) -> Any:
    return case.checkpoint.load_transformer()


@pytest.fixture(scope="module")
def diffusers_model(case: FamilyCase) -> Any:
    model = case.model_class.from_pretrained(case.goldens, subfolder="transformer")
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def reference(case: FamilyCase, diffusers_model: Any) -> Reference:
    """The passes of the diffusers model with perturbed blocks, each run once."""
    plain = {
        "uncond": predict(case, diffusers_model, VIDEOS, case.text(VIDEOS, seed=1)),
        "cond": predict(case, diffusers_model, VIDEOS, case.text(VIDEOS)),
    }

    @cache
    def passes(mode: str, blocks: tuple[int, ...]) -> dict[str, Tensor]:
        with perturbed(diffusers_model, mode, blocks, case.video):
            return plain | {"skip": predict(case, diffusers_model, VIDEOS, case.text(VIDEOS))}

    return passes


@pytest.fixture(params=BLOCK_SETS)
def blocks(request: pytest.FixtureRequest, family: ModelFamily) -> tuple[int, ...]:
    return BLOCK_SETS[request.param](family.num_blocks)


def segments_of(family: ModelFamily, layout: str, mode: str, blocks: Sequence[int]) -> tuple[Segment, ...]:
    return cut(layout, family.num_blocks, mode, tuple(blocks))


def with_text(family: ModelFamily, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """The segment that runs once per call, if the family has one, and the others."""
    return (TEXT, *segments) if family.has_text_segment else tuple(segments)


@torch.no_grad()
def predict(case: FamilyCase, model: Any, rows: int, condition: TextCondition) -> Tensor:
    """One pass of the diffusers model."""
    return case.predict(model, case.latents(rows), condition)


@torch.no_grad()
def chained(case: FamilyCase, model: Any, segments: Sequence[Segment], condition: TextCondition) -> Tensor:
    """The segments one after the other, each given what its borders name."""
    rows = len(condition.embeds)
    state = {
        **case.family.constants(condition, case.workload, FRAME_RATE),
        "latents": case.latents(rows),
        "timestep": torch.full((rows,), TIMESTEP),
        "keep_attention": torch.ones(rows, dtype=torch.bool),
    }
    for segment in with_text(case.family, segments):
        module = case.family.module(model, segment, expand_masks=False)
        outputs = module(*(state[name] for name in module.inputs))
        state |= dict(zip(module.outputs, outputs, strict=True))
    return state["pred"]


@pytest.mark.parametrize("mode", MODES)
def test_the_cut_chain_is_the_diffusers_model(
    case: FamilyCase, cut_model: Any, diffusers_model: Any, blocks: tuple[int, ...], mode: str
) -> None:
    expected = predict(case, diffusers_model, 3, case.text(3))
    segments = segments_of(case.family, "segmented", mode, blocks)
    difference = chained(case, cut_model, segments, case.text(3)) - expected
    assert difference.abs().max() <= case.rounding
    assert expected.std() > 0.1


def test_one_segment_is_the_diffusers_model(case: FamilyCase, cut_model: Any, diffusers_model: Any) -> None:
    expected = predict(case, diffusers_model, 3, case.text(3))
    got = chained(case, cut_model, segments_of(case.family, "segmented", "stg-r", ()), case.text(3))
    assert (got - expected).abs().max() <= case.rounding


def engines(family: ModelFamily, model: Any, segments: Sequence[Segment]) -> dict[str, EagerEngine]:
    modules = {s.name: family.module(model, s, expand_masks=False) for s in with_text(family, segments)}
    return {name: EagerEngine(module) for name, module in modules.items()}


def poisoned_buffers(case: FamilyCase, segments: Sequence[Segment]) -> StepBuffers:
    """Buffers in which a value that is read before it was written shows."""
    specs = list(case.family.tensors(case.workload).values())
    buffers = StepBuffers(specs, find_ping_pong(segments, case.family.borders), VIDEOS, CPU, GROUPS)
    for spec in specs:
        if spec.torch_dtype.is_floating_point:
            for turn in (0, 1):
                buffers.view(spec.name, turn=turn).fill_(torch.nan)
    return buffers


@torch.no_grad()
def run_step(
    case: FamilyCase,
    model: Any,
    segments: Sequence[Segment],
    passes: tuple[Pass, ...],
) -> dict[str, Tensor]:
    """A plan over eager engines: the prediction of every pass."""
    family = case.family
    loaded, buffers = engines(family, model, segments), poisoned_buffers(case, segments)
    stacked = TextCondition.stacked([case.text(VIDEOS, seed=1), *[case.text(VIDEOS)] * (GROUPS - 1)])
    for name, tensor in family.constants(stacked, case.workload, FRAME_RATE).items():
        buffers.view(name).copy_(tensor)
    if family.has_text_segment:
        context = loaded["text"].context()
        for name in itertools.chain(*family.borders(TEXT)):
            context.bind(name, buffers.view(name))
        context.enqueue(0)
    plan = plan_step(segments, passes)
    for one in passes:
        buffers.view("latents", plan.groups([one])).copy_(case.latents(VIDEOS))
    buffers.view("timestep").fill_(TIMESTEP)
    bound = BoundPlan(plan, loaded, buffers, family.borders, Cpu())
    bound.enqueue()
    first = {one.name: buffers.view("pred", plan.groups([one])).clone() for one in passes}
    bound.enqueue()
    assert all(torch.equal(buffers.view("pred", plan.groups([one])), first[one.name]) for one in passes)
    return first


@pytest.mark.parametrize("plain", [UNCOND_COND, (COND,)], ids=len)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_the_full_passes_of_the_reference(
    case: FamilyCase,
    cut_model: Any,
    reference: Reference,
    blocks: tuple[int, ...],
    mode: str,
    layout: str,
    plain: tuple[Pass, ...],
) -> None:
    segments = segments_of(case.family, layout, mode, blocks)
    got = run_step(case, cut_model, segments, (*plain, skip_pass(mode, blocks)))
    check_passes(case, got, reference(mode, blocks))


@pytest.mark.parametrize("blocks", [(1,), (3,), (1, 3)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_one_cut_serves_every_subset_of_its_blocks(
    case: FamilyCase, cut_model: Any, reference: Reference, mode: str, blocks: tuple[int, ...]
) -> None:
    segments = segments_of(case.family, "segmented", "stg-a", (1, 3))
    got = run_step(case, cut_model, segments, (*UNCOND_COND, skip_pass(mode, blocks)))
    check_passes(case, got, reference(mode, blocks))


# Passes that leave the prefix at two places, and at one; one whose second block lies behind the other's only
# one, and two that stg-r skips at different blocks between which both are computed.
SEVERAL = [
    [("stg-a", (1,)), ("stg-a", (3,))],
    [("stg-r", (3,)), ("stg-r", (1,))],
    [("stg-a", (1, 3)), ("stg-r", (1,))],
    [("stg-r", (1, 3)), ("stg-r", (1,)), ("stg-a", (3,))],
    [("stg-r", (1,)), ("stg-r", (3,)), ("stg-r", (1, 3))],
]


@pytest.mark.parametrize("several", SEVERAL, ids=str)
def test_every_skip_pass_is_its_full_pass(
    case: FamilyCase, cut_model: Any, reference: Reference, several: list[tuple[str, tuple[int, ...]]]
) -> None:
    segments = segments_of(case.family, "segmented", "stg-a", (1, 3))
    skips = {f"skip_{i}": skip_pass(*skip, f"skip_{i}") for i, skip in enumerate(several)}
    got = run_step(case, cut_model, segments, (*UNCOND_COND, *skips.values()))
    for (mode, blocks), name in zip(several, skips, strict=True):
        expected = reference(mode, blocks)
        check_passes(case, {"uncond": got["uncond"], "cond": got["cond"], "skip": got[name]}, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("passes", [(COND,), UNCOND_COND], ids=len)
def test_a_step_without_stg(
    case: FamilyCase, cut_model: Any, reference: Reference, passes: tuple[Pass, ...], layout: str
) -> None:
    got = run_step(case, cut_model, segments_of(case.family, layout, "stg-a", (1, 3)), passes)
    check_passes(case, got, reference("stg-a", ()))


def check_passes(case: FamilyCase, got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every pass equals the reference's, and the skip pass is another than the conditional one."""
    for name, pred in got.items():
        assert (pred - expected[name]).abs().max() <= 2 * case.rounding, name
    if "skip" in got:
        assert (got["skip"] - got["cond"]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_the_reference_is_restored(case: FamilyCase, diffusers_model: Any, mode: str) -> None:
    before = predict(case, diffusers_model, 1, case.text(1))
    with perturbed(diffusers_model, mode, (1, 2), case.video):
        assert not torch.allclose(predict(case, diffusers_model, 1, case.text(1)), before)
    assert torch.equal(predict(case, diffusers_model, 1, case.text(1)), before)


def test_padded_text_changes_nothing(case: FamilyCase, cut_model: Any) -> None:
    condition = case.text(3)
    segments = segments_of(case.family, "segmented", "stg-a", (2,))
    plain = chained(case, cut_model, segments, condition)
    noise = 100 * torch.randn(condition.embeds.shape, generator=torch.Generator().manual_seed(9))
    padding = noise * (1 - condition.mask[:, :, None])
    other = replace(condition, embeds=condition.embeds + padding)
    assert torch.equal(chained(case, cut_model, segments, other), plain) == (case.padding != "kept")
    real = replace(condition, embeds=condition.embeds + noise * condition.mask[:, :, None])
    assert not torch.allclose(chained(case, cut_model, segments, real), plain)


def test_a_row_without_text(case: FamilyCase, cut_model: Any, diffusers_model: Any) -> None:
    condition = case.text(2)
    condition.mask[1] = 0
    expected = predict(case, diffusers_model, 2, condition)
    if expected.isnan().any():
        with pytest.raises(InvalidRequest, match="prompt_attention_mask: expected a real token in every row"):
            case.family.constants(condition, case.workload, FRAME_RATE)
        return
    got = chained(case, cut_model, segments_of(case.family, "segmented", "stg-r", (2,)), condition)
    # Beside a bias of -10000 float32 keeps three digits of a score.
    assert (got - expected).abs().max() <= 100 * case.rounding


@pytest.mark.parametrize("frame_rate", [1.0, 24.0, 25.0, 30.0])
def test_position_tables_are_those_of_diffusers(
    case: FamilyCase, diffusers_model: Any, frame_rate: float
) -> None:
    for sizes, grid in case.table_sizes:
        workload = replace(case.workload, **sizes)
        constants = case.family.constants(case.text(1), workload, frame_rate)
        for name, table in case.tables(diffusers_model, grid, frame_rate).items():
            found = constants[name].repeat_interleave(2, -1) if "rope" in name else constants[name]
            assert torch.equal(found, table), name


def test_what_becomes_of_padding(case: FamilyCase) -> None:
    """Masked additively over keys, of which the text's are the last; or zeros; or text as any other."""
    condition = case.text(2)
    constants = case.family.constants(condition, case.workload, FRAME_RATE)
    if case.padding == "masked":
        video, text = constants[case.mask_name].split([constants[case.mask_name].shape[-1] - 9, 9], dim=-1)
        assert torch.equal(text[:, 0, 0] == 0, condition.mask == 1)
        assert set(text.unique().tolist()) == {0.0, -10000.0} and not video.any()
    elif case.padding == "zeroed":
        real = constants["prompt_embeds"].abs().sum(dim=2) > 0
        assert torch.equal(real, condition.mask == 1)
    else:
        assert torch.equal(constants["prompt_embeds"], condition.embeds)


@pytest.mark.parametrize(
    ("one", "changes"), [(one, changes) for one in CASES for changes in one.variants], ids=str
)
def test_variants_that_are_the_family(one: FamilyCase, changes: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(one.goldens / "scheduler", tmp_path / "scheduler")
    torch.manual_seed(0)
    model = one.model_class.from_config(one.checkpoint.transformer_config | changes).eval()
    model.save_pretrained(tmp_path / "transformer")
    variant = replace(one, goldens=tmp_path)
    cut_model = variant.checkpoint.load_transformer()
    segments = segments_of(variant.family, "segmented", "stg-a", (0, 2))
    got = chained(variant, cut_model, segments, variant.text(3))
    assert (got - predict(variant, model, 3, variant.text(3))).abs().max() <= one.rounding


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_borders_have_the_shapes_and_dtypes_that_are_said(
    case: FamilyCase, blocks: tuple[int, ...], precision: str
) -> None:
    family, workload = case.family, replace(case.workload, precision=precision)
    model = case.checkpoint.load_transformer()
    cuts = [segments_of(family, *kind, blocks) for kind in (("segmented", "stg-a"), ("twin", "stg-r"))]
    for segment in with_text(family, [*cuts[0], *cuts[1]]):
        module = family.module(model, segment, expand_masks=False)
        family.lower_precision(module, getattr(torch, workload.dtype))
        with torch.no_grad():
            outputs = module(*family.trace_inputs(segment, workload, 3))
        specs = family.outputs(segment, workload)
        assert [output.dtype for output in outputs] == [spec.torch_dtype for spec in specs]
        assert [tuple(output.shape) for output in outputs] == [spec.with_rows(3) for spec in specs]


def test_lower_precision_keeps_its_float32_islands(case: FamilyCase) -> None:
    family, model = case.family, case.checkpoint.load_transformer()
    (segment,) = segments_of(family, "segmented", "stg-a", ())
    module = family.module(model, segment, expand_masks=False)
    expected = module(*family.trace_inputs(segment, case.workload, 2))[0]
    family.lower_precision(module, torch.bfloat16)
    wide = {name for name, parameter in module.named_parameters() if parameter.dtype == torch.float32}
    narrow = {name for name, _ in module.named_parameters()} - wide
    assert all(word in "".join(sorted(wide)) for word in case.wide)
    assert {name.rsplit(".", 2)[-2] for name in narrow} >= case.narrow
    lowered = module(*family.trace_inputs(segment, replace(case.workload, precision="bf16"), 2))[0].float()
    assert torch.cosine_similarity(lowered.flatten(), expected.flatten(), dim=0) > 0.999
