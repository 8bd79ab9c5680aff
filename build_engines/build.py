"""Builds the engines of one model: cut, then per segment export, verify, compile and record."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import stg_trt
from stg_trt.engines import manifest as manifests
from stg_trt.engines.auto_backend import AUTO, choose_backend
from stg_trt.engines.backends import THIS_GPU, Backend, Target, backend_for, check_float8
from stg_trt.engines.float8_record import Float8Record
from stg_trt.engines.key import EngineKey, digest, export_version
from stg_trt.engines.manifest import Manifest, SegmentRecord
from stg_trt.engines.store import check_file
from stg_trt.errors import BackendUnavailable, EngineRejected, InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.passes import read_skips
from stg_trt.models.segment import Segment
from stg_trt.models.stream import SOUND
from stg_trt.models.workload import Workload, chosen_frame_rate
from stg_trt.system.gpu import GpuIdentity, find_gpu

from .build_folder import fresh_folder, locked_folder
from .calibration import Calibrator, converting
from .calibration_texts import shipped_prompts
from .compilers import compiler_for
from .guided_run import RunOptions
from .machine_needs import MachineNeeds
from .options import BuildOptions, CalibrationOptions
from .preview_fit import fit_preview
from .progress import Progress, Silent
from .reference import Reference
from .reproduction import KEPT_GRAPHS
from .reusable_files import ReusableFiles
from .segment_build import SegmentBuild
from .sizes import Size, choose_sizes
from .streamed_model import unchanged

_log = logging.getLogger(__name__)
_RECORDED_VERSIONS = ("torch", "diffusers", "onnx", "onnxscript", "onnxruntime")
# Above this, one row is verified: a second one of a full-size model would take minutes on a CPU.
_TWO_ROW_FLOPS = 2e11


def build(
    checkpoint: str | Path,
    output: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    sizes: str | Sequence[str] | None = None,
    text_length: int | None = None,
    stg_blocks: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    stg_mode: str | None = None,
    layout: str = "segmented",
    precision: str | None = None,
    max_batch: int = 1,
    backend: str = "onnxruntime",
    target: str | None = None,
    random_weights: bool = False,
    variant: str | None = None,
    revision: str | None = None,
    lora: Sequence[str | Path] = (),
    condition_frames: int = 0,
    frame_rate: float | None = None,
    blocks: Sequence[int] | None = None,
    verify_timesteps: int = 3,
    keep_onnx: bool = False,
    plugins: Sequence[str] = (),
    builder_optimization_level: int | None = None,
    refittable: bool = False,
    max_segment_gib: float | None = None,
    calibration_prompts: str | Path | None = None,
    calibration_steps: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Builds engines below `output` and returns the build folders: of every size, one per target.

    `checkpoint`, `variant`, `revision` and `lora` are those of `Checkpoint.open`. `backend` may be auto: the
    best that this machine can run. `sizes` are several at once, see `choose_sizes`. `stg_blocks` are those
    that a skip pass may perturb, or a mapping of them from the names of several passes. `target` may name
    several, separated by commas; it and `precision` default to the backend's, `text_length` to the family's.
    `condition_frames` is how many latent frames of pictures for later frames a call has; `frame_rate` decides
    how long the sound is. `blocks` shortens each list of blocks, with random weights; `plugins` are our own
    kernels. Builds with other weights refit `refittable` engines; `max_segment_gib` limits their weights.
    Raises InvalidRequest for unusable options, GateMissed for a segment that fails.
    """
    opened = Checkpoint.open(
        checkpoint, random_weights=random_weights, variant=variant, revision=revision, lora=lora
    ).shortened(blocks)
    family, progress = opened.family, progress or Silent()
    chosen, targets = _choose(backend, target, progress)
    sized = family, chosen.target(targets[0]), choose_sizes(sizes, height, width, num_frames)
    workloads = _workloads(*sized, text_length, precision, condition_frames, frame_rate)
    options = BuildOptions(
        checkpoint=opened, output=Path(output), workload=workloads[0], layout=layout, max_batch=max_batch,
        skips=read_skips(family.defaults.stg_blocks if stg_blocks is None else stg_blocks),
        stg_mode=family.defaults.stg_mode if stg_mode is None else stg_mode, backend=chosen, targets=targets,
        verify_timesteps=verify_timesteps, keep_onnx=keep_onnx, plugins=tuple(sorted(set(plugins))),
        max_segment_gib=max_segment_gib, builder_optimization_level=builder_optimization_level,
        refittable=refittable, calibration=CalibrationOptions.read(calibration_prompts, calibration_steps),
    )  # fmt: skip
    return _build_all([replace(options, workload=workload) for workload in workloads], progress)


def _build_all(builds: Sequence[BuildOptions], progress: Progress) -> list[Path]:
    """One after the other; all of them can be built before the first one is."""
    builds[0].checkpoint.check()
    with fresh_folder(builds[0].output):
        return [folder for options in builds for folder in _Builder(options, progress).run()]


