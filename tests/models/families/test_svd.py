"""The cut UNet of Stable Video Diffusion against diffusers', both eager, on the goldens' weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stg_trt.build_engines.pieces import pieces_of
from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.svd import SVD
from stg_trt.models.image import ImageCondition, ImageOptions, Images
from stg_trt.models.passes import COND, UNCOND, Pass
from stg_trt.models.perturbation import MODES
from stg_trt.models.plan import full_plan, plan_step
from stg_trt.models.segment import LAYOUTS, Segment
from stg_trt.models.tensor_spec import kept_name
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload
from stg_trt.runtime.bound_plan import BoundPlan
from stg_trt.runtime.device import Cpu
from stg_trt.runtime.state import StepBuffers, find_ping_pong, find_unforked
from tests.support.eager_engine import EagerEngine
from tests.support.eager_svd import Call, perturbed
from tests.support.passes import UNCOND_COND, skip_pass
from tests.support.tiny_svd import SVD as GOLDEN

SIZE = Workload(64, 64, 4, 0)
# Height and width that halving rounds up.
UNEVEN = Workload(72, 56, 3, 0)
TIMESTEP = 1.25
VIDEOS = 2
GROUPS = 5
ROUNDING = 1e-5
BLOCK_SETS = [(0,), (1,), (2, 3), (4, 5), (7,), (0, 3, 4), (1, 2, 6), tuple(range(8))]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(GOLDEN)


@pytest.fixture(scope="module")
def family(checkpoint: Checkpoint) -> SVD:
    found = checkpoint.family
    assert isinstance(found, SVD)
    return found


@pytest.fixture(scope="module")
def cut_model(checkpoint: Checkpoint) -> Any:
    return checkpoint.load_transformer()


@cache
def unet() -> Any:
    return UNetSpatioTemporalConditionModel.from_pretrained(GOLDEN, subfolder="unet").eval()


@cache
def call_of(workload: Workload = SIZE) -> Call:
    """Another picture and other latents for each video."""
    generator = torch.Generator().manual_seed(5)
    height, width = workload.height // 8, workload.width // 8
    return Call(
        torch.randn(VIDEOS, 1, 24, generator=generator),
        torch.randn(VIDEOS, 4, height, width, generator=generator),
        torch.randn(VIDEOS, workload.num_frames, 4, height, width, generator=generator),
    )


@cache
def reference(one: Pass, workload: Workload = SIZE) -> Tensor:
    """A pass of the diffusers model."""
    call, timestep = call_of(workload), torch.tensor(TIMESTEP)
    with torch.no_grad(), perturbed(unet(), one.perturbation):
        return call.predict(unet(), call.latents, timestep, seen=one != UNCOND)


def condition(family: SVD, workload: Workload) -> ImageCondition:
    call = call_of(workload)
    channels = call.image_latents[:, None].expand(-1, workload.num_frames, -1, -1, -1)
    scalars = torch.tensor([[127.0, 0.02]]).repeat(VIDEOS, 1)
    return ImageCondition(channels, call.image_embeddings, scalars)


@torch.no_grad()
def run_step(
    family: SVD,
    model: Any,
    segments: Sequence[Segment],
    passes: Sequence[Pass],
    workload: Workload = SIZE,
) -> dict[str, Tensor]:
    """A plan over eager engines, in memory where what is read before it was written shows."""
    plan = plan_step(segments, passes)
    specs = list(family.tensors(workload).values())
    buffers = StepBuffers(
        specs,
        find_ping_pong(segments, family.borders),
        VIDEOS,
        torch.device("cpu"),
        GROUPS,
        find_unforked(segments, family.borders),
    )
    for spec in specs:
        if spec.torch_dtype.is_floating_point:
            for turn in (0, 1):
                buffers.view(spec.name, turn=turn).fill_(torch.nan)
    seen = condition(family, workload)
    unseen = family.constants(TextCondition.none(VIDEOS), workload, 7.0, family.uncond_image(seen))
    for name, tensor in family.constants(TextCondition.none(VIDEOS), workload, 7.0, seen).items():
        rows = (tensor,) if name == "fps" else (unseen[name], *[tensor] * (GROUPS - 1))
        buffers.view(name).copy_(torch.cat(rows))
    for one in plan.passes:
        buffers.view("latents", plan.groups([one])).copy_(call_of(workload).latents)
    buffers.view("timestep").fill_(TIMESTEP)
    engines = {s.name: EagerEngine(family.module(model, s, expand_masks=False)) for s in segments}
    bound = BoundPlan(plan, engines, buffers, family.borders, Cpu())
    bound.enqueue()
    first = {one.name: buffers.view("pred", plan.groups([one])).clone() for one in plan.passes}
    bound.enqueue()
    assert all(torch.equal(buffers.view("pred", plan.groups([one])), first[one.name]) for one in plan.passes)
    return first


def check(got: dict[str, Tensor], passes: Sequence[Pass], workload: Workload = SIZE) -> None:
    """Every pass is the diffusers model's, and no skip pass is cond."""
    for one in passes:
        assert (got[one.name] - reference(one, workload)).abs().max() <= ROUNDING, one
        assert not one.is_skip or (got[one.name] - got["cond"]).abs().max() > 1e-3


