"""The cut model against the uncut one of diffusers, both eager, on the weights of the goldens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor

from stg_trt.checkpoint import Checkpoint
from stg_trt.errors import InvalidRequest
from stg_trt.families.base import ModelFamily, SegmentModule, TextCondition, Workload
from stg_trt.perturbation import MODES, Perturbation
from stg_trt.segment import LAYOUTS, TEXT, Segment, cut, engine_outputs
from stg_trt.step_plan import GROUPS, plan_step
from stg_trt.step_runner import StepBuffers, StepRunner, two_sided
from tests.eager_reference import perturbed

WORKLOAD = Workload(128, 160, 17, text_length=9)
BLOCK_SETS: list[tuple[int, ...]] = [(0,), (4,), (1, 3), (0, 1, 4), (0, 1, 2, 3, 4)]
FRAME_RATE = 24.0
VIDEOS = 2
TIMESTEP = 731.0


@pytest.fixture(scope="module")
def checkpoint(ltx_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(ltx_checkpoint)


@pytest.fixture(scope="module")
def family(checkpoint: Checkpoint) -> ModelFamily:
    return checkpoint.family


@pytest.fixture(scope="module")
def cut_model(checkpoint: Checkpoint) -> Any:
    return checkpoint.load_transformer()


@pytest.fixture(scope="module")
def uncut_model(ltx_checkpoint: Path) -> Any:
    model = LTXVideoTransformer3DModel.from_pretrained(ltx_checkpoint, subfolder="transformer")
    return model.eval().requires_grad_(False)


class EagerEngine:
    """A segment's torch module behind the protocol of engines."""

    alignment = 1

    def __init__(self, module: SegmentModule) -> None:
        self.module = module

    def context(self) -> EagerContext:
        return EagerContext(self.module)


class EagerContext:
    """Runs the module on bound tensors; outputs have exactly their shape and dtype, and are no input too."""

    def __init__(self, module: SegmentModule) -> None:
        self.module = module
        self.bound: dict[str, Tensor] = {}

    def bind(self, name: str, tensor: Tensor) -> None:
        self.bound[name] = tensor

    def enqueue(self, stream: int) -> None:
        names = engine_outputs(self.module.inputs, self.module.outputs)
        for name in names:
            self.bound[name].fill_(torch.nan)
        outputs = self.module(*(self.bound[name] for name in self.module.inputs))
        for name, output in zip(names, outputs, strict=True):
            assert output.shape == self.bound[name].shape and output.dtype == self.bound[name].dtype
            self.bound[name].copy_(output)


