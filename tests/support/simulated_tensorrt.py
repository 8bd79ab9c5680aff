"""A strict stand-in for TensorRT: the same names, engines run by ONNX Runtime on the addresses it is given.

It enforces what TensorRT documents and a GPU would punish silently: every address and shape set
before execution, shapes within the profile, aligned addresses, no default stream, warm-up before capture,
one context per graph, no host reads during capture. Any call can be made to fail.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from tests.support.simulated_cuda import RuleBroken, SimulatedGpu, SimulatedGraph

# torch's CPU allocator guarantees this much; a GPU's guarantees 256, and so TensorRT asks for that.
ALIGNMENT = 64
WARMUPS = 2
_NUMPY = {"tensor(float)": np.float32, "tensor(bool)": np.bool_, "tensor(int64)": np.int64}
_NAMES = {"tensor(float)": "FLOAT", "tensor(bool)": "BOOL", "tensor(int64)": "INT64"}


class TensorIOMode(enum.Enum):
    INPUT = 0
    OUTPUT = 1


class SimulatedTensorRT(SimulatedGpu):
    """Takes the place of the imported module; `profiles` are (min, max) rows of every engine.

    Those whose plans are in `profiles_by_plan` have these instead.
    """

    __version__ = "11.0.0"
    TensorIOMode = TensorIOMode
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

        def log(self, severity: int, message: str) -> None:
            raise NotImplementedError

    def __init__(self, *profiles: tuple[int, int]) -> None:
        super().__init__()
        self.profiles = profiles
        self.profiles_by_plan: dict[bytes, tuple[tuple[int, int], ...]] = {}
        self.profiles_used: list[int] = []
        self.says: list[str] = []
        """Tells the library's log, before a call fails."""

    def Runtime(self, logger: Any) -> Any:
        if "Runtime" in self.failing:
            self.tell(logger)
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return _Runtime(self, logger)

    def load(self, plan: bytes) -> Any:
        return _Engine(self, plan)

    def tell(self, logger: Any) -> None:
        """Writes why a call fails to its log."""
        logger.log(self.ILogger.INFO, "loaded engine size: 1 MiB")
        for message in self.says:
            logger.log(self.ILogger.ERROR, message)


class SimulatedTensorRTRtx(SimulatedTensorRT):
    """The additions of TensorRT-RTX; `gpu` stands for all that its kernels are compiled for."""

    CudaGraphStrategy = SimpleNamespace(DISABLED="disabled")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def __init__(self, *profiles: tuple[int, int], gpu: str = "a") -> None:
        super().__init__(*profiles)
        self.gpu = gpu
        self.compilations = 0


class _RuntimeCache:
    def __init__(self, sim: SimulatedTensorRTRtx) -> None:
        self.header = f"kernels for {sim.gpu}: ".encode()
        self.kernels: set[str] = set()

    def serialize(self) -> bytes:
        return self.header + " ".join(sorted(self.kernels)).encode()

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(self.header):
            return False
        self.kernels = set(blob.removeprefix(self.header).decode().split())
        return True


class _RuntimeConfig:
    def __init__(self, sim: SimulatedTensorRTRtx) -> None:
        self.sim = sim
        self.cuda_graph_strategy = "whole graph capture"
        self.dynamic_shapes_kernel_specialization_strategy = "lazy"
        self.allocation = "static"
        self.cache: _RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> _RuntimeCache:
        return _RuntimeCache(self.sim)

    def set_runtime_cache(self, cache: _RuntimeCache) -> None:
        self.cache = cache


class _Runtime:
    def __init__(self, sim: SimulatedTensorRT, logger: Any) -> None:
        self.sim = sim
        self.logger = logger

    def deserialize_cuda_engine(self, plan: mmap.mmap) -> Any:
        if not isinstance(plan, mmap.mmap):
            raise RuleBroken("a plan of several GB was copied to memory")
        if "deserialize_cuda_engine" in self.sim.failing:
            self.sim.tell(self.logger)
            return None
        return self.sim.load(bytes(plan))