def _workloads(
    family: ModelFamily,
    target: Target,
    sizes: Sequence[Size],
    text_length: int | None,
    precision: str | None,
    condition_frames: int,
    frame_rate: float | None,
) -> list[Workload]:
    if text_length is None:
        text_length = family.defaults.text_length
    precision = precision or target.precisions[0]
    return [
        Workload(
            size.height,
            size.width,
            size.num_frames,
            text_length,
            precision,
            condition_frames,
            _audio_num_frames(family, size.num_frames, frame_rate),
            target.activations(precision),
        )
        for size in sizes
    ]


def _audio_num_frames(family: ModelFamily, num_frames: int, frame_rate: float | None) -> int:
    """Latents of the sound; raises InvalidRequest for a frame rate of a model whose builds have none."""
    if frame_rate is not None and SOUND not in family.streams:
        raise InvalidRequest(
            f"frame_rate: expected none in a build of {family.name}, whose engines run at any, got "
            f"{frame_rate}: give it to the call"
        )
    return family.audio_num_frames(num_frames, chosen_frame_rate(frame_rate, family.defaults.frame_rate))


def _choose(backend: str, target: str | None, progress: Progress) -> tuple[Backend, tuple[str, ...]]:
    """The backend and its targets; for auto, the best for this machine, which is printed."""
    if backend == AUTO:
        choice = choose_backend(find_gpu())
        progress.choose(str(choice))
        backend, target = choice.backend, target or choice.target
    chosen = backend_for(backend)
    return chosen, tuple((target or chosen.targets[0].name).split(","))


class _Builder:
    """One run over the segments, for all targets at once."""

    def __init__(self, options: BuildOptions, progress: Progress) -> None:
        self.options = options
        self.progress = progress
        self.weights = options.checkpoint.fingerprint()
        self.segment_weights = {
            segment: options.checkpoint.segment_fingerprint(segment) for segment in options.segments
        }
        self.compiler = compiler_for(options)
        self.backend_version = self.compiler.version
        self.gpus = {target: _compiled_on(target, options) for target in options.targets}
        self.float8 = _calibrated(options, progress)

    def run(self) -> list[Path]:
        """Builds what is missing under the locks of the build folders."""
        folders = {target: self.options.output / self._folder_name(target) for target in self.options.targets}
        with ExitStack() as locks:
            # In the order of their names, so that two builds of the same targets cannot wait for each other.
            for folder in sorted(folders.values()):
                locks.enter_context(locked_folder(folder, self.progress.wait))
                shutil.rmtree(folder / "work", ignore_errors=True)
            self._build(folders)
        return list(folders.values())

    def _build(self, folders: dict[str, Path]) -> None:
        options = self.options
        manifest = {target: self._resume(folder, target) for target, folder in folders.items()}
        missing = {segment: self._missing(segment, folders, manifest) for segment in options.segments}
        MachineNeeds(options, {segment: len(keys) for segment, keys in missing.items() if keys}).check()
        self.progress.start(options.name, options.segments)
        reference = Reference(
            options.checkpoint,
            options.workload,
            options.segments,
            options.verify_timesteps,
            2 if self._row_flops() < _TWO_ROW_FLOPS else 1,
            self.compiler.reference_device(),
            converting(self.float8, options.checkpoint.family.transformers) if self.float8 else unchanged,
        )
        for segment, keys in missing.items():
            if not keys:
                record = manifest[options.targets[0]].record(segment.name)
                assert record is not None
                _log.info("%s: already built", segment.name)
                self.progress.finish(segment, record, reused=True)
                continue
            work = folders[next(iter(keys))] / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                stages = SegmentBuild(options, self.compiler, segment, reference, work, self.progress)
                for target, key in keys.items():
                    record = stages.compile(key, ReusableFiles(folders[target], manifest[target], key))
                    manifest[target] = _with(manifest[target], record, options.segments)
                    manifests.save(manifest[target], folders[target])
                    self.progress.finish(segment, record, reused=False)
                self.compiler.keep(work)
            finally:
                if options.keep_onnx:
                    _keep(work, work.with_name(KEPT_GRAPHS))
                shutil.rmtree(work, ignore_errors=True)
        preview = next((one.preview for one in manifest.values()), None)
        preview = preview or fit_preview(options.checkpoint, options.workload)
        for target, folder in folders.items():
            changes = {"preview": preview, "complete": True}
            manifests.save(manifest[target].model_copy(update=changes), folder)
            ReusableFiles(folder, manifest[target]).share()

    def _missing(
        self, segment: Segment, folders: dict[str, Path], manifest: dict[str, Manifest]
    ) -> dict[str, EngineKey]:
        """The keys of a segment's engines that neither this build has, by target, nor one beside it."""
        missing = {}
        for target, folder in folders.items():
            if manifest[target].record(segment.name) is not None:
                continue
            key = self._key(segment, target)
            files = ReusableFiles(folder, manifest[target])
            # The graphs that --keep-onnx asks for are made by building alone.
            found = None if self.options.keep_onnx else files.take_segment(key, self.options.verify_timesteps)
            if found is None:
                missing[target] = key
            else:
                manifest[target] = _with(manifest[target], found, self.options.segments)
                manifests.save(manifest[target], folder)
        return missing

    def _row_flops(self) -> int:
        family = self.options.checkpoint.family
        return sum(family.segment_flops(segment, self.options.workload) for segment in self.options.segments)

    def _scales(self, segment: Segment) -> str:
        """A digest of the scales of a segment's FP8 layers."""
        part = self.options.checkpoint.family.transformers[segment.expert]
        return self.float8.digest(part, segment.blocks) if self.float8 else ""

    def _folder_name(self, target: str) -> str:
        keys = [self._key(segment, target).facts() for segment in self.options.segments]
        return f"{self.options.name}-{target}-{digest({'keys': keys})[:8]}"

    def _resume(self, folder: Path, target: str) -> Manifest:
        """The folder's manifest with only those segments that are whole and verified, or a new one."""
        try:
            found = manifests.load(folder)
        except EngineRejected:
            return self._new_manifest(target)
        kept = []
        for record in found.segments:
            if len(record.verification) < self.options.verify_timesteps:
                continue
            try:
                for file in record.files:
                    check_file(folder / file.name, file)
            except EngineRejected:
                continue
            kept.append(record)
        changes = {"segments": tuple(kept), "skip_passes": dict(self.options.skips), "complete": False}
        return found.model_copy(update=changes)

    def _new_manifest(self, target: str) -> Manifest:
        options = self.options
        versions = {name: version(name) for name in _RECORDED_VERSIONS}
        versions[options.backend.name] = self.backend_version
        return Manifest(
            stg_trt_version=stg_trt.__version__,
            export_version=export_version(options.checkpoint.family),
            versions=versions,
            backend=options.backend.name,
            target=target,
            gpu=self.gpus[target],
            family=options.checkpoint.family.name,
            transformer_config=options.checkpoint.transformer_config,
            vae_config=options.checkpoint.vae_config,
            image_encoder_config=options.checkpoint.image_encoder_config,
            weights=self.weights,
            lora=options.checkpoint.applied_lora,
            workload=options.workload,
            layout=options.layout,
            stg_mode=options.stg_mode,
            stg_blocks=options.stg_blocks,
            skip_passes=dict(options.skips),
            max_batch=options.max_batch,
            float8=self.float8,
            complete=False,
            segments=(),
        )

    def _key(self, segment: Segment, target: str) -> EngineKey:
        options, family = self.options, self.options.checkpoint.family
        return EngineKey(
            weights=self.segment_weights[segment],
            export_version=export_version(family),
            segment=segment,
            inputs=tuple(family.inputs(segment, options.workload)),
            outputs=tuple(family.outputs(segment, options.workload)),
            profiles=self.compiler.profiles(segment),
            precision=options.workload.precision,
            opset=self.compiler.opset,
            backend=options.backend.name,
            backend_version=self.backend_version,
            target=target,
            gpu=self.gpus[target],
            flags=self.compiler.flags(target),
            float8=self._scales(segment),
        )