def text(rows: int, seed: int = 0) -> TextCondition:
    """Embeddings of which each row has another number of real tokens."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(rows, WORKLOAD.text_length, 24, generator=generator)
    mask = (torch.arange(WORKLOAD.text_length) < torch.arange(3, 3 + rows)[:, None]).float()
    return TextCondition(embeds, mask)


def latents(rows: int) -> Tensor:
    return torch.randn(rows, 60, 8, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def uncut(model: Any, x: Tensor, condition: TextCondition) -> Tensor:
    """One pass of the diffusers model, with the arguments its pipeline passes."""
    output: Tensor = model(
        hidden_states=x,
        encoder_hidden_states=condition.embeds,
        timestep=torch.full((len(x),), TIMESTEP),
        encoder_attention_mask=condition.mask,
        num_frames=3,
        height=4,
        width=5,
        rope_interpolation_scale=(8 / FRAME_RATE, 32, 32),
        return_dict=False,
    )[0]
    return output


@torch.no_grad()
def chained(
    family: ModelFamily, model: Any, segments: Sequence[Segment], x: Tensor, condition: TextCondition
) -> Tensor:
    """The segments one after the other, each given what its borders name."""
    state = {
        **family.constants(condition, WORKLOAD, FRAME_RATE),
        "latents": x,
        "timestep": torch.full((len(x),), TIMESTEP),
        "keep_attention": torch.ones(len(x), dtype=torch.bool),
    }
    for segment in (TEXT, *segments):
        module = family.module(model, segment, expand_masks=False)
        outputs = module(*(state[name] for name in module.inputs))
        state |= dict(zip(module.outputs, outputs, strict=True))
    return state["pred"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", [(), *BLOCK_SETS], ids=str)
def test_the_cut_chain_is_the_uncut_model(
    family: ModelFamily, cut_model: Any, uncut_model: Any, blocks: tuple[int, ...], mode: str
) -> None:
    segments = cut("segmented", 5, mode, blocks)
    expected = uncut(uncut_model, latents(3), text(3))
    assert (chained(family, cut_model, segments, latents(3), text(3)) - expected).abs().max() <= 1e-6
    assert expected.std() > 0.1


def engines(family: ModelFamily, model: Any, segments: Sequence[Segment]) -> dict[str, EagerEngine]:
    modules = {s.name: family.module(model, s, expand_masks=False) for s in (TEXT, *segments)}
    return {name: EagerEngine(module) for name, module in modules.items()}


def poisoned_buffers(family: ModelFamily, segments: Sequence[Segment]) -> StepBuffers:
    """Buffers where whatever is read before it was written shows."""
    specs = list(family.tensors(WORKLOAD).values())
    buffers = StepBuffers(specs, two_sided(segments, family.borders), VIDEOS, torch.device("cpu"))
    for spec in specs:
        if spec.dtype != "bool":
            for side in (0, 1):
                buffers.view(spec.name, side=side).fill_(torch.nan)
    return buffers


@torch.no_grad()
def run_step(
    family: ModelFamily,
    model: Any,
    segments: Sequence[Segment],
    passes: tuple[str, ...],
    perturbation: Perturbation | None,
) -> dict[str, Tensor]:
    """A plan over eager engines: the prediction of every pass."""
    loaded, buffers = engines(family, model, segments), poisoned_buffers(family, segments)
    conditions = {"uncond": text(VIDEOS, seed=1), "cond": text(VIDEOS), "skip": text(VIDEOS)}
    stacked = TextCondition(
        torch.cat([conditions[group].embeds for group in GROUPS]),
        torch.cat([conditions[group].mask for group in GROUPS]),
    )
    for name, tensor in family.constants(stacked, WORKLOAD, FRAME_RATE).items():
        buffers.view(name).copy_(tensor)
    context = loaded["text"].context()
    for name in ("prompt_embeds", "text"):
        context.bind(name, buffers.view(name))
    context.enqueue(0)
    for group in passes:
        buffers.view("latents", (group,)).copy_(latents(VIDEOS))
    buffers.view("timestep").fill_(TIMESTEP)
    runner = StepRunner(plan_step(segments, passes, perturbation), loaded, buffers, family.borders)
    runner.enqueue()
    first = {group: buffers.view("pred", (group,)).clone() for group in passes}
    runner.enqueue()
    assert all(torch.equal(buffers.view("pred", (group,)), first[group]) for group in passes)
    return first


@pytest.mark.parametrize("passes", [GROUPS, ("cond", "skip")], ids="+".join)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", BLOCK_SETS, ids=str)
def test_a_step_is_the_full_passes_of_the_reference(
    family: ModelFamily,
    cut_model: Any,
    uncut_model: Any,
    blocks: tuple[int, ...],
    mode: str,
    layout: str,
    passes: tuple[str, ...],
) -> None:
    segments = cut(layout, 5, mode, blocks)
    got = run_step(family, cut_model, segments, passes, Perturbation(mode, blocks))
    check_passes(got, uncut_model, mode, blocks)


@pytest.mark.parametrize("blocks", [(1,), (3,), (1, 3)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_one_cut_serves_every_subset_of_its_blocks(
    family: ModelFamily, cut_model: Any, uncut_model: Any, mode: str, blocks: tuple[int, ...]
) -> None:
    segments = cut("segmented", 5, "stg-a", (1, 3))
    got = run_step(family, cut_model, segments, GROUPS, Perturbation(mode, blocks))
    check_passes(got, uncut_model, mode, blocks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("passes", [("cond",), ("uncond", "cond")], ids="+".join)
def test_a_step_without_stg(
    family: ModelFamily, cut_model: Any, uncut_model: Any, passes: tuple[str, ...], layout: str
) -> None:
    got = run_step(family, cut_model, cut(layout, 5, "stg-a", (1, 3)), passes, None)
    check_passes(got, uncut_model, "stg-a", ())


def check_passes(got: dict[str, Tensor], model: Any, mode: str, blocks: Sequence[int]) -> None:
    """Every pass equals the reference's, and the skip pass is another than the conditional one."""
    expected = {
        "uncond": uncut(model, latents(VIDEOS), text(VIDEOS, seed=1)),
        "cond": uncut(model, latents(VIDEOS), text(VIDEOS)),
    }
    with perturbed(model, mode, blocks):
        expected["skip"] = uncut(model, latents(VIDEOS), text(VIDEOS))
    for name, pred in got.items():
        assert (pred - expected[name]).abs().max() <= 2e-6, name
    if "skip" in got:
        assert (got["skip"] - got["cond"]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_the_reference_is_restored(uncut_model: Any, mode: str) -> None:
    before = uncut(uncut_model, latents(1), text(1))
    with perturbed(uncut_model, mode, (1, 2)):
        assert not torch.allclose(uncut(uncut_model, latents(1), text(1)), before)
    assert torch.equal(uncut(uncut_model, latents(1), text(1)), before)


def test_padded_text_changes_nothing(family: ModelFamily, cut_model: Any) -> None:
    condition, segments = text(3), cut("segmented", 5, "stg-a", (2,))
    plain = chained(family, cut_model, segments, latents(3), condition)
    noise = 100 * torch.randn(condition.embeds.shape, generator=torch.Generator().manual_seed(9))
    padding = noise * (1 - condition.mask[:, :, None])
    other = TextCondition(condition.embeds + padding, condition.mask)
    assert torch.equal(chained(family, cut_model, segments, latents(3), other), plain)
    real = TextCondition(condition.embeds + noise * condition.mask[:, :, None], condition.mask)
    assert not torch.allclose(chained(family, cut_model, segments, latents(3), real), plain)


@pytest.mark.parametrize("frame_rate", [1.0, 24.0, 25.0, 30.0])
@pytest.mark.parametrize(("height", "width", "num_frames"), [(128, 160, 17), (32, 64, 1)])
def test_position_tables_are_those_of_diffusers(
    family: ModelFamily, uncut_model: Any, height: int, width: int, num_frames: int, frame_rate: float
) -> None:
    workload = Workload(height, width, num_frames, text_length=9)
    frames, rows, columns = (num_frames - 1) // 8 + 1, height // 32, width // 32
    scale = (8 / frame_rate, 32, 32)
    cos, sin = uncut_model.rope(torch.zeros(1, 1), frames, rows, columns, scale)
    constants = family.constants(text(1), workload, frame_rate)
    assert torch.equal(constants["rope_cos"], cos[0])
    assert torch.equal(constants["rope_sin"], sin[0])


def test_the_text_mask_is_additive_over_keys(family: ModelFamily) -> None:
    constants = family.constants(text(2), WORKLOAD, FRAME_RATE)
    assert torch.equal(constants["text_bias"][:, 0, 0] == 0, text(2).mask == 1)
    assert constants["text_bias"].shape == (2, 1, 1, 9)
    assert set(constants["text_bias"].unique().tolist()) == {0.0, -10000.0}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"height": 100}, "height: expected a positive multiple of 32, got 100: use 96"),
        ({"width": 0}, "width: expected a positive multiple of 32, got 0: use 32"),
        ({"width": -64}, "width: expected a positive multiple of 32, got -64: use 32"),
        ({"num_frames": 16}, r"num_frames: expected 8k\+1, got 16: use 17"),
        ({"num_frames": 0}, r"num_frames: expected 8k\+1, got 0: use 1"),
        ({"text_length": 0}, "text_length: expected a positive number of tokens, got 0: use 128"),
    ],
)
def test_sizes_that_the_model_cannot_have(family: ModelFamily, sizes: dict[str, int], message: str) -> None:
    size = {"height": 128, "width": 160, "num_frames": 17, "text_length": 9} | sizes
    with pytest.raises(InvalidRequest, match=message):
        family.check(Workload(**size))