class _Engine:
    device_memory_size_v2 = 1 << 12

    def __init__(self, sim: SimulatedTensorRT, data: bytes) -> None:
        self.sim = sim
        self.session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
        nodes = [(n, TensorIOMode.INPUT) for n in self.session.get_inputs()]
        nodes += [(n, TensorIOMode.OUTPUT) for n in self.session.get_outputs()]
        self.nodes = {node.name: (node, mode) for node, mode in nodes}
        self.num_io_tensors = len(nodes)
        self.profiles = sim.profiles_by_plan.get(data, sim.profiles)
        self.num_optimization_profiles = len(self.profiles)
        self.cache: _RuntimeCache | None = None

    def get_tensor_name(self, index: int) -> str:
        name: str = list(self.nodes)[index]
        return name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.nodes[name][1]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_NAMES[self.nodes[name][0].type])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        low, high = self.profiles[profile]
        return [self._with_rows(name, rows) for rows in (low, high, high)]

    def _with_rows(self, name: str, rows: int) -> tuple[int, ...]:
        return tuple(rows if isinstance(dim, str) else dim for dim in self.nodes[name][0].shape)

    def create_execution_context(self, strategy: Any) -> Any:
        if self.sim.capturing:
            raise RuleBroken("a context was created during capture")
        if isinstance(self.sim, SimulatedTensorRTRtx):
            chosen = (
                strategy.cuda_graph_strategy,
                strategy.dynamic_shapes_kernel_specialization_strategy,
                strategy.allocation,
            )
            if chosen != ("disabled", "eager", "user managed"):
                raise RuleBroken(f"settings under which a step cannot be captured: {chosen}")
            self.cache = strategy.cache
        return None if "create_execution_context" in self.sim.failing else _Context(self)

    def create_runtime_config(self) -> _RuntimeConfig:
        assert isinstance(self.sim, SimulatedTensorRTRtx)
        return _RuntimeConfig(self.sim)

    def compile(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """TensorRT-RTX compiles kernels at the first run of a shape, unless its cache has them."""
        kernel = "x".join(str(dim) for shape in shapes.values() for dim in shape)
        if self.cache is not None and kernel not in self.cache.kernels:
            if self.sim.capturing:
                raise RuleBroken("kernels were compiled during capture")
            self.cache.kernels.add(kernel)
            assert isinstance(self.sim, SimulatedTensorRTRtx)
            self.sim.compilations += 1


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.sim = engine.sim
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.profile: int | None = None
        self.memory: tuple[int, int] | None = None
        self.enqueues_since_change = 0
        self.graph: SimulatedGraph | None = None

    def set_device_memory(self, address: int, size: int) -> None:
        if address % ALIGNMENT or size < self.engine.device_memory_size_v2:
            raise RuleBroken("device memory too small or not aligned")
        self.memory = (address, size)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if stream == 0:
            raise RuleBroken("the default stream synchronises the device")
        if "set_optimization_profile_async" in self.sim.failing:
            return False
        if not 0 <= index < len(self.engine.profiles):
            raise RuleBroken(f"no profile {index}")
        self._changed()
        self.profile = index
        self.sim.profiles_used.append(index)
        self.shapes = {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.profile is None:
            raise RuleBroken("a shape was set before the profile, which forgets it")
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        fits = len(low) == len(shape) and all(
            least <= got <= most for least, got, most in zip(low, shape, high, strict=True)
        )
        if "set_input_shape" in self.sim.failing or not fits:
            return False
        self._changed()
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if "set_tensor_address" in self.sim.failing:
            return False
        if name not in self.engine.nodes or address == 0 or address % ALIGNMENT:
            raise RuleBroken(f"{name}: unknown, null or unaligned address {address}")
        self._changed()
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        inputs = [n for n, (_, mode) in self.engine.nodes.items() if mode is TensorIOMode.INPUT]
        return [name for name in inputs if name not in self.shapes]

    def execute_async_v3(self, stream: int) -> bool:
        if stream == 0:
            raise RuleBroken("the default stream synchronises the device")
        if self.memory is None or self.addresses.keys() != self.engine.nodes.keys() or self.infer_shapes():
            raise RuleBroken("executed before all memory, addresses and shapes were set")
        if self.sim.capturing:
            if self.enqueues_since_change < WARMUPS:
                raise RuleBroken("captured before the warm-up")
            if self.graph not in (None, self.sim.graph):
                raise RuleBroken("a context belongs to one live graph")
            self.graph = self.sim.graph
        if "execute_async_v3" in self.sim.failing:
            return False
        self.engine.compile(self.shapes)
        self.enqueues_since_change += 1
        self._run()
        return True

    def _changed(self) -> None:
        if self.graph is not None:
            raise RuleBroken("a captured context was changed")
        self.enqueues_since_change = 0

    def _run(self) -> None:
        rows = next(
            shape[declared.index("rows")]
            for name, shape in self.shapes.items()
            if "rows" in (declared := self.engine.nodes[name][0].shape)
        )
        views = {}
        for name, (node, _) in self.engine.nodes.items():
            shape = [rows if isinstance(dim, str) else dim for dim in node.shape]
            views[name] = _view(self.addresses[name], shape, _NUMPY[node.type])
        outputs = [name for name, (_, mode) in self.engine.nodes.items() if mode is TensorIOMode.OUTPUT]
        feed = {name: view for name, view in views.items() if name not in outputs}
        for name, value in zip(outputs, self.engine.session.run(outputs, feed), strict=True):
            views[name][...] = value


def _view(address: int, shape: list[int], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_byte * size).from_address(address)
    return np.frombuffer(memory, dtype=dtype).reshape(shape)
