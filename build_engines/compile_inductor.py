"""Segments as chains of AOTInductor packages: each distinct piece is traced and compiled once.

A segment is cut into embedding, single blocks and head. Pieces with the same key share a trace, and those
with the same graph a package, which holds no weights: those of a segment lie in one safetensors file, whose
header describes the chain.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend

from stg_trt.engines.inductor_chain import Chain, Piece, check_compiler, machine_facts
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import Segment
from stg_trt.system.stream import Stream, open_stream

from .aoti_package import OPTIONS, attention_kernels, compile_package, fused_attentions
from .compiler import CPU, Compiled, Compiler, Exported, Job, SegmentExport, Tolerance, tolerance_of
from .inductor_runs import InductorRuns, KernelRefused
from .options import BuildOptions
from .piece_key import PieceKey
from .reusable_files import ReusableFiles
from .trace import Trace, trace

_log = logging.getLogger(__name__)
# Raised when the same program becomes another package.
_PACKAGES = 2
# 16 bytes of bfloat16, which the memory-efficient kernel and cuDNN's want of each row of a mask.
_MASKED_KEYS_MULTIPLE = 8
# One that is fused, and plain arithmetic.
_LEAST_KERNELS = 2


@dataclass(frozen=True)
class ExportedPiece:
    """A piece's program by its fingerprint, and the names at its borders."""

    name: str
    fingerprint: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class ExportedChain(Exported):
    """One program of each kind, and the weights of every piece, `<place>.<weight>`."""

    pieces: tuple[ExportedPiece, ...] = ()
    programs: dict[str, ExportedProgram] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


