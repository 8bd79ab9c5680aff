from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file

from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.published import published
from tests.support.family_cases.case import GOLDENS

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CONFIG = "transformer/config.json"


@pytest.fixture
def folder(tmp_path: Path, ltx_checkpoint: Path) -> Path:
    """A copy that a test may damage."""
    for part in ("transformer", "scheduler"):
        shutil.copytree(ltx_checkpoint / part, tmp_path / "model" / part)
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path, ltx_checkpoint: Path) -> Path:
    """The same model as diffusers saves one that is too large for a file."""
    model = LTXVideoTransformer3DModel.from_pretrained(ltx_checkpoint, subfolder="transformer")
    model.save_pretrained(tmp_path / "sharded" / "transformer", max_shard_size="100KB")
    shutil.copytree(ltx_checkpoint / "scheduler", tmp_path / "sharded" / "scheduler")
    assert len(list((tmp_path / "sharded" / "transformer").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = checkpoint.load_transformer().state_dict()
    return tensors


def test_weights_are_those_of_diffusers(ltx_checkpoint: Path) -> None:
    expected = LTXVideoTransformer3DModel.from_pretrained(ltx_checkpoint, subfolder="transformer")
    model = Checkpoint.open(ltx_checkpoint).load_transformer()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_shards_are_one_model(ltx_checkpoint: Path, sharded: Path) -> None:
    expected = weights(Checkpoint.open(ltx_checkpoint))
    found = weights(Checkpoint.open(sharded))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_half_precision_weights_are_loaded_as_float32(folder: Path) -> None:
    stored = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(stored, folder / WEIGHTS)
    for name, tensor in weights(Checkpoint.open(folder)).items():
        assert torch.equal(tensor, stored[name].float()) and tensor.dtype == torch.float32


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("random_weights", [False, True])
def test_only_the_asked_blocks_take_memory(ltx_checkpoint: Path, random_weights: bool, ends: bool) -> None:
    checkpoint = Checkpoint.open(ltx_checkpoint, random_weights=random_weights)
    model = checkpoint.load_transformer([1, 3], ends=ends)
    for number, block in enumerate(model.transformer_blocks):
        assert {p.is_meta for p in block.parameters()} == {number not in (1, 3)}
    others = [p for name, p in model.named_parameters() if not name.startswith("transformer_blocks")]
    assert {p.is_meta for p in others} == {not ends}


def test_random_weights_are_seeded_by_name(ltx_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(ltx_checkpoint, random_weights=True)
    whole, part = weights(checkpoint), checkpoint.load_transformer([2]).state_dict()
    assert all(torch.equal(whole[name], t) for name, t in part.items() if not t.is_meta)
    first, second = (whole[f"transformer_blocks.{i}.attn1.to_q.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


def test_random_weights_are_never_zeros(ltx_checkpoint: Path) -> None:
    for name, tensor in weights(Checkpoint.open(ltx_checkpoint, random_weights=True)).items():
        assert (tensor != 0).all() and tensor.isfinite().all(), name
        assert tensor.std() > 0.005, name
        if "norm_" in name:
            assert abs(tensor.mean() - 1) < 0.05, name


def test_a_model_of_random_weights_neither_vanishes_nor_explodes(ltx_checkpoint: Path) -> None:
    model = Checkpoint.open(ltx_checkpoint, random_weights=True).load_transformer()
    generator = torch.Generator().manual_seed(0)
    latents, text = (torch.randn(1, *shape, generator=generator) for shape in ((60, 8), (9, 24)))
    sizes = {"num_frames": 3, "height": 4, "width": 5, "rope_interpolation_scale": (0.3, 32, 32)}
    pred = model(latents, text, torch.tensor([500.0]), torch.ones(1, 9), **sizes).sample
    assert 0.05 < pred.std() < 20


def test_fingerprints_tell_weights_apart(folder: Path, ltx_checkpoint: Path, sharded: Path) -> None:
    same = Checkpoint.open(ltx_checkpoint).fingerprint()
    assert Checkpoint.open(folder).fingerprint() == same
    tensors = load_file(folder / WEIGHTS)
    tensors["proj_in.bias"][0] += 1e-6
    save_file(tensors, folder / WEIGHTS)
    other = Checkpoint.open(folder).fingerprint()
    random = Checkpoint.open(folder, random_weights=True).fingerprint()
    assert len({same, other, random, Checkpoint.open(sharded).fingerprint()}) == 4


@pytest.mark.parametrize("random_weights", [False, True])
def test_fingerprints_tell_configurations_apart(folder: Path, random_weights: bool) -> None:
    before = Checkpoint.open(folder, random_weights=random_weights).fingerprint()
    edit(folder / CONFIG, norm_eps=1e-5)
    assert Checkpoint.open(folder, random_weights=random_weights).fingerprint() != before


def test_a_fingerprint_reads_every_shard(sharded: Path) -> None:
    before = Checkpoint.open(sharded).fingerprint()
    last = sorted((sharded / "transformer").glob("*.safetensors"))[-1]
    tensors = load_file(last)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, last)
    assert Checkpoint.open(sharded).fingerprint() != before


@pytest.mark.parametrize("name", ["ltx", "open_sora"])
def test_opening_imports_nothing_large(name: str) -> None:
    """A bad file is refused before torch is there."""
    opening = "import sys; from stg_trt.models.checkpoint import Checkpoint; Checkpoint.open(sys.argv[1])"
    check = f"{opening}; assert not {{'torch', 'diffusers'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", check, GOLDENS / name], check=True)


def test_published_configurations_open() -> None:
    flow_euler, unipc = FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
    expected = {
        "cogvideox-1.5-5b": (42, CogVideoXDPMScheduler),
        "cogvideox-1.5-5b-i2v": (42, CogVideoXDPMScheduler),
        "cogvideox-2b": (30, CogVideoXDDIMScheduler),
        "cogvideox-5b": (42, CogVideoXDPMScheduler),
        "cogvideox-5b-i2v": (42, CogVideoXDPMScheduler),
        "hunyuan-video": (60, flow_euler),
        "hunyuan-video-i2v": (60, flow_euler),
        "hunyuan-video-i2v-33ch": (60, flow_euler),
        "ltx-2": (48, flow_euler),
        "ltx-2.3": (48, flow_euler),
        "ltx-video-13b": (48, flow_euler),
        "ltx-video-2b": (28, flow_euler),
        "mochi-1-preview": (48, flow_euler),
        "open-sora-1.2": (56, flow_euler),
        "svd": (32, EulerDiscreteScheduler),
        "svd-xt": (32, EulerDiscreteScheduler),
        "wan2.1-flf2v-14b": (40, unipc),
        "wan2.1-i2v-14b": (40, unipc),
        "wan2.1-t2v-1.3b": (30, unipc),
        "wan2.1-t2v-14b": (40, unipc),
        "wan2.2-i2v-a14b": (40, unipc),
        "wan2.2-t2v-a14b": (40, unipc),
        "wan2.2-ti2v-5b": (30, unipc),
    }
    assert published() == tuple(expected)
    for name, (blocks, scheduler) in expected.items():
        checkpoint = Checkpoint.open(name, random_weights=True)
        assert checkpoint.family.num_blocks == blocks and not checkpoint.has_text_encoder
        assert isinstance(checkpoint.scheduler(), scheduler)
        assert checkpoint.fingerprint().startswith("random-")
        with pytest.raises(InvalidRequest, match=f"got the configuration {name}: .* --random-weights"):
            Checkpoint.open(name)


def test_a_shortened_model_is_the_first_blocks(ltx_checkpoint: Path) -> None:
    whole = Checkpoint.open(ltx_checkpoint, random_weights=True)
    short = whole.shortened([2])
    assert short.family.num_blocks == 2 and whole.family.num_blocks == 5
    assert short.fingerprint() != whole.fingerprint()
    kept, every = weights(short), weights(whole)
    assert {name.split(".")[1] for name in kept if name.startswith("transformer_blocks")} == {"0", "1"}
    assert all(torch.equal(tensor, every[name]) for name, tensor in kept.items())
    (short.transformer_config).pop("norm_eps")
    with pytest.raises(InvalidRequest, match=r"expected norm_eps in .*/transformer/config.json, got no such"):
        short.transformer_config["norm_eps"]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([0], r"blocks: expected num_layers 1 to 5, got 0: write --blocks 2$"),
        ([6], r"blocks: expected num_layers 1 to 5, got 6: write --blocks 2$"),
        ([], r"blocks: expected num_layers 1 to 5, got none: write --blocks 2$"),
        ([2, 2], r"blocks: expected num_layers 1 to 5, got 2,2: write --blocks 2$"),
    ],
)
def test_blocks_that_a_model_has_not(ltx_checkpoint: Path, counts: list[int], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Checkpoint.open(ltx_checkpoint, random_weights=True).shortened(counts)


def test_every_list_of_blocks_has_its_number(ltx_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in families with two kinds of blocks, one after the other."""
    whole = Checkpoint.open(ltx_checkpoint, random_weights=True)
    monkeypatch.setattr(type(whole.family), "block_counts", ("num_layers", "num_attention_heads"))
    heads = whole.family.integer("num_attention_heads")
    assert whole.shortened([3, 1]).transformer_config["num_attention_heads"] == 1
    with pytest.raises(InvalidRequest, match=f"num_layers 1 to 5, num_attention_heads 1 to {heads}, got 3: "):
        whole.shortened([3])


def test_real_weights_are_not_shortened(ltx_checkpoint: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"blocks: expected random weights, .*: add --random-weights"):
        Checkpoint.open(ltx_checkpoint).shortened([2])


def test_a_scheduler_is_new_each_time(ltx_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(ltx_checkpoint)
    first = checkpoint.scheduler()
    first.set_timesteps(4, mu=1.0)
    assert getattr(checkpoint.scheduler(), "num_inference_steps", None) is None
    assert first.config.max_shift == 2.05


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "expected a diffusers folder or one of .*ltx-.* check the path"),
        (lambda f: (f / CONFIG).unlink(), "expected a diffusers folder with transformer/config.json"),
        (lambda f: (f / CONFIG).write_text("{"), "expected JSON in .*config.json"),
        (lambda f: (f / CONFIG).write_text("[]"), "expected an object in .*config.json, got list"),
        (lambda f: (f / WEIGHTS).unlink(), "expected the weights transformer/diffusion_pytorch_model"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\0" * 99), "expected a whole safetensors file"),
        (lambda f: edit(f / CONFIG, num_layers=6), "the first missing is transformer_blocks.5"),
        (lambda f: edit(f / CONFIG, num_layers=4), "got transformer_blocks.4.*another model"),
        (lambda f: edit(f / CONFIG, in_channels=4), r"expected proj_in.weight of shape \(32, 4\)"),
        (lambda f: edit(f / CONFIG, _class_name="UNet"), "expected a transformer of class .*, got UNet"),
        (
            lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="Nothing"),
            "expected a diffusers scheduler, got Nothing",
        ),
    ],
    ids=["no folder", "no config", "cut", "list", "no weights", "not safetensors", "more blocks",
         "fewer blocks", "other shape", "other class", "no scheduler"],
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(InvalidRequest, match=message):
        checkpoint = Checkpoint.open(folder)
        checkpoint.scheduler()
        checkpoint.load_transformer()


def test_a_missing_shard_is_named(sharded: Path) -> None:
    last = sorted((sharded / "transformer").glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(InvalidRequest, match=f"expected the weights transformer/{last.name}, got no such"):
        Checkpoint.open(sharded).fingerprint()
