"""Open-Sora 1.2: its goldens and its VAE's, guidance by two skip passes, prompts, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from stg_trt import VideoPipeline
from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families import family_for
from stg_trt.models.families.open_sora_pipeline import OpenSoraPipeline
from stg_trt.models.families.open_sora_vae import OpenSoraVAE
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.segment import LAYOUTS, Segment
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload
from tests.conftest import BuiltOnce, OnTwoRanks
from tests.support.family_cases.case import GOLDENS
from tests.support.family_cases.tiny_text import make_text_encoder, make_tokenizer
from tests.support.golden_builds import OPEN_SORA
from tests.support.golden_builds import OPEN_SORA_SIZES as SIZES

VAE = GOLDENS / "open_sora_vae"
WORKLOAD = Workload(**SIZES)
Open = Callable[[str], VideoPipeline]


@cache
def given(case: str) -> dict[str, Any]:
    """A golden's call in VideoPipeline's names."""
    options = json.loads((OPEN_SORA / f"{case}.json").read_text())
    tensors = load_file(OPEN_SORA / f"{case}.safetensors")
    return {
        **options,
        **{name: tensor for name, tensor in tensors.items() if not name.startswith("expected")},
        "output_type": "latent",
    }


@pytest.fixture(scope="module")
def checkpoint(built_once: BuiltOnce) -> Path:
    """A folder as people have it: the authors' transformer and VAE, T5, and nothing of diffusers."""

    def fill(folder: Path) -> None:
        shutil.copytree(OPEN_SORA / "transformer", folder / "transformer")
        shutil.copytree(VAE / "vae", folder / "vae")
        torch.manual_seed(0)
        make_text_encoder(T5Config, T5EncoderModel).save_pretrained(folder / "text_encoder")
        make_tokenizer().save_pretrained(folder / "tokenizer")

    return built_once("open-sora-checkpoint", fill)


@pytest.fixture(scope="module")
def opened(open_sora_engines: Path, checkpoint: Path) -> Open:
    return cache(lambda layout: VideoPipeline.from_pretrained(checkpoint, open_sora_engines, layout=layout))


def every_step(pipeline: VideoPipeline, case: str) -> list[Tensor]:
    """Latents after each step of a golden's call."""
    steps: list[Tensor] = []

    def keep(pipe: Any, index: int, timestep: float, tensors: dict[str, Tensor]) -> None:
        steps.append(tensors["latents"].clone())

    pipeline(**given(case), callback_on_step_end=keep)
    return steps


@pytest.mark.parametrize("case", ["stg_a", "stg_r"])
def test_every_step_matches_in_both_layouts(opened: Open, case: str) -> None:
    expected = load_file(OPEN_SORA / f"{case}.safetensors")
    for layout in LAYOUTS:
        steps = every_step(opened(layout), case)
        assert len(steps) == given(case)["num_inference_steps"]
        for i, latents in enumerate(steps):
            distance = (latents - expected[f"expected_step_{i:02d}"]).abs().max()
            assert distance <= 1e-4, f"{layout}, step {i}"


