"""Two experts that take turns over the steps, against diffusers' own pipelines and an eager loop."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from stg_trt import VideoPipeline, build
from stg_trt.build_engines import onnx_compiler
from stg_trt.cli.inspect import describe
from stg_trt.engines import manifest as manifests
from stg_trt.engines.store import EngineStore
from stg_trt.errors import EngineRejected, InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.segment import LAYOUTS, Segment
from stg_trt.runtime.device import Device
from tests.conftest import BuiltOnce
from tests.support.compared_calls import assert_close, noisy_picture, seeded, steps_of
from tests.support.eager_reference import perturbed
from tests.support.family_cases import LTX
from tests.support.family_cases.wan import WAN
from tests.support.simulated_cuda import SimulatedCuda, SimulatedGpu
from tests.support.tiny_experts import BOUNDARY, STEPS, TEXT, two_experts
from tests.support.tiny_lora import save_lora

SIZES: dict[str, Any] = {"height": 48, "width": 64, "num_frames": 9}
KINDS = ("text", "image")
Open = Callable[..., VideoPipeline]

SLOW_FIXTURES = {"opened": "builds the engines of two experts"}


def picture(seed: int = 0) -> Image.Image:
    return noisy_picture(SIZES["height"], SIZES["width"], seed)


def embeds(seed: int = 3) -> dict[str, Tensor]:
    cond, uncond = torch.randn(2, 1, *TEXT, generator=seeded(seed))
    return {"prompt_embeds": cond, "negative_prompt_embeds": uncond}


def arguments(kind: str, **changes: Any) -> dict[str, Any]:
    """A call that diffusers' pipeline takes as well."""
    pictures = {"image": picture()} if kind == "image" else {}
    common = {"guidance_scale": 4.0, "num_inference_steps": STEPS, "output_type": "latent"}
    return {**SIZES, **embeds(), **pictures, **common, "generator": seeded(), **changes}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return {kind: (folder, two_experts(folder, image=kind == "image")) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def opened(checkpoints: dict[str, tuple[Path, Any]], built_once: BuiltOnce) -> Open:
    """Ours of a kind, in a layout; block 1 can be perturbed by stg-a or, segmented, by stg-r."""

    def fill(kind: str, engines: Path) -> None:
        shared = {**SIZES, "text_length": TEXT[0], "stg_blocks": [1], "max_batch": 2, "verify_timesteps": 1}
        for layout in LAYOUTS:
            build(checkpoints[kind][0], engines, **shared, stg_mode="stg-a", layout=layout)

    def pipeline(kind: str, layout: str = "segmented") -> VideoPipeline:
        engines = built_once(f"two-experts-{kind}-engines", lambda folder: fill(kind, folder))
        return VideoPipeline.from_pretrained(checkpoints[kind][0], engines, layout=layout)

    return pipeline


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("second", [None, 2.5, 1.0, 0.5])
def test_every_step_of_diffusers(
    checkpoints: dict[str, tuple[Path, Any]], opened: Open, kind: str, layout: str, second: float | None
) -> None:
    """At 1 the second expert has no CFG; below, it goes towards the negative prompt."""
    scales = {} if second is None else {"guidance_scale_2": second}
    expected = steps_of(checkpoints[kind][1], **arguments(kind, **scales), max_sequence_length=TEXT[0])
    assert_close(steps_of(opened(kind, layout), **arguments(kind, **scales), stg_scale=0.0), expected)


def test_the_scale_of_the_second_expert_alone_is_no_cfg(
    checkpoints: dict[str, tuple[Path, Any]], opened: Open
) -> None:
    call = {"guidance_scale": 1.0, "guidance_scale_2": 4.0}
    expected = steps_of(checkpoints["text"][1], **arguments("text", **call))
    with pytest.warns(
        UserWarning, match="guidance_scale_2: expected guidance_scale above 1 beside it, got 1.0"
    ):
        got = steps_of(opened("text"), **arguments("text", **call), stg_scale=0.0)
    assert_close(got, expected)


def test_one_picture_at_the_end_too(checkpoints: dict[str, tuple[Path, Any]], opened: Open) -> None:
    """A model that sees no picture through CLIP takes a last one or none."""
    call = {"last_image": picture(1)}
    expected = steps_of(checkpoints["image"][1], **arguments("image", **call), max_sequence_length=TEXT[0])
    got = steps_of(opened("image"), **arguments("image", **call), stg_scale=0.0)
    assert_close(got, expected)
    assert not torch.allclose(got[-1], steps_of(opened("image"), **arguments("image"), stg_scale=0.0)[-1])


@torch.no_grad()
def eager_steps(own: Any, kind: str, mode: str, second: float, stg_scale: float) -> list[Tensor]:
    """CFG and STG written plainly on diffusers' models, from what its pipeline makes of the picture."""
    call, scheduler = arguments(kind), own.scheduler
    scheduler.set_timesteps(STEPS)
    noise, channels = torch.randn(1, 4, 3, 6, 8, generator=call["generator"]), None
    if kind == "image":
        pixels = own.video_processor.preprocess(call["image"], SIZES["height"], SIZES["width"])
        sizes = SIZES["height"], SIZES["width"], SIZES["num_frames"]
        _, channels = own.prepare_latents(
            pixels, 1, 4, *sizes, torch.float32, torch.device("cpu"), seeded(), noise, None
        )
    latents, found = noise, []
    for t in scheduler.timesteps:
        high = t >= BOUNDARY * 1000
        model, scale = (own.transformer, 4.0) if high else (own.transformer_2, second)
        given = latents if channels is None else torch.cat([latents, channels], 1)

        def predict(name: str, model: Any = model, given: Tensor = given, t: Tensor = t) -> Tensor:
            return model(given, t.expand(1), call[name], return_dict=False)[0]  # type: ignore[no-any-return]

        cond, uncond = predict("prompt_embeds"), predict("negative_prompt_embeds")
        with perturbed(model, mode, (1,)):
            skip = predict("prompt_embeds")
        pred = uncond + scale * (cond - uncond) + stg_scale * (cond - skip)
        latents = scheduler.step(pred, t, latents, return_dict=False)[0]
        found.append(latents)
    return [*found, latents]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layout", "mode"), [("segmented", "stg-a"), ("segmented", "stg-r"), ("twin", "stg-a")]
)
def test_every_step_with_stg(
    checkpoints: dict[str, tuple[Path, Any]], opened: Open, kind: str, layout: str, mode: str
) -> None:
    expected = eager_steps(checkpoints[kind][1], kind, mode, 2.0, 1.5)
    scales = {"guidance_scale_2": 2.0, "stg_scale": 1.5, "stg_mode": mode}
    got = steps_of(opened(kind, layout), **arguments(kind, **scales))
    assert_close(got, expected)
    without = steps_of(opened(kind, layout), **arguments(kind, guidance_scale_2=2.0, stg_scale=0.0))
    assert not torch.allclose(got[-1], without[-1], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_two_videos_equal_one_by_one(opened: Open, kind: str) -> None:
    pipeline = opened(kind, "segmented")
    pictures = [{"image": picture(i)} if kind == "image" else {} for i in range(2)]
    calls = [arguments(kind, **embeds(i), **pictures[i], generator=seeded(i)) for i in range(2)]
    apart = [pipeline(**call).frames for call in calls]
    both: dict[str, Any] = {name: torch.cat([call[name] for call in calls]) for name in embeds()}
    if kind == "image":
        both["image"] = [call["image"] for call in calls]
    together = pipeline(**calls[0] | both | {"generator": [seeded(0), seeded(1)]}).frames
    assert not torch.allclose(apart[0], apart[1], atol=1e-2)
    assert (together - torch.cat(apart)).abs().max() <= 1e-5


def test_captured_graphs_read_the_text_of_their_expert(opened: Open) -> None:
    """All are captured before the first step, and read the texts of the second call in the second call."""
    device, pipeline = SimulatedCuda(SimulatedGpu()), opened("text")
    pipeline._samplers._devices["cpu"] = cast(Device, device)
    for seed in range(2):
        plain = steps_of(opened("text"), **arguments("text", **embeds(seed)))
        captured = steps_of(pipeline, **arguments("text", **embeds(seed)))
        assert all(torch.equal(one, other) for one, other in zip(captured, plain, strict=True))
    # The first replay of each is the check; no step of the second call was captured anew.
    assert sum(graph.replays - 1 for graph in device.graphs) == 2 * STEPS
    assert device.attempts == len(device.graphs) <= STEPS


def test_a_lora_for_each(checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    """As diffusers' load_lora_weights merges them, into the second expert with load_into_transformer_2."""
    folder = checkpoints["text"][0]
    files = [tmp_path / f"{name}.safetensors" for name in ("first", "second")]
    for seed, path in enumerate(files):
        save_lora(WAN, folder, path, 1, seed=seed)
    own = WanPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    for path, second in zip(files, (False, True), strict=True):
        own.load_lora_weights(path.parent, weight_name=path.name, load_into_transformer_2=second)
    own.fuse_lora(["transformer", "transformer_2"])
    own.transformer.unload_lora()
    own.transformer_2.unload_lora()
    checkpoint = Checkpoint.open(folder, lora=[files[0], f"transformer_2={files[1]}"])
    checkpoint.check()
    plain = Checkpoint.open(folder)
    for expert, model in enumerate((own.transformer, own.transformer_2)):
        merged, without = (one.load_transformer(expert=expert).state_dict() for one in (checkpoint, plain))
        expected = model.state_dict()
        assert any(not torch.equal(tensor, without[name]) for name, tensor in merged.items())
        assert all(torch.allclose(tensor, expected[name], atol=1e-6) for name, tensor in merged.items())
    assert sorted(map(str, checkpoint.applied_lora)) == [
        "first.safetensors:1",
        "transformer_2=second.safetensors:1",
    ]
    front = Segment("block_1", 1, 2)
    only_second = Checkpoint.open(folder, lora=[f"transformer_2={files[1]}"])
    assert only_second.segment_fingerprint(front) == plain.segment_fingerprint(front)
    other = front.of_expert(1)
    assert only_second.segment_fingerprint(other) != plain.segment_fingerprint(other)
    assert refuse(WAN.goldens, lora=[f"transformer_2={files[1]}"]).startswith(
        "lora: expected none for transformer_2, which wan_unipc has not, got transformer_2=second.safetensors"
    )


def test_the_boundary_is_compared_as_diffusers_compares_it(tmp_path: Path) -> None:
    """In float32: a timestep of a float32 scheduler may be that of the boundary, rounded."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    timestep = scheduler.timesteps[1]
    for ratio in (float(timestep) / 1000, np.nextafter(float(timestep) / 1000, 1)):
        two_experts(tmp_path / f"{ratio}", scheduler=scheduler, boundary=float(ratio))
        family = Checkpoint.open(tmp_path / f"{ratio}").family
        expected = [int(not t >= ratio * 1000) for t in scheduler.timesteps]
        assert list(family.experts([float(t) for t in scheduler.timesteps], 1000)) == expected


def test_the_expert_is_seen_in_the_segments(opened: Open) -> None:
    pipeline = opened("text")
    (build,) = [b for b in pipeline.store.builds if b.manifest.layout == "segmented"]
    names = ["text", "front", "block_1", "back"]
    found = describe(build)
    assert [segment["name"] for segment in found["segments"]] == [
        *names, *(f"transformer_2_{name}" for name in names)
    ]  # fmt: skip
    assert [segment["expert"] for segment in found["segments"]] == [1] * 4 + [2] * 4
    rows = found["guidance_states"]["cfg+stg"]["rows"]
    assert rows["back"] == rows["transformer_2_back"] == 3 and rows["transformer_2_front"] == 2
    half = [record for record in build.manifest.segments if not record.segment.expert]
    assert {record.graph_sha256 for record in half}.isdisjoint(
        record.graph_sha256 for record in build.manifest.segments if record.segment.expert
    )
    again = EngineStore.open(pipeline.store.root)
    assert [b.manifest for b in again.builds] == [b.manifest for b in pipeline.store.builds]


@pytest.mark.slow(reason="exports the graphs of Wan")
def test_the_graphs_of_both_are_one(
    checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an interrupted build goes on with the second expert alone."""
    exported: list[str] = []

    def export(segment: str, *given: Any, **options: Any) -> Any:
        exported.append(segment)
        return onnx_export(segment, *given, **options)

    onnx_export = onnx_compiler.export
    monkeypatch.setattr(onnx_compiler, "export", export)
    monkeypatch.setattr(onnx_compiler.OnnxCompiler, "_graphs", {})
    options = {**SIZES, "text_length": TEXT[0], "stg_blocks": [1], "verify_timesteps": 1}
    (folder,) = build(checkpoints["text"][0], tmp_path, **options)
    # The embedding, a block and the head.
    assert exported == ["text", "front", "front", "back"]
    whole = manifests.load(folder)
    *kept, last = whole.segments
    manifests.save(whole.model_copy(update={"segments": tuple(kept), "complete": False}), folder)
    build(checkpoints["text"][0], tmp_path, **options)
    again = manifests.load(folder)
    assert again.complete and again.record("transformer_2_back") is not None
    assert again.segments[-1].graph_sha256 == last.graph_sha256
    assert again.segments[-1].verification == last.verification


def test_the_weights_of_both_count(
    checkpoints: dict[str, tuple[Path, Any]], opened: Open, tmp_path: Path
) -> None:
    folder, engines = checkpoints["text"][0], opened("text").store.root
    shutil.copytree(folder, tmp_path / "other")
    (path,) = (tmp_path / "other" / "transformer_2").glob("*.safetensors")
    weights = load_file(path)
    save_file(weights | {"proj_out.bias": weights["proj_out.bias"] + 1}, path)
    with pytest.raises(EngineRejected, match="built from other weights"):
        VideoPipeline.from_pretrained(tmp_path / "other", engines)
    swapped = tmp_path / "swapped"
    shutil.copytree(folder, swapped)
    (swapped / "transformer").rename(swapped / "first")
    (swapped / "transformer_2").rename(swapped / "transformer")
    (swapped / "first").rename(swapped / "transformer_2")
    with pytest.raises(EngineRejected, match="built from other weights"):
        VideoPipeline.from_pretrained(swapped, engines)


def refuse(checkpoint: Path, **options: Any) -> str:
    with pytest.raises(InvalidRequest) as refused:
        Checkpoint.open(checkpoint, **options).check()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_checkpoint_that_is_not_whole(checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["text"][0], folder)
    second = folder / "transformer_2"
    config = (second / "config.json").read_text()
    (second / "config.json").write_text(config.replace('"ffn_dim": 48', '"ffn_dim": 96'))
    assert "to be that of transformer/, whose graphs it shares, got another one" in refuse(folder)
    (second / "config.json").write_text(config)
    for path in second.glob("*.safetensors"):
        path.unlink()
    assert "transformer_2" in refuse(folder)
    shutil.rmtree(second)
    assert "expected a diffusers folder with transformer_2/config.json, got none in" in refuse(folder)


def test_a_second_scale_for_one_expert(
    golden_engines: Callable[[Any], Path],
) -> None:
    pipeline = VideoPipeline.from_pretrained(LTX.goldens, golden_engines(LTX))
    with pytest.raises(
        InvalidRequest, match="guidance_scale_2: expected none for this ltx-video, whose model_"
    ):
        pipeline("a", guidance_scale_2=3.0)