def _calibrated(options: BuildOptions, progress: Progress) -> Float8Record | None:
    """What makes the layers FP8; None for other precisions."""
    if not options.workload.is_float8:
        return None
    chosen = options.calibration
    run = RunOptions(
        options.checkpoint,
        options.workload,
        options.segmented,
        options.stg_mode,
        options.skips,
        chosen.num_steps,
    )
    prompts = shipped_prompts() if chosen.prompts is None else chosen.prompts
    return Calibrator(run, prompts, options.output, progress).calibrate()


def _compiled_on(target: str, options: BuildOptions) -> GpuIdentity | None:
    """The GPU that engines for `this-gpu` are compiled on and for; None for other targets."""
    if target != THIS_GPU:
        return None
    gpu = find_gpu()
    if gpu is None:
        raise BackendUnavailable(
            f"{options.backend.name}: expected an NVIDIA GPU for --target {THIS_GPU}, got none: "
            "build on the machine that will run the engines, or use --backend onnxruntime"
        )
    check_float8(gpu.sm, options.workload.precision)
    return gpu.identity


def _with(manifest: Manifest, record: SegmentRecord, order: Sequence[Segment]) -> Manifest:
    """The manifest with a finished segment, in the order that the segments run in."""
    names = [segment.name for segment in order]
    others = (other for other in manifest.segments if other.segment.name != record.segment.name)
    records = sorted((*others, record), key=lambda finished: names.index(finished.segment.name))
    return manifest.model_copy(update={"segments": tuple(records)})


def _keep(work: Path, kept: Path) -> None:
    """Moves a segment's remaining files, its graphs, to a place that the next segment does not delete."""
    kept.mkdir(exist_ok=True)
    for path in work.iterdir():
        path.replace(kept / path.name)
