"""LTX-2 and 2.3: Lightricks' goldens, guidance of two streams, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoAttnProcessor
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stg_trt import VideoPipeline, build
from stg_trt.cli.inspect import describe
from stg_trt.engines.store import EngineStore
from stg_trt.errors import EngineRejected, InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.defaults import Defaults
from stg_trt.models.families import family_for
from stg_trt.models.families.ltx2_prompts import connect
from stg_trt.models.passes import COND, ISOLATION, UNCOND, Pass
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.plan import full_plan, plan_step
from stg_trt.models.segment import LAYOUTS, Segment
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload
from tests.conftest import OnTwoRanks
from tests.support.golden_builds import LTX2 as FOLDERS
from tests.support.golden_builds import LTX2_BLOCK as BLOCK
from tests.support.golden_builds import LTX2_SIZES as SIZES

CASES = [
    ("2.0", "cfg"),
    ("2.0", "stg_modality_rescale"),
    ("2.3", "stg"),
    ("2.3", "stg_modality_rescale"),
]
WORKLOAD = Workload(**SIZES, audio_num_frames=18)
STREAMS = {"latents": "", "audio_latents": "audio_"}
Open = Callable[[str, str], VideoPipeline]
Latents = dict[str, Tensor]


@cache
def given(version: str, case: str) -> dict[str, Any]:
    """A golden's call, in LTX2Pipeline's names."""
    options = json.loads((FOLDERS[version] / f"{case}.json").read_text())
    tensors = load_file(FOLDERS[version] / f"{case}.safetensors")
    taken = ("latents", "audio_latents", "prompt_embeds", "prompt_attention_mask")
    names = (*taken, "negative_prompt_embeds", "negative_prompt_attention_mask")
    return {**options, **{name: tensors[name] for name in names}, "output_type": "latent"}


@pytest.fixture(scope="module")
def opened(ltx2_engines: Path) -> Open:
    return cache(
        lambda version, layout: VideoPipeline.from_pretrained(
            FOLDERS[version], ltx2_engines / version, layout=layout
        )
    )


def every_step(pipeline: VideoPipeline, call: dict[str, Any]) -> list[Latents]:
    """The latents of both streams after each step."""
    steps: list[Latents] = []

    def keep(pipe: Any, index: int, timestep: float, tensors: Latents) -> None:
        steps.append({name: tensor.clone() for name, tensor in tensors.items()})

    result = pipeline(**call, callback_on_step_end=keep)
    assert torch.equal(result.frames, steps[-1]["latents"])
    assert result.audio is not None and torch.equal(result.audio, steps[-1]["audio_latents"])
    return steps


def distance(one: Latents, other: Latents) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in STREAMS)


@pytest.mark.parametrize(("version", "case"), CASES)
def test_every_step_matches_in_both_layouts(opened: Open, version: str, case: str) -> None:
    expected = load_file(FOLDERS[version] / f"{case}.safetensors")
    for layout in LAYOUTS:
        steps = every_step(opened(version, layout), given(version, case))
        assert len(steps) == given(version, case)["num_inference_steps"]
        for i, latents in enumerate(steps):
            wanted = {name: expected[f"expected_{stream}step_{i:02d}"] for name, stream in STREAMS.items()}
            # A timestep's frequencies that an engine computes itself make 6e-5 of this.
            assert distance(latents, wanted) <= 2e-5, f"{layout}, step {i}"


@pytest.mark.parametrize(("version", "case"), CASES)
def test_two_ranks_are_one(opened: Open, on_two_ranks: OnTwoRanks, version: str, case: str) -> None:
    one, call = opened(version, "segmented"), given(version, case)
    alone, shared = (every_step(pipeline, call)[-1] for pipeline in (one, on_two_ranks(one)))
    assert distance(shared, alone) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_videos_equal_one_by_one(opened: Open, layout: str) -> None:
    call = given("2.3", "stg_modality_rescale")
    other = (
        call | {name: call[name].flip(1) for name in STREAMS} | {"prompt_embeds": 0.5 * call["prompt_embeds"]}
    )
    names = [name for name, value in call.items() if isinstance(value, Tensor)]
    both = call | {name: torch.cat([call[name], other[name]]) for name in names}
    together = every_step(opened("2.3", layout), both)[-1]
    apart = [every_step(opened("2.3", layout), one)[-1] for one in (call, other)]
    joined = {name: torch.cat([one[name] for one in apart]) for name in STREAMS}
    assert distance(together, joined) <= 1e-5
    assert distance(*apart) > 1e-2


OFF = {
    "guidance_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
}


@pytest.mark.parametrize("version", FOLDERS)
@pytest.mark.parametrize(
    "scales",
    [
        {"stg_scale": 1.0, "guidance_scale": 3.0},
        {"audio_stg_scale": 1.5},
        {"modality_scale": 2.0, "audio_guidance_scale": 4.0, "audio_guidance_rescale": 0.5},
        {"stg_scale": 1.0, "audio_stg_scale": 0.5, "audio_modality_scale": 2.0, "guidance_rescale": 0.7},
    ],
    ids=["video's STG", "sound's STG", "isolation", "both"],
)
def test_guidance_of_one_stream_leaves_the_other(
    opened: Open, version: str, scales: dict[str, float]
) -> None:
    call = given(version, "stg_modality_rescale") | OFF | scales
    ours = every_step(opened(version, "segmented"), call)
    assert distance(ours[-1], sampled(version, call)) <= 2e-5


def test_no_scale_of_the_sound_is_that_of_the_video(opened: Open) -> None:
    """As in diffusers' pipeline, whose own defaults are those of the sound when it is left out."""
    call = given("2.3", "stg") | OFF | {"guidance_scale": 2.0}
    same = call | {"audio_guidance_scale": 2.0}
    assert distance(*(last(opened, one) for one in (call | {"audio_guidance_scale": None}, same))) == 0
    left_out = {name: value for name, value in call.items() if name != "audio_guidance_scale"}
    usual = call | {"audio_guidance_scale": 7.0}
    assert distance(last(opened, left_out), last(opened, usual)) == 0


