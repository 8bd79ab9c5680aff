"""TensorRT and TensorRT-RTX sessions: the same calls, with what RTX adds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stg_trt.engines.tensorrt_library import has_plugins, load_library, load_plugins
from stg_trt.engines.tensorrt_runtime import error_log, open_runtime, read_engine
from stg_trt.errors import EngineRejected
from stg_trt.system.files import write_atomically

_ALIGNMENT_BYTES = 256
_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "INT64": torch.int64,
    "INT32": torch.int32,
}


class Arena:
    """One activation memory for all contexts of a sampler: they run one after the other on one stream."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self._memory = torch.empty(size + _ALIGNMENT_BYTES, dtype=torch.uint8, device=device)
        self.address = -(-self._memory.data_ptr() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


@dataclass(frozen=True)
class ShapeRange:
    """The range of shapes that a profile allows for an input."""

    low: tuple[int, ...]
    high: tuple[int, ...]

    @classmethod
    def of_profile(cls, shapes: Sequence[Sequence[int]]) -> ShapeRange:
        """From a profile's (min, opt, max)."""
        return cls(tuple(shapes[0]), tuple(shapes[2]))

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape is inside."""
        return len(shape) == len(self.low) and all(
            low <= dim <= high for low, dim, high in zip(self.low, shape, self.high, strict=True)
        )

    def __str__(self) -> str:
        low, high = ("x".join(map(str, shape)) for shape in (self.low, self.high))
        return low if low == high else f"{low} to {high}"


class TensorRTEngine:
    """A deserialised engine; its contexts share its weights and the arena."""

    alignment = _ALIGNMENT_BYTES

    def __init__(self, trt: Any, engine: Any, path: Path) -> None:
        self._trt = trt
        self.path = path
        self.engine = engine
        self.arena: Arena | None = None
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.inputs = {n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT}
        self.dtypes = {n: _DTYPES[self.engine.get_tensor_dtype(n).name] for n in names}
        self.profiles = [
            {n: ShapeRange.of_profile(engine.get_tensor_profile_shape(n, i)) for n in self.inputs}
            for i in range(engine.num_optimization_profiles)
        ]
        self._rtx = RtxSettings(trt, self.engine, path) if hasattr(trt, "CudaGraphStrategy") else None

    @property
    def activation_bytes(self) -> int:
        """Device memory that a context needs while it runs."""
        return int(self.engine.device_memory_size_v2)

    def context(self) -> TensorRTContext:
        """A new context; raises EngineRejected if there is no memory for one."""
        assert self.arena is not None
        trt = self._trt
        if self._rtx is not None:
            context = self.engine.create_execution_context(self._rtx.config)
        else:
            context = self.engine.create_execution_context(
                trt.ExecutionContextAllocationStrategy.USER_MANAGED
            )
        if context is None:
            raise EngineRejected(
                f"{self.path}: expected an execution context, got none: free GPU memory or use a smaller size"
            )
        context.set_device_memory(self.arena.address, self.arena.size)
        return TensorRTContext(self, context)

    def keep_kernels(self) -> None:
        """Called after a first run: keeps the kernels it compiled for the next process (TensorRT-RTX)."""
        if self._rtx is not None:
            self._rtx.save_cache()


class RtxSettings:
    """TensorRT-RTX compiles its kernels on the GPU: for the shapes at hand, and once per machine.

    Its own CUDA graphs are off, since steps are captured here.
    """

    def __init__(self, trt: Any, engine: Any, path: Path) -> None:
        self.config = engine.create_runtime_config()
        self.config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        self.config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        self.config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        self._path = path.with_suffix(".kernels")
        self._kept = self._path.read_bytes() if self._path.exists() else b""
        self._cache = self.config.create_runtime_cache()
        if self._kept and not self._cache.deserialize(self._kept):
            # Of another GPU, driver or version, or damaged: compiled again, and then replaced.
            self._kept = b""
        self.config.set_runtime_cache(self._cache)

    def save_cache(self) -> None:
        """Writes the compiled kernels beside the engine, whole or not at all, if there are new ones."""
        compiled = bytes(self._cache.serialize())
        if compiled == self._kept:
            return
        self._kept = compiled
        try:
            write_atomically(self._path, compiled)
        except OSError as error:
            warnings.warn(
                f"{self._path}: compiled kernels cannot be kept ({error.strerror}), "
                "the next process compiles them again",
                stacklevel=2,
            )


class TensorRTContext:
    """Remembers what is bound; the first enqueue after a change picks the profile and sets all of it."""

    def __init__(self, engine: TensorRTEngine, context: Any) -> None:
        self._engine = engine
        self._context = context
        self._bound: dict[str, Tensor] = {}
        self._set = False

    def bind(self, name: str, tensor: Tensor) -> None:
        """Gives an input or output its memory and its shape; raises EngineRejected if it does not fit."""
        engine = self._engine
        assert tensor.is_contiguous() and tensor.data_ptr() % engine.alignment == 0, name
        expected = engine.dtypes.get(name)
        if expected != tensor.dtype:
            raise EngineRejected(
                f"{engine.path}: expected {name} as {expected}, got {tensor.dtype}: build again"
            )
        if name in engine.inputs:
            self._check_shape(name, tuple(tensor.shape))
        self._bound[name] = tensor
        self._set = False

    def enqueue(self, stream: int) -> None:
        """Runs on a stream; raises EngineRejected or RuntimeError if TensorRT refuses."""
        first = not self._set
        if first:
            self._set_all(stream)
        if not self._context.execute_async_v3(stream):
            raise RuntimeError(f"{self._engine.path.name}: execute_async_v3 failed")
        if first:
            self._engine.keep_kernels()

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        ranges = dict.fromkeys(profile[name] for profile in self._engine.profiles)
        if not any(known.holds(shape) for known in ranges):
            raise EngineRejected(
                f"{self._engine.path}: expected {name} of shape {' or '.join(map(str, ranges))}, "
                f"got {'x'.join(map(str, shape))}: rebuild with a larger --max-batch"
            )

    def _set_all(self, stream: int) -> None:
        """The profile comes first: setting it forgets the shapes."""
        path, context = self._engine.path, self._context
        missing = self._engine.dtypes.keys() - self._bound.keys()
        assert not missing, f"{path.name}: {missing} not bound"
        if not context.set_optimization_profile_async(self._profile(), stream):
            raise EngineRejected(f"{path}: set_optimization_profile_async failed: build again")
        for name, tensor in self._bound.items():
            shape = tuple(tensor.shape)
            if name in self._engine.inputs and not context.set_input_shape(name, shape):
                raise EngineRejected(f"{path}: set_input_shape failed for {name} of {shape}: build again")
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise EngineRejected(f"{path}: set_tensor_address failed for {name}: build again")
        unresolved = context.infer_shapes()
        if unresolved:
            raise RuntimeError(f"{path.name}: shapes of {unresolved} are not known")
        self._set = True

    def _profile(self) -> int:
        """The first profile that holds all inputs together."""
        shapes = {name: tuple(self._bound[name].shape) for name in self._engine.inputs}
        for index, ranges in enumerate(self._engine.profiles):
            if all(ranges[name].holds(shape) for name, shape in shapes.items()):
                return index
        raise EngineRejected(
            f"{self._engine.path}: expected inputs of one profile, got {shapes}: bind the same number of rows"
        )


def load_all(
    backend: str, files: Mapping[str, Sequence[Path]], device: torch.device
) -> dict[str, TensorRTEngine]:
    """All engines of a build on one arena; raises BackendUnavailable without the library or a GPU.

    Raises EngineRejected for an engine of another GPU or version, OutOfDeviceMemory if one has no room.
    """
    trt = load_library(backend)
    log = error_log(trt)
    runtime = open_runtime(trt, backend, log)
    if has_plugins():
        load_plugins(backend)
    engines = {
        name: TensorRTEngine(trt, read_engine(trt, backend, runtime, paths[0], log), paths[0])
        for name, paths in files.items()
    }
    arena = Arena(max(engine.activation_bytes for engine in engines.values()), device)
    for engine in engines.values():
        engine.arena = arena
    return engines
