"""An engine folder: finds the build that fits a request and says why each other one does not."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from stg_trt.engines import manifest as manifests
from stg_trt.engines.backends import backend_for, backends, load_engines
from stg_trt.engines.engine import Engine
from stg_trt.engines.key import export_version
from stg_trt.engines.manifest import Manifest
from stg_trt.errors import EngineRejected, InvalidRequest
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.lora import AppliedLora, describe
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.segment import check_layout
from stg_trt.system.gpu import Machine
from stg_trt.system.kept_hashes import kept_sha256
from stg_trt.system.stream import Stream

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineRequest:
    """A call's requirements of a build; None accepts anything.

    `perturbations` are those of its steps, and `skips` the most skip passes that one of them has.
    """

    weights: str | None = None
    lora: tuple[AppliedLora, ...] | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    condition_frames: int | None = None
    audio_num_frames: int | None = None
    videos: int = 1
    perturbations: frozenset[Perturbation] = field(default_factory=frozenset)
    skips: int = 0
    layout: str | None = None
    backend: str | None = None
    target: str | None = None
    machine: Machine | None = None

    def __post_init__(self) -> None:
        if self.layout is not None:
            check_layout(self.layout)
        if self.backend is not None:
            backend_for(self.backend)

    def rejects(self, manifest: Manifest) -> str | None:
        """Why the build does not fit, with the fix; None if it does."""
        workload = manifest.workload
        if not manifest.complete:
            return "the build is not finished: run it again with the same options to finish it"
        if reason := _outdated(manifest):
            return reason
        if self.weights is not None and self.weights != manifest.weights:
            return "built from other weights: build the engines again from this checkpoint"
        if self.lora is not None and self.lora != manifest.lora:
            return (
                f"built with lora {describe(manifest.lora)}, the request has {describe(self.lora)}: give the "
                "build's own as lora= (--lora), or build with these"
            )
        for name in ("layout", "backend", "target"):
            wanted, built = getattr(self, name), getattr(manifest, name)
            if wanted is not None and wanted != built:
                return f"{name} is {built}, the request is {wanted}: rebuild with --{name} {wanted}"
        if self.machine is not None and (reason := _cannot_run(manifest, self.machine)):
            return reason
        for name in ("height", "width", "num_frames", "condition_frames"):
            wanted, built = getattr(self, name), getattr(workload, name)
            if wanted is not None and wanted != built:
                flag = name.replace("_", "-")
                return f"built for {name} {built}, the request is {wanted}: rebuild with --{flag} {wanted}"
        if self.audio_num_frames not in (None, workload.audio_num_frames):
            return (
                f"built for {workload.audio_num_frames} latents of sound, the request's frame rate makes "
                f"{self.audio_num_frames}: rebuild with --frame-rate as the request has it"
            )
        if self.videos > manifest.max_batch:
            return (
                f"built for at most {manifest.max_batch} videos at once, the request is {self.videos}: "
                f"rebuild with --max-batch {self.videos}"
            )
        if reason := _rejects_skips(manifest, self.skips):
            return reason
        return next(filter(None, (_rejects(manifest, p) for p in self.perturbations)), None)


@dataclass(frozen=True)
class Build:
    """A complete build on disk."""

    folder: Path
    manifest: Manifest

    def check_files(self, *, whole: bool = False) -> None:
        """Raises EngineRejected unless the files are those of the manifest; `whole` reads each of them."""
        # Several segments may name the same file.
        for file in dict.fromkeys(file for record in self.manifest.segments for file in record.files):
            check_file(self.folder / file.name, file, whole=whole)

    def load_engines(self, stream: Stream) -> dict[str, Engine]:
        """Engines by segment name, after their files were checked against the manifest's hashes."""
        start = time.perf_counter()
        self.check_files()
        files = {
            record.segment.name: [self.folder / file.name for file in record.files]
            for record in self.manifest.segments
        }
        engines = load_engines(self.manifest.backend, files, stream)
        gb, seconds = self.manifest.engine_bytes / 1e9, time.perf_counter() - start
        _log.info("%s: %d engines of %.2f GB loaded in %.1f s", self.folder.name, len(engines), gb, seconds)
        return engines


