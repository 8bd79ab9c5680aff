"""Where checkpoints lie: on the hub, in its cache, in folders with variants."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from tests.conftest import BuiltOnce
from tests.support.cli import ROOT
from tests.support.fake_hub import FakeHub, commit_of, serving
from tests.support.family_cases import LTX
from tests.support.original_names import original_name

NAME = "tiny/LTX-Video"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(built_once: BuiltOnce) -> Path:
    return built_once(f"{LTX}-whole-checkpoint", LTX.save_pipeline)


@pytest.fixture(scope="module")
def other(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a variant of the transformer, and another scheduler."""
    made = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(folder, made)
    model = LTX.model_class.from_pretrained(folder, subfolder="transformer").half()
    model.save_pretrained(made / "transformer", variant="fp16", max_shard_size="50KB")
    return made


@pytest.fixture
def hub(folder: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with a main branch and one with a variant; the cache is empty."""
    folders = {(NAME, "main"): folder, (NAME, "half"): other, ("gated/model", "main"): folder}
    with serving(FakeHub(folders)) as running:
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": running.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield running


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_repository_is_opened_by_its_id(hub: FakeHub, folder: Path) -> None:
    """Only the files that are needed are downloaded, and each once."""
    opened = Checkpoint.open(NAME)
    assert opened.fingerprint() == Checkpoint.open(folder).fingerprint()
    assert opened.name == NAME and opened.has_text_encoder
    assert not [name for name in hub.downloads if name.startswith("text_encoder/model")]
    opened.check_text()
    opened.check_vae()
    assert Checkpoint.open(f"https://huggingface.co/{NAME}").fingerprint() == opened.fingerprint()
    assert len(hub.downloads) == len({*hub.downloads})
    assert {"text_encoder/model.safetensors", "tokenizer/tokenizer.json", WEIGHTS} <= {*hub.downloads}


def test_the_cache_is_used_offline(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        offline(patched)
        with pytest.raises(
            InvalidRequest, match=f"expected {NAME} on the hub or whole in its cache, got no con"
        ):
            Checkpoint.open(NAME)
    Checkpoint.open(NAME)
    offline(monkeypatch)
    opened = Checkpoint.open(NAME)
    assert opened.fingerprint() == Checkpoint.open(folder).fingerprint()
    with pytest.raises(InvalidRequest, match=f"expected {NAME} on the hub or whole in its cache, got no con"):
        opened.check_vae()


@pytest.mark.slow(reason="imports torch in processes of their own")
def test_the_endpoint_and_the_cache_are_those_of_the_environment(hub: FakeHub, tmp_path: Path) -> None:
    """In a process of its own, first with the hub, then without."""
    program = (
        f"from stg_trt.models.checkpoint import Checkpoint; print(Checkpoint.open('{NAME}').fingerprint())"
    )
    cache = {"HF_HUB_CACHE": str(tmp_path / "own"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    printed = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, **cache, **more},
            capture_output=True, text=True, check=True,
        ).stdout
        for more in ({"HF_ENDPOINT": hub.url}, {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"})
    ]  # fmt: skip
    assert printed[0] == printed[1] == f"{Checkpoint.open(NAME).fingerprint()}\n"


def test_revisions_and_variants(hub: FakeHub, other: Path) -> None:
    for revision in ("half", commit_of(NAME, "half")):
        opened = Checkpoint.open(NAME, revision=revision, variant="fp16")
        assert opened.fingerprint() == Checkpoint.open(other, variant="fp16").fingerprint()
        opened.check_text()
        assert not [name for name in hub.downloads if name == WEIGHTS]
    with pytest.raises(
        InvalidRequest, match=f"revision: expected a branch, tag or commit of {NAME}, got 'x':"
    ):
        Checkpoint.open(NAME, revision="x")
    with pytest.raises(
        InvalidRequest, match=rf"variant: expected .* {NAME} have \(none\), got 'fp16': leave"
    ):
        Checkpoint.open(NAME, variant="fp16")


def test_a_moving_branch_does_not_mix_two_commits(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(NAME)
    assert opened.source is not None
    hub.folders[NAME, "next"] = Path(shutil.copytree(folder, tmp_path / "moved"))
    hub.branches[NAME, "main"] = "next"
    assert opened.source.weights("vae").files[0].parents[1] == opened.source.folder
    again = Checkpoint.open(NAME).source
    assert again is not None and again.folder.name == commit_of(NAME, "next")


def test_a_single_file_has_the_other_parts_of_its_repository(
    hub: FakeHub, folder: Path, tmp_path: Path
) -> None:
    """Of the repository that diffusers uses for such a file; its transformer is not downloaded."""
    hub.folders["diffusers/LTX-Video-0.9.0", "main"] = folder
    weights = load_file(folder / WEIGHTS)
    stored = {f"model.diffusion_model.{original_name(LTX, name)}": weights[name] for name in weights}
    save_file(stored, tmp_path / "tuned.safetensors")
    opened = Checkpoint.open(tmp_path / "tuned.safetensors")
    opened.check()
    opened.check_text()
    opened.check_vae()
    assert opened.name == "tuned" and WEIGHTS not in hub.downloads
    for name, tensor in opened.load_transformer().state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tiny/nothing",
            "expected a folder or a repository of the hub, got tiny/nothing, which is neither: check",
        ),
        ("gated/model", "expected a repository of the hub that you may read, got gated/model, .*: accept"),
        ("a--b/..c", "expected a (folder or|diffusers folder) .*, got a--b/..c, which is neither: check"),
    ],
)
def test_repositories_that_cannot_be_read(hub: FakeHub, name: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"checkpoint: {message}"):
        Checkpoint.open(name)


def test_a_folder_of_the_cache_is_a_checkpoint(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    """The folder of the repository as well as that of a snapshot."""
    Checkpoint.open(NAME)
    hub.folders.clear()
    cached = tmp_path / "cache" / "models--tiny--LTX-Video"
    expected = Checkpoint.open(folder).fingerprint()
    snapshot = cached / "snapshots" / commit_of(NAME, "main")
    assert Checkpoint.open(cached).name == Checkpoint.open(snapshot).name == NAME
    for opened in (
        Checkpoint.open(cached),
        Checkpoint.open(snapshot),
        Checkpoint.open(cached, revision="main"),
        Checkpoint.open(cached, revision=snapshot.name),
    ):
        assert opened.fingerprint() == expected
    with pytest.raises(
        InvalidRequest, match=r"revision: expected one that .* \(main, [0-9a-f]+\), got 'half': "
    ):
        Checkpoint.open(cached, revision="half")
    shutil.rmtree(cached / "refs")
    assert Checkpoint.open(cached).fingerprint() == expected


def test_a_folder_has_no_revisions(folder: Path) -> None:
    for name in (folder, "ltx-video-2b"):
        with pytest.raises(InvalidRequest, match=r"revision: expected none for .*, got 'main': leave it out"):
            Checkpoint.open(name, random_weights=True, revision="main")


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_variant_of_a_single_part(folder: Path, part: str, tmp_path: Path) -> None:
    """The others have plain weights."""
    from stg_trt.runtime.components import Components

    model = Path(shutil.copytree(folder, tmp_path / "model"))
    plain = Components(Checkpoint.open(folder), dtype=None, offload=False)
    load = {"text_encoder": Components.load_text, "vae": Components.load_vae}[part]
    module = getattr(load(plain, LTX.workload, torch.device("cpu")), part)
    shutil.rmtree(model / part)
    module.half().save_pretrained(model / part, variant="fp16", max_shard_size="20KB")
    with pytest.raises(InvalidRequest, match="got only the variant fp16: add --variant fp16"):
        load(Components(Checkpoint.open(model), None, False), LTX.workload, torch.device("cpu"))
    opened = Checkpoint.open(model, variant="fp16")
    found = getattr(load(Components(opened, None, False), LTX.workload, torch.device("cpu")), part)
    for name, tensor in module.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.float()), name
    assert opened.fingerprint() == Checkpoint.open(folder).fingerprint()