class InductorCompiler(Compiler):
    """torch.export and AOTInductor; the numerics gate runs the finished engine on its own device."""

    def __init__(self, options: BuildOptions) -> None:
        super().__init__(options)
        self._streams: dict[str, Stream] = {}
        # By target, without those that refused to run.
        self._attention: dict[str, tuple[SDPBackend, ...]] = {}
        # Of all segments. Each holds one piece's weights, so that it can still be compiled.
        self._traces: dict[PieceKey, Trace] = {}

    @property
    def version(self) -> str:
        """torch's; raises BackendUnavailable where a target cannot be compiled for here."""
        for target in self.options.targets:
            check_compiler(self._device_name(target))
        return str(torch.__version__)

    @property
    def tolerance(self) -> Tolerance:
        """That of the engine's own arithmetic."""
        return tolerance_of(self.options.workload)

    def flags(self, target: str) -> tuple[str, ...]:
        """The options, and the instruction sets that the code needs."""
        options = (f"{name}={value}" for name, value in OPTIONS.items())
        return *options, *machine_facts(self._device_name(target))

    def reference_device(self) -> torch.device:
        """The GPU, where the engines are for it alone."""
        devices = {self._device_name(target) for target in self.options.targets}
        return torch.device("cuda") if devices == {"cuda"} else CPU

    def export(self, job: Job) -> ChainExport:
        """One trace for all pieces that differ in weights alone, in this segment and the ones before."""
        return ChainExport(self, job)

    def compile(self, job: Job, exported: Exported, target: str, finished: ReusableFiles) -> Compiled:
        """The packages that no build has yet, and the weights with the chain in their header.

        Where an attention kernel refuses to run, the next best one takes its place in all that follows.
        """
        assert isinstance(exported, ExportedChain)
        while True:
            try:
                return self._compiled(job, exported, target, finished)
            except KernelRefused as error:
                refused, *others = self._attention_kernels(target)
                if len(others) < _LEAST_KERNELS:
                    raise
                self._attention[target] = tuple(others)
                _log.info("%s: no %s attention: %s", job.segment.name, refused.name, error)
                warnings.warn(
                    f"inductor: {error}; compiling it again without {refused.name}, the fastest attention "
                    f"kernel, for {others[0].name}",
                    stacklevel=2,
                )

    def _compiled(self, job: Job, exported: ExportedChain, target: str, finished: ReusableFiles) -> Compiled:
        stream = self._stream(target)
        names = {piece.fingerprint: self._package_name(piece, target) for piece in exported.pieces}
        packages = {}
        for graph, name in names.items():
            found = finished.take(name, job.work)
            if found is None:
                job.on_progress(f"compile for {target}: {name}")
                path, kernels = job.work / name, self._attention_kernels(target)
                found = compile_package(exported.programs[graph], path, stream.torch_device, kernels)
            packages[graph] = found
        weights = job.work / f"{job.segment.name}.safetensors"
        chain = self._chain(job, exported, names, stream)
        save_file(exported.weights, weights, chain.to_metadata())
        # safetensors makes its files readable for their owner only.
        shutil.copymode(next(iter(packages.values())), weights)
        files = (weights, *packages.values())
        runs = InductorRuns(job, files, stream)
        activation_bytes = runs.activation_bytes()
        fused = Counter[str]()
        for piece in exported.pieces:
            fused += fused_attentions(packages[piece.fingerprint])
        found_kernels = tuple(sorted(fused))
        return Compiled(files, fused.total(), activation_bytes, lambda: runs.run, (), found_kernels)

    def _attention_kernels(self, target: str) -> tuple[SDPBackend, ...]:
        return self._attention.get(target) or attention_kernels(self._stream(target).torch_device)

    def trace(self, job: Job, piece: Segment, module: SegmentModule) -> Trace:
        """What a piece computes; made unless an earlier one has the same key."""
        key = self.piece_key(piece, module, job.rows[2])
        if key in self._traces:
            _log.info("%s: %s has the program of an earlier piece", job.segment.name, piece.name)
        else:
            _log.info("%s: tracing %s", job.segment.name, piece.name)
            self._traces[key] = trace(job.segment.name, module, key.inputs, key.outputs, key.max_rows)
        return self._traces[key]

    def _chain(self, job: Job, exported: ExportedChain, names: dict[str, str], stream: Stream) -> Chain:
        tensors = self.options.checkpoint.family.tensors(self.options.workload)
        used = {name for piece in exported.pieces for name in (*piece.inputs, *piece.outputs)}
        return Chain(
            torch=str(torch.__version__),
            machine=machine_facts(stream.torch_device.type),
            max_rows=job.rows[2],
            inputs=tuple(spec.name for spec in job.inputs),
            outputs=tuple(spec.name for spec in job.outputs),
            tensors=tuple(spec for name, spec in tensors.items() if name in used),
            pieces=tuple(
                Piece(names[piece.fingerprint], piece.inputs, piece.outputs) for piece in exported.pieces
            ),
        )

    def _package_name(self, piece: ExportedPiece, target: str) -> str:
        """Names all that the package is made from: whoever finds it by its name can use it."""
        kernels = (kernel.name for kernel in self._attention_kernels(target))
        device = self._device_name(target)
        facts = (piece.fingerprint, torch.__version__, device, *self.flags(target), *kernels, _PACKAGES)
        return f"{piece.name}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.pt2"

    def _stream(self, target: str) -> Stream:
        if target not in self._streams:
            self._streams[target] = open_stream(self._device_name(target))
        return self._streams[target]

    def _device_name(self, target: str) -> str:
        return self.options.backend.target(target).device


class ChainExport(SegmentExport):
    """The chain of a segment while it grows; its packages alone show the engines' numerics."""

    def __init__(self, compiler: InductorCompiler, job: Job) -> None:
        self._compiler = compiler
        self._job = job
        self._pieces: list[ExportedPiece] = []
        self._programs: dict[str, ExportedProgram] = {}
        self._weights: dict[str, Tensor] = {}

    def append(self, piece: Segment, module: SegmentModule) -> None:
        module.masked_keys_multiple = _MASKED_KEYS_MULTIPLE
        traced, place = self._compiler.trace(self._job, piece, module), len(self._pieces)
        self._pieces.append(ExportedPiece(piece.name, traced.fingerprint, module.inputs, module.outputs))
        self._programs[traced.fingerprint] = traced.program
        self._weights |= {f"{place}.{name}": value for name, value in traced.weights_of(module).items()}

    def finish(self) -> ExportedChain:
        graphs = "".join(piece.fingerprint for piece in self._pieces)
        return ExportedChain(
            hashlib.sha256(graphs.encode()).hexdigest(),
            pieces=tuple(self._pieces),
            programs=self._programs,
            weights=self._weights,
        )