def last(opened: Open, call: dict[str, Any]) -> Latents:
    return every_step(opened("2.3", "segmented"), call)[-1]


def test_states_of_a_run_may_differ(opened: Open) -> None:
    """A pass that only some steps have changes no row of the others."""
    call = given("2.3", "stg_modality_rescale") | {"num_inference_steps": 3, "output_type": "latent"}
    scales = {
        "guidance_scale": [3.0, 1.0, 3.0],
        "modality_scale": [1.0, 2.0, 2.0],
        "stg_scale": [1.0, 1.0, 0.0],
    }
    sound = {f"audio_{name}": value for name, value in scales.items()}
    ours = last(opened, call | scales | sound)
    assert distance(ours, sampled("2.3", call | scales | sound)) <= 2e-5


@torch.no_grad()
def sampled(version: str, call: dict[str, Any]) -> Latents:
    """A loop over diffusers' transformer, with LTX2Pipeline's equations written out in x0's space."""
    checkpoint = Checkpoint.open(FOLDERS[version])
    family, scheduler = checkpoint.family, checkpoint.scheduler()
    # Without it diffusers perturbs nothing.
    model = family.network_class().from_pretrained(FOLDERS[version] / "transformer", perturbed_attn=True)
    family.set_timesteps(scheduler, call["num_inference_steps"], WORKLOAD)
    cond, uncond = (prompt(version, call, prefix) for prefix in ("", "negative_"))
    x = {name: call[name] for name in STREAMS}
    for i, (timestep, sigma) in enumerate(zip(scheduler.timesteps, scheduler.sigmas, strict=False)):
        now = {name: call[name][i] if isinstance(call[name], list) else call[name] for name in OFF}
        pred = partial(predicted, model, family, x, timestep, call["frame_rate"])
        streams = [n for n, stream in STREAMS.items() if now[f"{stream}stg_scale"] > 0]
        passes = {
            "cond": pred(cond),
            "uncond": pred(uncond),
            "skip": pred(cond, perturbed=tuple(streams)),
            "isolated": pred(cond, isolate_modalities=True),
        }
        for name, stream in STREAMS.items():
            clean = {one: x[name] - sigma * of_streams[name] for one, of_streams in passes.items()}
            guided = x0_guided(clean, now, stream)
            x[name] = x[name] + (scheduler.sigmas[i + 1] - sigma) * (x[name] - guided) / sigma
    return x