def test_precisions_are_checked() -> None:
    with pytest.raises(InvalidRequest, match="precision: expected one of fp32, bf16, got 'fp16'"):
        Workload(128, 160, 17, 9, "fp16")


@pytest.mark.parametrize("name", ["ltx-video-2b", "ltx-video-13b"])
def test_sizes_the_published_models_have(name: str) -> None:
    published = Checkpoint.open(name, random_weights=True).family
    workload = Workload(704, 1216, 121, text_length=256)
    published.check(workload)
    assert published.latent_shape(workload) == (128, 16, 22, 38)
    assert published.tensors(workload)["latents"].with_rows(2) == (2, 13376, 128)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("blocks", [(0,), (4,), (1, 3)], ids=str)
def test_borders_have_the_shapes_and_dtypes_that_are_said(
    family: ModelFamily, checkpoint: Checkpoint, blocks: tuple[int, ...], precision: str
) -> None:
    workload = Workload(128, 160, 17, 9, precision)
    model = checkpoint.load_transformer()
    for segment in (TEXT, *cut("segmented", 5, "stg-a", blocks), *cut("twin", 5, "stg-r", blocks)):
        module = family.module(model, segment, expand_masks=False)
        family.lower_precision(module, getattr(torch, workload.dtype))
        with torch.no_grad():
            outputs = module(*family.trace_inputs(segment, workload, 3))
        specs = family.outputs(segment, workload)
        assert [output.dtype for output in outputs] == [spec.torch_dtype for spec in specs]
        assert [tuple(output.shape) for output in outputs] == [spec.with_rows(3) for spec in specs]


def test_lower_precision_keeps_its_float32_islands(family: ModelFamily, checkpoint: Checkpoint) -> None:
    model = checkpoint.load_transformer()
    (segment,) = cut("segmented", 5, "stg-a", ())
    module = family.module(model, segment, expand_masks=False)
    expected = module(*family.trace_inputs(segment, WORKLOAD, 2))[0]
    family.lower_precision(module, torch.bfloat16)
    wide = {name for name, parameter in module.named_parameters() if parameter.dtype == torch.float32}
    narrow = {name for name, _ in module.named_parameters()} - wide
    assert all(word in "".join(sorted(wide)) for word in ("time_embed", "scale_shift_table", "norm_q"))
    assert {name.rsplit(".", 2)[-2] for name in narrow} >= {"to_q", "to_k", "to_v", "proj_in", "proj_out"}
    lowered = module(*family.trace_inputs(segment, Workload(128, 160, 17, 9, "bf16"), 2))[0].float()
    assert torch.cosine_similarity(lowered.flatten(), expected.flatten(), dim=0) > 0.999