def test_a_picture_matters() -> None:
    assert (reference(UNCOND) - reference(COND)).abs().max() > 0.1
    assert reference(COND).std() > 0.1


@pytest.mark.parametrize("plain", [UNCOND_COND, (COND,)], ids=len)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", BLOCK_SETS, ids=str)
def test_a_step_is_the_full_passes_of_the_reference(
    family: SVD, cut_model: Any, blocks: tuple[int, ...], mode: str, layout: str, plain: tuple[Pass, ...]
) -> None:
    passes = (*plain, skip_pass(mode, blocks))
    check(run_step(family, cut_model, family.segments(layout, mode, blocks), passes), passes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", [(), (4, 5), (0, 1, 7)], ids=str)
def test_a_step_without_stg(family: SVD, cut_model: Any, blocks: tuple[int, ...], mode: str) -> None:
    segments = family.segments("segmented", mode, blocks)
    for passes in ((COND,), UNCOND_COND):
        check(run_step(family, cut_model, segments, passes), passes)


@pytest.mark.parametrize("mode", MODES)
def test_sizes_that_halving_rounds_up(family: SVD, cut_model: Any, mode: str) -> None:
    passes = (*UNCOND_COND, skip_pass(mode, (1, 4)))
    segments = family.segments("segmented", mode, (1, 4))
    check(run_step(family, cut_model, segments, passes, UNEVEN), passes, UNEVEN)


# The kinds apart in one attention module, in any order; passes that leave in the encoder, in the middle and
# in the decoder, so that what the encoder gives has two, three or four rows; both modes beside each other.
APART = (skip_pass("stg-a", (4,), "spatial"), skip_pass("stg-a", (5,), "temporal"))
SEVERAL = [
    [("stg-a", (4,)), ("stg-a", (5,))],
    [("stg-r", (4,)), ("stg-r", (5,))],
    [("stg-a", (5,)), ("stg-a", (4, 7))],
    [("stg-a", (0,)), ("stg-a", (3,)), ("stg-a", (6,))],
    [("stg-r", (1,)), ("stg-a", (2, 5)), ("stg-r", (0, 7))],
    [("stg-a", (4, 5)), ("stg-r", (4,))],
]


@pytest.mark.parametrize("plain", [UNCOND_COND, (COND,)], ids=len)
@pytest.mark.parametrize("several", SEVERAL, ids=str)
def test_every_skip_pass_is_its_full_pass(
    family: SVD, cut_model: Any, several: list[tuple[str, tuple[int, ...]]], plain: tuple[Pass, ...]
) -> None:
    """On engines that stg-a was built for, which do stg-r too."""
    blocks = tuple(sorted({block for _, perturbs in several for block in perturbs}))
    passes = (*plain, *(skip_pass(*one, f"skip_{i}") for i, one in enumerate(several)))
    check(run_step(family, cut_model, family.segments("segmented", "stg-a", blocks), passes), passes)


def test_nothing_that_the_encoder_gives_is_copied(family: SVD) -> None:
    """It has two rows per video before a fork, and the decoder reads them by an index."""
    segments = family.segments("segmented", "stg-a", (4, 5))
    assert find_unforked(segments, family.borders) == {"skip_0"}
    for segment in segments:
        inputs = {spec.name: spec for spec in family.inputs(segment, SIZE)}
        for name in filter(None, map(kept_name, inputs)):
            assert inputs[name].shape[0] == f"rows_of_{name}"
    plan = plan_step(segments, (*UNCOND_COND, *APART))
    rows = {run.segment.name: len(run.passes) for run in plan.runs}
    # The temporal pass shares the spatial half of its attention module too.
    assert rows == {"front": 2, "block_4": 3, "block_5": 4, "back": 4}


def test_the_pieces_of_a_segment_are_the_segment(family: SVD, cut_model: Any) -> None:
    segments = family.segments("segmented", "stg-a", (1, 4))
    generator = torch.Generator().manual_seed(3)
    for segment in (*segments, *family.segments("twin", "stg-r", (1, 4))):
        whole = family.module(cut_model, segment, expand_masks=False)
        given = {spec.name: spec.random(2, generator) for spec in family.inputs(segment, SIZE)}
        given |= {name: torch.tensor([1, 0]) for name in given if kept_name(name)}
        state = dict(given)
        with torch.no_grad():
            expected = whole(*given.values())
            for piece in pieces_of(segment):
                module = family.module(cut_model, piece, expand_masks=False)
                made = module(*(state[name] for name in module.inputs))
                state |= dict(zip(module.outputs, made, strict=True))
        for name, tensor in zip(whole.outputs, expected, strict=True):
            assert torch.equal(state[name], tensor), (segment.name, name)


@pytest.mark.slow(reason="runs the segments of a UNet in two precisions")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("blocks", [(0, 3), (4, 5), (7,)], ids=str)
def test_borders_have_the_shapes_and_dtypes_that_are_said(
    checkpoint: Checkpoint, family: SVD, blocks: tuple[int, ...], precision: str
) -> None:
    workload, model = replace(UNEVEN, precision=precision), checkpoint.load_transformer()
    for segment in (
        *family.segments("segmented", "stg-a", blocks),
        *family.segments("twin", "stg-r", blocks),
    ):
        module = family.module(model, segment, expand_masks=False)
        family.lower_precision(module, getattr(torch, workload.dtype))
        with torch.no_grad():
            outputs = module(*family.trace_inputs(segment, workload, 3))
        specs = family.outputs(segment, workload)
        assert [output.dtype for output in outputs] == [spec.torch_dtype for spec in specs]
        assert [tuple(output.shape) for output in outputs] == [spec.with_rows(3) for spec in specs]


def test_weights_belong_to_one_block(checkpoint: Checkpoint, family: SVD) -> None:
    """A segment loads its own blocks alone, and needs no others."""
    for segment in family.segments("segmented", "stg-a", (1, 4, 6)):
        model = checkpoint.load_transformer(segment.blocks)
        module = family.module(model, segment, expand_masks=False)
        assert not any(weight.is_meta for weight in module.parameters())
    alone = checkpoint.load_transformer([4])
    meta = {name for name, weight in alone.named_parameters() if weight.is_meta}
    assert {family.block_of(name) for name in meta} == {0, 1, 2, 3, 5, 6, 7}


@pytest.mark.slow(reason="runs a whole UNet of published size on the meta device")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_segments_cost_what_torch_counts(mode: str, layout: str) -> None:
    """Counted at full width, without memory for the weights."""
    family = Checkpoint.open("svd", random_weights=True).family
    workload = Workload(576, 1024, 14, 0)
    with torch.device("meta"):
        model = UNetSpatioTemporalConditionModel.from_config(family.config).to("meta")
    for segment in family.segments(layout, mode, (1, 4, 14)):
        # Without inputs for rows, whose products with V are done for all.
        segment = replace(segment, keep_input=False, stg_r_inside=bool(segment.skipped))
        module = family.module(model, segment, expand_masks=False)
        specs = family.inputs(segment, workload)
        inputs = [torch.zeros(spec.with_rows(1), dtype=spec.torch_dtype, device="meta") for spec in specs]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*inputs)
        assert counter.get_total_flops() == family.segment_flops(segment, workload), segment.name