def x0_guided(clean: Latents, now: dict[str, Any], stream: str) -> Tensor:
    cond = clean["cond"]
    guided = cond + (now[f"{stream}guidance_scale"] - 1) * (cond - clean["uncond"])
    guided = guided + now[f"{stream}stg_scale"] * (cond - clean["skip"])
    guided = guided + (now[f"{stream}modality_scale"] - 1) * (cond - clean["isolated"])
    share = now[f"{stream}guidance_rescale"]
    rescaled: Tensor = guided * (share * cond.std() / guided.std() + 1 - share)
    return rescaled


def prompt(version: str, call: dict[str, Any], prefix: str) -> TextCondition:
    part = LTX2TextConnectors.from_pretrained(FOLDERS[version] / "connectors")
    text = TextCondition(call[f"{prefix}prompt_embeds"], call[f"{prefix}prompt_attention_mask"])
    return connect(part, text)


def predicted(
    model: Any,
    family: Any,
    x: Latents,
    timestep: Tensor,
    frame_rate: float,
    text: TextCondition,
    perturbed: tuple[str, ...] = (),
    **options: Any,
) -> Latents:
    """One pass of diffusers' model; STG of some streams alone, by processors that know none."""
    block = model.transformer_blocks[BLOCK]
    attentions = {"latents": block.attn1, "audio_latents": block.audio_attn1}
    perturbing = {name: attention.processor for name, attention in attentions.items()}
    for name in attentions.keys() - set(perturbed):
        attentions[name].set_processor(LTX2AudioVideoAttnProcessor())
    _, frames, height, width = family.latent_shape(WORKLOAD)
    video, sound = model(
        x["latents"],
        x["audio_latents"],
        text.embeds,
        text.audio,
        timestep[None],
        sigma=timestep[None],
        num_frames=frames,
        height=height,
        width=width,
        fps=frame_rate,
        audio_num_frames=WORKLOAD.audio_num_frames,
        spatio_temporal_guidance_blocks=[BLOCK] if perturbed else None,
        use_cross_timestep=True,
        return_dict=False,
        **options,
    )
    for name, processor in perturbing.items():
        attentions[name].set_processor(processor)
    return {"latents": video, "audio_latents": sound}


def test_a_twin_build_perturbs_both_streams_or_none(opened: Open) -> None:
    call = given("2.3", "stg") | {"audio_stg_scale": 0.0}
    with pytest.raises(EngineRejected, match="video and sound, the request the video alone"):
        opened("2.3", "twin")(**call)


def test_another_frame_rate_has_another_length_of_sound(opened: Open) -> None:
    call = given("2.3", "stg") | {"frame_rate": 30.0}
    with pytest.raises(EngineRejected, match=r"built for 18 latents of sound.*makes 14: rebuild"):
        opened("2.3", "segmented")(**call)


def test_latents_that_are_given_can_be_mixed_with_noise(opened: Open) -> None:
    call = given("2.3", "stg") | OFF | {"num_inference_steps": 2}
    generator = torch.Generator().manual_seed(4)
    drawn = {name: torch.randn(call[name].shape, generator=generator) for name in STREAMS}
    mixed = {name: 0.25 * drawn[name] + 0.75 * call[name] for name in STREAMS}
    again = torch.Generator().manual_seed(4)
    assert (
        distance(last(opened, call | {"noise_scale": 0.25, "generator": again}), last(opened, call | mixed))
        < 1e-5
    )


def test_unpacked_latents_are_refused(opened: Open) -> None:
    """diffusers takes them for latents of the VAE, and normalises them."""
    unpacked = torch.zeros(1, 8, 3, 4, 5)
    with pytest.raises(InvalidRequest, match=r"expected \(1, 60, 8\) for these engines, got \(1, 8, 3"):
        opened("2.3", "segmented")(**given("2.3", "stg") | {"latents": unpacked})


def test_motion_speed_is_another_frame_rate_to_the_model(opened: Open) -> None:
    call = given("2.3", "stg") | OFF | {"num_inference_steps": 2}
    slowed = sampled("2.3", call | {"frame_rate": 48.0})
    assert distance(last(opened, call | {"motion_speed": 0.5}), slowed) <= 2e-5
    assert distance(last(opened, call), slowed) > 1e-3


def configurations() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"ff_bias": False}, "expected LTX-2 or LTX-2.3, got a transformer/config.json of LTX-2.5"
    yield {"use_keyframes_abs_pos_embedding": True}, "of LTX-2.5: use one of the others"
    yield {"use_prompt_adaln_single": False}, "of LTX-2.5"
    yield {"patch_size": 2}, "expected patch_size 1 in transformer/config.json"
    yield {"rope_type": "interleaved"}, "expected rope_type split in transformer/config.json"