def test_two_ranks_are_one(opened: Open, on_two_ranks: OnTwoRanks) -> None:
    one = opened("segmented")
    for case in ("stg_a", "stg_r"):
        alone, shared = (every_step(pipeline, case)[-1] for pipeline in (one, on_two_ranks(one)))
        assert (shared - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_videos_equal_one_by_one(opened: Open, layout: str) -> None:
    call = given("stg_a")
    other = call | {"latents": call["latents"].flip(1), "prompt_embeds": 0.5 * call["prompt_embeds"]}
    names = [name for name, value in call.items() if isinstance(value, Tensor)]
    both = call | {name: torch.cat([call[name], other[name]]) for name in names}
    together = opened(layout)(**both).frames
    apart = torch.cat([opened(layout)(**one).frames for one in (call, other)])
    assert (together - apart).abs().max() <= 1e-5
    assert not torch.allclose(apart[0], apart[1], atol=1e-2)


def test_a_skip_pass_for_space_and_one_for_time(opened: Open) -> None:
    blocks = {"spatial": [2], "temporal": [3]}
    scales = {"spatial": 1.5, "temporal": 0.5}
    call = {name: value for name, value in given("stg_a").items() if name != "stg_applied_layers_idx"}
    ours = opened("segmented")(**call | {"stg_blocks": blocks, "stg_scale": scales}).frames
    wanted = sampled(call, {2: 1.5, 3: 0.5})
    assert (ours - wanted).abs().max() <= 1e-4
    joint = sampled(call, {2: 0.5, 3: 1.5})
    assert (ours - joint).abs().max() > 1e-3


@torch.no_grad()
def sampled(call: dict[str, Any], scales: dict[int, float]) -> Tensor:
    """An eager loop with one skip pass per block, whose attention alone it skips."""
    opened = Checkpoint.open(OPEN_SORA)
    family, scheduler = opened.family, opened.scheduler()
    network = opened.load_transformer()
    tables = family.position_tables(WORKLOAD, call["frame_rate"])
    family.set_timesteps(scheduler, call["num_inference_steps"], WORKLOAD)

    def pred(prefix: str = "", *skipped: int) -> Tensor:
        perturbation = Perturbation("stg-a", skipped) if skipped else None
        segment = Segment("normal", 0, family.num_blocks, front=True, back=True, skipped=perturbation)
        text = TextCondition(call[f"{prefix}prompt_embeds"], call[f"{prefix}prompt_attention_mask"])
        inputs = family.text_inputs(text, WORKLOAD)
        state = {**tables, "text": network.y_embedder.y_proj(text.embeds), "text_bias": inputs["text_bias"]}
        state |= {"latents": latents, "timestep": timestep[None]}
        found: Tensor = family.module(network, segment, expand_masks=False).run(state)["pred"]
        if not skipped:
            given = {name: state[name] for name in ("text_bias", "positions", "fps")}
            rope = state["rope_cos"], state["rope_sin"]
            (whole,) = network(latents, timestep[None], text.embeds, **given, rope=rope)
            assert (found - whole).abs().max() <= 1e-5
        return found

    latents: Tensor = call["latents"]
    for timestep in scheduler.timesteps:
        cond, uncond = pred(), pred("negative_")
        guided = uncond + call["guidance_scale"] * (cond - uncond)
        for block, scale in scales.items():
            guided = guided + scale * (cond - pred("", block))
        latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
    return latents


def test_without_a_negative_prompt_the_model_s_own_embeddings_under_the_prompt_s_mask(opened: Open) -> None:
    """As upstream has it, and an empty text means the same."""
    pipeline, prompts = opened("segmented"), ["a red circle", "blue square moving left"]
    call = {name: given("stg_a")[name] for name in ("num_inference_steps", "guidance_scale", "output_type")}
    latents = torch.randn(2, *given("stg_a")["latents"].shape[1:], generator=torch.Generator().manual_seed(1))
    encoded = pipeline.components.encode(prompts, WORKLOAD, torch.device("cpu"))
    null = load_file(OPEN_SORA / "transformer" / "model.safetensors")["y_embedder.y_embedding"]
    wanted = pipeline(
        **call,
        latents=latents,
        prompt_embeds=encoded.embeds,
        prompt_attention_mask=encoded.mask,
        negative_prompt_embeds=null.expand_as(encoded.embeds),
        negative_prompt_attention_mask=encoded.mask,
    ).frames
    assert torch.equal(pipeline(prompts, **call, latents=latents).frames, wanted)
    assert torch.equal(pipeline(prompts, negative_prompt="", **call, latents=latents).frames, wanted)
    one_says = pipeline(prompts, negative_prompt=["", "blurred"], **call, latents=latents).frames
    assert torch.allclose(one_says[0], wanted[0], atol=1e-5)
    assert not torch.allclose(one_says[1], wanted[1], atol=1e-3)


def test_prompts_are_cleaned_and_have_a_score(opened: Open) -> None:
    pipeline = opened("segmented")
    cleaned = OpenSoraPipeline(None, None, None).cleaned
    assert cleaned("A <b>Red</b>   Circle http://a.com/b &amp; @me") == "a red circle"
    text = pipeline.components.encode(["A Red  circle"], WORKLOAD, torch.device("cpu"))
    own = pipeline.components.load_text(WORKLOAD, torch.device("cpu"))
    tokens = own.tokenizer(
        "a red circle aesthetic score: 6.5.", padding="max_length", max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        wanted = own.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    assert torch.equal(text.embeds, wanted)
    assert torch.equal(text.mask, tokens.attention_mask.float())


def test_what_cleans_prompts_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stg_trt.models.families.open_sora_pipeline.is_ftfy_available", lambda: False)
    with pytest.raises(InvalidRequest, match=r"^prompt: expected the packages beautifulsoup4 and ftfy, "):
        OpenSoraPipeline(None, None, None).cleaned("a")


def test_from_a_prompt_to_frames(opened: Open) -> None:
    pipeline = opened("segmented")
    call = {"num_inference_steps": 2, "latents": given("stg_a")["latents"]}
    frames = pipeline("a red circle", **call, output_type="pt").frames
    latents = pipeline("a red circle", **call, output_type="latent").frames
    wanted = vae().decode(latents, 34)
    assert frames.shape == (1, 34, 3, 64, 96)
    assert torch.allclose(frames[0], (wanted[0].movedim(1, 0) / 2 + 0.5).clamp(0, 1), atol=1e-6)


@cache
def vae() -> OpenSoraVAE:
    loaded: OpenSoraVAE = OpenSoraVAE.from_pretrained(VAE / "vae").eval().requires_grad_(False)
    return loaded


@pytest.mark.parametrize("frames", [17, 34])
def test_the_vae_decodes_as_upstream_does(frames: int) -> None:
    golden = load_file(VAE / f"decode_{frames}.safetensors")
    video = vae().decode(golden["latents"], frames)
    assert video.shape == golden["expected_video"].shape
    assert (video - golden["expected_video"]).abs().max() <= 1e-4


def test_chunks_of_frames_do_not_see_each_other() -> None:
    latents = load_file(VAE / "decode_34.safetensors")["latents"]
    apart = torch.cat([vae().decode(part, 17) for part in latents.split(5, 2)], 2)
    assert torch.equal(vae().decode(latents, 34), apart)


def test_a_picture_is_the_last_frame_of_its_latent() -> None:
    latents = load_file(VAE / "decode_17.safetensors")["latents"][:, :, :1]
    of_four = vae().temporal_vae.decode(latents * vae().scale + vae().shift, 4)
    assert of_four.shape[2] == 4
    spatial: Any = vae().spatial_vae["module"]
    picture = spatial.decode(of_four[:, :, -1] / 0.18215).sample
    assert torch.equal(vae().decode(latents, 1)[:, :, 0], picture)


def test_a_published_vae_has_published_sizes(tmp_path: Path) -> None:
    """Its repository has no configuration of the spatial part."""
    config = OpenSoraVAE.config_class(vae_temporal={"type": "VAE_Temporal_SD"})
    with torch.device("meta"):
        published = OpenSoraVAE(config)
    sizes = [
        sum(parameter.numel() for parameter in part.parameters())
        for part in (published.temporal_vae, published.spatial_vae)
    ]
    assert sizes == [165_265_944, 83_653_863]


@pytest.mark.parametrize(
    ("size", "frames", "steps", "first"),
    [((480, 848), 51, 30, 1000.0), ((144, 256), 17, 5, 1000.0), ((720, 1280), 1, 30, 1000.0)],
)
def test_timesteps_are_those_of_the_rectified_flow(
    size: tuple[int, int], frames: int, steps: int, first: float
) -> None:
    """t -> r*t / (1 + (r - 1)*t), of evenly spread timesteps, and a last one of 0."""
    family = Checkpoint.open(OPEN_SORA).family
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    family.set_timesteps(scheduler, steps, Workload(*size, frames, 12))
    ratio = math.sqrt(size[0] * size[1] / 512**2) * math.sqrt(1 if frames == 1 else frames // 17 * 5)
    even = 1 - torch.arange(steps, dtype=torch.float64) / steps
    wanted = 1000 * ratio * even / (1 + (ratio - 1) * even)
    assert float(scheduler.timesteps[0]) == first
    assert (scheduler.timesteps - wanted).abs().max() <= 2e-4
    assert float(scheduler.sigmas[-1]) == 0.0


def test_the_frame_rate_of_a_single_frame_is_that_of_a_picture() -> None:
    family = Checkpoint.open(OPEN_SORA).family
    assert family.position_tables(Workload(64, 96, 17, 12), 24.0)["fps"].tolist() == [24.0]
    assert family.position_tables(Workload(64, 96, 1, 12), 24.0)["fps"].tolist() == [120.0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"height": 72}, "height: expected a positive multiple of 16, got 72: use 64"),
        ({"width": 0}, "width: expected a positive multiple of 16, got 0: use 16"),
        ({"num_frames": 16}, "num_frames: expected 1 or a multiple of 17, which the VAE decodes at a time, "),
        ({"num_frames": 2}, "got 2: use 17"),
        ({"num_frames": 0}, "got 0: use 17"),
        ({"text_length": 13}, "text_length: expected 1 to 12 tokens, as many as the model has embeddings"),
        ({"text_length": 0}, "got 0: use 12"),
    ],
)
def test_sizes_that_are_refused(changed: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Checkpoint.open(OPEN_SORA).family.check(Workload(**SIZES | changed))


@pytest.mark.parametrize(
    ("transformer", "vae", "message"),
    [
        ({"kernel_size": [8, 8, -1]}, None, "expected STDiT3 of Open-Sora 1.2 .*, got kernel_size in trans"),
        ({"patch_size": [1, 1, 1]}, None, "got another patch_size, qk_norm or pred_sigma in transformer"),
        ({}, {"architectures": ["OpenSoraVAE_V1_3"]}, "expected VideoAutoencoderPipeline in vae/config.json"),
        ({}, {"_class_name": "AutoencoderKLHunyuanVideo"}, "got AutoencoderKLHunyuanVideo: the folder mixes"),
    ],
)
def test_parts_of_other_versions(
    transformer: dict[str, Any], vae: dict[str, Any] | None, message: str
) -> None:
    config = json.loads((OPEN_SORA / "transformer" / "config.json").read_text())
    with pytest.raises(InvalidRequest, match=message):
        family_for(config | transformer, vae).check(WORKLOAD)


@pytest.mark.parametrize(("name", "version"), [("STDiT", "1.0"), ("STDiT2", "1.1")])
def test_networks_of_other_versions(tmp_path: Path, name: str, version: str) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"architectures": [name]}))
    with pytest.raises(InvalidRequest, match=f"got {name} of Open-Sora {version}: use hpcai-tech/OpenSora"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("given", [".", "Open_Sora_v2.safetensors"])
def test_weights_of_the_next_version(tmp_path: Path, given: str) -> None:
    """Without a configuration; diffusers takes them for those of another model."""
    names = ("img_in.weight", "cond_in.weight", "double_blocks.0.img_attn.norm.key_norm.scale")
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "Open_Sora_v2.safetensors")
    with pytest.raises(InvalidRequest, match=r"got the weights of Open-Sora 2.0: use hpcai-tech/OpenSora-S"):
        Checkpoint.open(tmp_path / given)


@pytest.mark.parametrize("mode", ["stg-a", "stg-r"])
def test_flops_and_attentions_of_a_pair(mode: str) -> None:
    """Of the published network, whose whole forward is 56.5 TFLOP at 848x480x51."""
    family, workload = (
        Checkpoint.open("open-sora-1.2", random_weights=True).family,
        Workload(480, 848, 51, 300),
    )

    def flops(perturbation: Perturbation | None) -> int:
        whole = Segment("normal", 0, 56, front=True, back=True, skipped=perturbation)
        return family.segment_flops(whole, workload)

    whole = Segment("normal", 0, 56, front=True, back=True)
    assert flops(None) == pytest.approx(56.5e12, rel=1e-3)
    assert family.attentions(whole) == 112
    less = flops(None) - flops(Perturbation(mode, (22, 23)))
    tokens, width = 15 * 53 * 30, 1152
    attention = 2 * tokens * 2 * width**2 * 2 + 4 * tokens * (53 * 30 + 15) * width
    others = 2 * (2 * tokens * (2 + 2 + 8) * width**2 + 4 * 300 * width**2 + 4 * tokens * 300 * width)
    assert less == (attention if mode == "stg-a" else attention + others)