@pytest.mark.parametrize(("name", "frames", "teraflops"), [("svd", 14, 44.8), ("svd-xt", 25, 80.0)])
def test_costs_of_the_published_models(name: str, frames: int, teraflops: float) -> None:
    """diffusers' whole UNet takes `teraflops`; ours leaves out queries of the picture's one token."""
    family = Checkpoint.open(name, random_weights=True).family
    assert isinstance(family, SVD) and family.num_blocks == 32
    workload = Workload(576, 1024, frames, 0)
    assert family.defaults.stg_blocks == {"spatial": (14,), "temporal": (15,)}
    segments = family.segments("segmented", "stg-a", (14, 15))
    flops = {segment.name: family.segment_flops(segment, workload) for segment in segments}
    whole = sum(flops.values())
    # norm2 and to_q of every token, and to_out, once a block: 4*width^2 per token and block.
    layers = [family.unet.layers[place] for place in family.unet.blocks]
    tokens = [frames * (72 >> layer.level) * (128 >> layer.level) for layer in layers]
    queries = sum(2 * 2 * count * layer.channels**2 for count, layer in zip(tokens, layers, strict=True))
    assert (whole + queries) / 1e12 == pytest.approx(teraflops, rel=0.01)
    assert flops["front"] / whole == pytest.approx(0.403, abs=0.01)
    passes = (*UNCOND_COND, skip_pass("stg-a", (14,), "spatial"), skip_pass("stg-a", (15,), "temporal"))
    shared, full = (make(segments, passes).flops(lambda s: flops[s.name]) for make in (plan_step, full_plan))
    assert shared / full == pytest.approx(0.799, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"in_channels": 4},
            "in_channels 8 in unet/config.json, as in every published model, got 4",
        ),
        ({"transformer_layers_per_block": 2}, "expected transformer_layers_per_block 1 in unet/config.json"),
        ({"layers_per_block": [1, 2]}, "expected layers_per_block in unet/config.json as a positive integer"),
    ],
)
def test_configurations_that_are_no_published_models(changes: dict[str, Any], message: str) -> None:
    config = json.loads((GOLDEN / "unet" / "config.json").read_text())
    with pytest.raises(InvalidRequest, match=message):
        SVD(config | changes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"height": 60}, "height: expected a positive multiple of 8, got 60: use 64"),
        ({"width": 0}, "width: expected a positive multiple of 8, got 0: use 8"),
        ({"num_frames": 0}, "num_frames: expected at least 1, got 0: use 4"),
        ({"text_length": 9}, "text_length: expected 0 for svd, which reads no text, got 9: leave it out"),
    ],
)
def test_sizes_that_the_model_cannot_have(family: SVD, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        family.check(replace(SIZE, **sizes))


@pytest.mark.parametrize("pictures", [1, 2])
def test_what_is_given_instead_of_pictures_is_repeated_for_their_videos(family: SVD, pictures: int) -> None:
    call = call_of()
    options = ImageOptions(call.image_embeddings, call.image_latents[:pictures], motion_bucket_id=9)
    found = family.given_images(Images(options=options), SIZE, 4)
    assert found.channels is not None and found.context is not None and found.scalars is not None
    places = [0, 0, 1, 1]
    assert torch.equal(found.context, call.image_embeddings[places])
    latents = call.image_latents[places] if pictures == 2 else call.image_latents[[0] * 4]
    assert torch.equal(found.channels, latents[:, None].expand(-1, 4, -1, -1, -1))
    assert torch.equal(found.scalars, torch.tensor([[9.0, 0.02]] * 4))
