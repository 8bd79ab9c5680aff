"""Engines that several tests share, built once per run from real checkpoints."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from stg_trt import VideoPipeline, build
from stg_trt.runtime.ranks import Ranks
from stg_trt.system import kept_hashes
from tests.support.cli import keep_one_block
from tests.support.family_cases import CASES, LTX, FamilyCase, Sizes
from tests.support.golden_builds import build_goldens, build_ltx2, build_open_sora, build_svd
from tests.support.quick_compilation import compile_quickly
from tests.support.shared_graphs import share_graphs
from tests.support.whole_pipelines import TEXT_LENGTH

# The processes of a run take files in this order: one that takes minutes must not begin when the others end.
LONGEST_FIRST = (
    # Builds LTX-2, Open-Sora and SVD while the next one builds the other families.
    "build_engines/test_export_version.py",
    "test_goldens.py",
    "build_engines/test_compile_inductor.py",
    "build_engines/test_whole_export.py",
    "build_engines/test_inductor_blocks.py",
    "plugins/test_shared_library.py",
    "server/test_process.py",
    "build_engines/test_compile_tensorrt.py",
    # Has the graphs of test_export_version.py.
    "runtime/test_sound.py",
    "cli/test_interrupt.py",
    "cli/test_errors.py",
    # Before runtime/test_components.py, which has its engines.
    "runtime/test_pipeline.py",
    "runtime/test_image_to_video.py",
    "runtime/test_clean_latents.py",
    "examples/test_moving_shapes.py",
    "benchmarks/test_step.py",
    "benchmarks/test_gpu.py",
)

ROOT = Path(__file__).resolve().parents[1]
# Python's own thresholds are for programs that make fewer objects; an export makes millions that live on.
COLLECTED_AFTER = 20_000, 20, 10
_KEPT_S = 24 * 3600
_BUILD_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")

BuiltOnce = Callable[[str, Callable[[Path], object]], Path]
OnTwoRanks = Callable[[VideoPipeline], VideoPipeline]


# Fixtures that make a test slow, and why; `golden_engines` is quick for LTX-Video alone: a test with another
# family among its parameters is slow. A module may have a SLOW_FIXTURES of its own.
SLOW_FIXTURES = {
    "inductor_engines": "compiles packages with AOTInductor",
    "whole_engines": "builds the engines of a whole pipeline",
    "golden_engines": "builds the engines of every family",
    "ltx2_engines": "builds the engines of LTX-2",
    "open_sora_engines": "builds the engines of Open-Sora",
    "svd_engines": "builds the engines of a UNet",
    "library": "compiles the kernels with nvcc",
    "tiny_wan": "exports the graphs of Wan",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    order = {tests / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    for item in items:
        mark_slow(item)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch finds none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def mark_slow(item: pytest.Item) -> None:
    """By its fixtures; a mark of its own must say why."""
    fixtures: list[str] = getattr(item, "fixturenames", [])
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    slow: dict[str, str] = SLOW_FIXTURES | getattr(getattr(item, "module", None), "SLOW_FIXTURES", {})
    for name in slow.keys() & {*fixtures}:
        families = [value for value in parameters.values() if isinstance(value, FamilyCase)]
        if name != "golden_engines" or any(family is not LTX for family in families):
            item.add_marker(pytest.mark.slow(reason=slow[name]))
    for mark in item.iter_markers("slow"):
        assert mark.kwargs.keys() == {"reason"}, f"{item.nodeid}: a slow test says why: slow(reason=...)"


def pytest_configure() -> None:
    compile_quickly()


def pytest_collection_finish() -> None:
    # Long builds collect garbage often; what the imports made would be searched each time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTED_AFTER)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """What tests build, for all processes and for later runs, until something that it is made from changes.

    Without pytest's cache (`-p no:cacheprovider`), it is kept for the processes of this run.
    """
    if pytestconfig.pluginmanager.hasplugin("cacheprovider"):
        shared = Path(pytestconfig.cache.mkdir("built")) / _digest_of_sources()
        for outdated in shared.parent.iterdir():
            # Not one that another run may be using at this moment.
            if outdated != shared and outdated.stat().st_mtime < time.time() - _KEPT_S:
                shutil.rmtree(outdated, ignore_errors=True)
        shared.mkdir(exist_ok=True)
    else:
        root = tmp_path_factory.getbasetemp()
        # Where there are several processes, each has a folder of its own inside the run's.
        shared = root.parent if hasattr(pytestconfig, "workerinput") else root
    return shared


@pytest.fixture(scope="session", autouse=True)
def graphs_are_shared(shared_folder: Path) -> None:
    """Exporting a graph takes seconds, and many tests build the same few kinds of blocks."""
    share_graphs(shared_folder / "graphs")


@pytest.fixture(scope="session")
def built_once(shared_folder: Path) -> BuiltOnce:
    """Fills a folder in the first process that asks for that name."""

    def folder_of(name: str, fill: Callable[[Path], object]) -> Path:
        folder, unfinished = shared_folder / name, shared_folder / f"{name}-unfinished"
        with FileLock(shared_folder / f"{name}.lock"):
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                fill(unfinished)
                unfinished.rename(folder)
        return folder

    return folder_of


def _digest_of_sources() -> str:
    """Of all that checkpoints, engines and compiled kernels of the tests are made from."""
    hashed = hashlib.sha256(repr([(name, version(name)) for name in _BUILD_PACKAGES]).encode())
    for folder in ("stg_trt", "build_engines", "plugins", "tests/support", "tests/plugins", "tests/goldens"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                hashed.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    hashed.update(Path(__file__).read_bytes())
    return hashed.hexdigest()[:16]


@pytest.fixture(scope="session")
def golden_engines(built_once: BuiltOnce) -> Callable[[FamilyCase], Path]:
    """Per family: segmented stg-a engines that can perturb `cut_at`, and the twins; 2 videos."""
    return lambda case: built_once(f"{case}-engines", lambda folder: build_goldens(case, folder))


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> FamilyCase:
    """Every family in turn."""
    found: FamilyCase = request.param
    return found


@pytest.fixture(scope="module")
def checkpoint(case: FamilyCase, built_once: BuiltOnce) -> Path:
    """The family's whole tiny checkpoint, with text encoder and VAE."""
    return built_once(f"{case}-whole-checkpoint", case.save_pipeline)