@pytest.mark.parametrize(("change", "message"), configurations())
def test_other_models_are_refused(change: dict[str, Any], message: str) -> None:
    config = Checkpoint.open(FOLDERS["2.3"]).transformer_config
    with pytest.raises(InvalidRequest, match=message):
        family_for({**config, **change}).check(WORKLOAD)


def test_a_text_length_that_the_connectors_do_not_take_is_refused_at_the_build(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"text_length: expected a multiple of 4.*got 6: use 8"):
        build(FOLDERS["2.3"], tmp_path, **SIZES | {"text_length": 6}, stg_blocks=[BLOCK])


def scales_of(defaults: Defaults) -> tuple[float, ...]:
    return defaults.guidance_scale, defaults.stg_scale, defaults.modality_scale, defaults.rescale


@pytest.mark.parametrize("version", FOLDERS)
def test_defaults_are_the_pipelines_own(version: str) -> None:
    defaults = Checkpoint.open(FOLDERS[version]).family.defaults
    sound = defaults.sound
    assert sound is not None
    assert (defaults.guidance_scale, defaults.stg_scale, defaults.modality_scale, defaults.rescale) == (
        3,
        1,
        3,
        0.7,
    )
    assert (sound.guidance_scale, sound.stg_scale, sound.modality_scale, sound.rescale) == (7, 1, 3, 0.7)
    assert defaults.stg_blocks == sound.stg_blocks == ((29,) if version == "2.0" else (28,))


def test_a_distilled_model_has_one_pass_and_its_own_steps() -> None:
    config = Checkpoint.open(FOLDERS["2.0"]).transformer_config
    defaults = family_for(config, origin="LTX-2-19b-distilled").defaults
    assert defaults.sound is not None
    assert scales_of(defaults) == scales_of(defaults.sound) == (1, 0, 1, 0)
    assert defaults.steps is not None and len(defaults.steps.values) == 8


@pytest.mark.parametrize("version", FOLDERS)
def test_flops_are_those_that_torch_counts(version: str) -> None:
    checkpoint = Checkpoint.open(FOLDERS[version])
    family, model = checkpoint.family, checkpoint.load_transformer()
    whole = Segment("normal", 0, family.num_blocks, front=True, back=True)
    inputs = family.trace_inputs(whole, WORKLOAD, 1)
    by_name = dict(zip(family.borders(whole)[0], inputs, strict=True))
    by_name["timestep_index"].zero_()
    module = family.module(model, whole, expand_masks=False)
    # The counter knows no fused attention of a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        module(*by_name.values())
    assert family.segment_flops(whole, WORKLOAD) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize(("layers", "shared"), [({"isolation": False}, 0.805), ({"isolation": True}, 0.850)])
def test_the_shared_step_at_its_published_size(layers: dict[str, bool], shared: float) -> None:
    """Measured facts of LTX-2.3 at 512x768x121: against all passes in full."""
    family = Checkpoint.open("ltx-2.3", random_weights=True).family
    workload = Workload(512, 768, 121, 1024, "bf16", audio_num_frames=family.audio_num_frames(121, 24.0))
    assert workload.audio_num_frames == 126
    segments = family.segments("segmented", "stg-a", (28,))
    skip = Pass("skip", Perturbation("stg-a", (28,)))
    passes = (UNCOND, *([ISOLATION] if layers["isolation"] else []), COND, skip)

    def flops(segment: Segment) -> int:
        return family.segment_flops(segment, workload)

    ratio = plan_step(segments, passes).flops(flops) / full_plan(segments, passes).flops(flops)
    assert ratio == pytest.approx(shared, rel=0.05)


def test_inspect_shows_the_isolation_pass(ltx2_engines: Path) -> None:
    builds = EngineStore.open(ltx2_engines / "2.3").builds
    described = describe(next(build for build in builds if build.manifest.layout == "segmented"))
    states = described["guidance_states"]
    assert list(states) == ["cond", "cfg", "cfg+stg", "cfg+stg+isolation"]
    rows = states["cfg+stg+isolation"]["rows"]
    assert (rows["front"], rows["block_3"], rows["back"]) == (3, 4, 4)
    assert states["cfg+stg"]["flops"] < states["cfg+stg+isolation"]["flops"]