@dataclass(frozen=True)
class EngineStore:
    """A folder with one sub-folder per build, or one such sub-folder, as it was when opened."""

    root: Path
    builds: tuple[Build, ...]
    unreadable: dict[str, str]

    @classmethod
    def open(cls, root: str | Path) -> EngineStore:
        """Reads every manifest; raises EngineRejected if the folder does not exist."""
        root = Path(root)
        if not root.is_dir():
            raise EngineRejected(
                f"engines: expected a folder made by stg-trt build, got {root}: check the path"
            )
        builds, unreadable = [], {}
        # `stg-trt build` prints the folder of a build, not the one around it.
        one_build = (root / manifests.FILE_NAME).exists()
        folders = (path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        for folder in [root] if one_build else sorted(folders):
            try:
                builds.append(Build(folder, manifests.load(folder)))
            except EngineRejected as error:
                unreadable[folder.name] = str(error)
        return cls(root, tuple(builds), unreadable)

    def find(self, request: EngineRequest) -> Build:
        """The first build that fits; raises EngineRejected with every reason.

        Builds for a GPU come first, then the order of the backends counts, then segmented before twin.
        """
        self.check_has_builds()
        rejected = dict(self.unreadable)
        for build in sorted(self.builds, key=lambda build: _preference(build.manifest)):
            reason = request.rejects(build.manifest)
            if reason is None:
                _log.info("%s fits", build.folder.name)
                return build
            _log.info("%s does not fit: %s", build.folder.name, reason)
            rejected[build.folder.name] = reason
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(rejected.items()))
        raise EngineRejected(f"engines: no build in {self.root} fits the request: {reasons}")

    def check_has_builds(self) -> None:
        """Raises EngineRejected if there is none, not even an unusable one."""
        if not self.builds and not self.unreadable:
            got = f"a folder without {manifests.FILE_NAME}" if any(self.root.iterdir()) else "an empty folder"
            raise EngineRejected(f"engines: expected a build in {self.root}, got {got}: build first")


def find_possible(store: EngineStore, request: EngineRequest, family: ModelFamily) -> Build:
    """The first build that fits; raises InvalidRequest for a size that no build of the family can have.

    Impossible sizes are reported first; otherwise the error would suggest a build that cannot exist.
    """
    try:
        return store.find(request)
    except EngineRejected:
        any_size = replace(request, height=None, width=None, num_frames=None, videos=1)
        known = store.find(any_size).manifest.workload
        family.check(known.resized(request.height, request.width, request.num_frames))
        raise


def check_file(path: Path, record: manifests.FileRecord, *, whole: bool = False) -> None:
    """Raises EngineRejected unless the file is the one that the build wrote; reads it if `whole`, or new."""
    if not path.is_file():
        raise EngineRejected(f"{path}: no such file: build the engines again")
    size = path.stat().st_size
    if size != record.bytes:
        raise EngineRejected(f"{path}: expected {record.bytes} bytes, got {size}: build the engines again")
    if kept_sha256(path, whole=whole) != record.sha256:
        raise EngineRejected(f"{path}: its contents changed after the build: build the engines again")


def _outdated(manifest: Manifest) -> str | None:
    """Its family's graphs are others now; which release built it does not matter."""
    try:
        now = export_version(manifest.model)
    except InvalidRequest:
        return f"built for {manifest.family}, which this release does not know: build the engines again"
    if manifest.export_version == now:
        return None
    return (
        f"built with export version {manifest.export_version} of {manifest.family}, this one makes {now}: "
        "build the engines again"
    )


def _preference(manifest: Manifest) -> tuple[bool, int, str]:
    backend = backend_for(manifest.backend)
    return _device(manifest) == "cpu", backends().index(backend), manifest.layout


def _device(manifest: Manifest) -> str:
    return backend_for(manifest.backend).target(manifest.target).device


def _cannot_run(manifest: Manifest, machine: Machine) -> str | None:
    if _device(manifest) == "cpu":
        return None
    gpu = machine.gpu
    if gpu is None:
        return "runs on an NVIDIA GPU, this machine has none: build with --backend onnxruntime"
    if manifest.target.startswith("sm_") and manifest.target != gpu.sm:
        return f"compiled for {manifest.target}, this GPU is {gpu.sm}: build with --target {gpu.sm}"
    if manifest.gpu is not None and manifest.gpu != gpu.identity:
        return f"compiled for {manifest.gpu}, this GPU is {gpu.identity}: build the engines again here"
    return None


def _rejects_skips(manifest: Manifest, skips: int) -> str | None:
    """Why a step of so many skip passes cannot run; None if it can."""
    if skips > 1 and manifest.layout == "twin":
        return f"the twin layout has one skip pass, the request has {skips}: rebuild with --layout segmented"
    if skips > max(1, len(manifest.skips)) and backend_for(manifest.backend).limits_rows:
        return (
            f"built for {len(manifest.skips)} skip passes, the request has {skips}: rebuild with "
            "--stg-blocks NAME=BLOCKS for each"
        )
    return None


def _rejects(manifest: Manifest, perturbation: Perturbation) -> str | None:
    built = manifest.perturbation
    wanted = f"--stg-mode {perturbation.mode} --stg-blocks {','.join(map(str, perturbation.blocks))}"
    if manifest.layout == "twin":
        if perturbation == built:
            return None
        if perturbation.stream:
            return (
                f"its skipped engine perturbs video and sound, the request the {perturbation.stream} alone: "
                "rebuild with --layout segmented, or give both an STG scale"
            )
        skipped = f"{built.mode} {list(built.blocks)}"
        return f"its skipped engine is {skipped}, the request is {wanted}: rebuild with it"
    if perturbation.mode not in (built.mode, "stg-r"):
        return f"built for {built.mode}, the request is {perturbation.mode}: rebuild with {wanted}"
    if not set(perturbation.blocks) <= set(built.blocks):
        return (
            f"can perturb blocks {list(built.blocks)}, the request is {list(perturbation.blocks)}: "
            f"rebuild with {wanted}"
        )
    return None