@pytest.fixture(scope="session")
def whole_engines(built_once: BuiltOnce) -> Callable[[FamilyCase, Path], Path]:
    """Of a family's whole tiny checkpoint: 2 videos, and block 1 can be perturbed."""

    def engines(case: FamilyCase, checkpoint: Path) -> Path:
        def fill(folder: Path) -> None:
            sizes: Sizes = {**case.sizes, "text_length": TEXT_LENGTH}
            build(checkpoint, folder, **sizes, stg_blocks=[1], max_batch=2, verify_timesteps=1)

        return built_once(f"{case}-whole-engines", fill)

    return engines


@pytest.fixture(scope="module")
def pipeline(
    case: FamilyCase, checkpoint: Path, whole_engines: Callable[[FamilyCase, Path], Path]
) -> VideoPipeline:
    """Over the engines of the whole checkpoint."""
    return VideoPipeline.from_pretrained(checkpoint, engines=whole_engines(case, checkpoint))


@pytest.fixture(scope="session", autouse=True)
def cache_of_hashes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run instead of the user's, for programs that tests start too."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["STG_TRT_CACHE"] = str(folder)
    return folder


@pytest.fixture
def hashed_files(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read to be hashed, as they are."""
    read: list[Path] = []
    whole = kept_hashes.file_sha256

    def counted(path: Path) -> str:
        read.append(path)
        return whole(path)

    monkeypatch.setattr(kept_hashes, "file_sha256", counted)
    return read


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also in tests that a shell started as a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def ltx_checkpoint() -> Path:
    """The tiny LTX-Video model of the goldens: 5 blocks, 60 tokens, no text encoder."""
    return LTX.goldens


@pytest.fixture(scope="session")
def ltx_engines(golden_engines: Callable[[FamilyCase], Path]) -> Path:
    """Segmented stg-a engines that can perturb blocks 1 and 3, and both twins of block 3; 2 videos."""
    return golden_engines(LTX)


@pytest.fixture(scope="session")
def inductor_engines(built_once: BuiltOnce) -> Path:
    """The same engines, compiled by inductor for the CPU."""
    compiled = {"backend": "inductor", "target": "cpu"}
    return built_once("inductor-engines", lambda folder: build_goldens(LTX, folder, **compiled))


@pytest.fixture(scope="session")
def ltx2_engines(built_once: BuiltOnce) -> Path:
    """Of LTX-2.0's and 2.3's goldens, in a folder each; both layouts, 2 videos."""
    return built_once("ltx2-engines", build_ltx2)


@pytest.fixture(scope="session")
def open_sora_engines(built_once: BuiltOnce) -> Path:
    """Segmented stg-a engines that can perturb blocks 2 to 5, and a twin of either mode; 2 videos."""
    return built_once("open-sora-engines", build_open_sora)


@pytest.fixture(scope="session")
def svd_engines(built_once: BuiltOnce) -> Path:
    """Segmented stg-a engines that can perturb what SVD_BLOCKS has, and a stg-r twin; 2 videos."""
    return built_once("svd-engines", build_svd)


@pytest.fixture(scope="session")
def on_two_ranks() -> OnTwoRanks:
    """The pipeline with a second rank, in one process for all that are opened, which run one at a time."""
    ranks = Ranks(2)

    def opened(pipeline: VideoPipeline) -> VideoPipeline:
        layout = pipeline._request.layout
        shared = VideoPipeline(pipeline.checkpoint, pipeline.store, layout=layout, guidance_parallel=2)
        shared._samplers._ranks = ranks
        return shared

    return opened


@pytest.fixture(scope="session")
def embeds(tmp_path_factory: pytest.TempPathFactory, ltx_checkpoint: Path) -> Path:
    """Embeddings and latents that the tiny engines take, as `generate --embeds` reads them."""
    tensors = load_file(ltx_checkpoint / "cfg.safetensors")
    path = tmp_path_factory.mktemp("embeds") / "embeds.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if "expected" not in name}, path)
    return path


@pytest.fixture(scope="session")
def one_block(tmp_path_factory: pytest.TempPathFactory, ltx_checkpoint: Path) -> Path:
    """The tiny checkpoint with one block."""
    folder = tmp_path_factory.mktemp("one-block")
    for name in ("transformer", "scheduler"):
        shutil.copytree(ltx_checkpoint / name, folder / name)
    keep_one_block(folder)
    return folder
