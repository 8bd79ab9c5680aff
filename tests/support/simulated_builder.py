"""A strict stand-in for TensorRT's builder: it reads real graphs and compiles them for no GPU.

Its engines tell an inspector the kernels that TensorRT would name, and how much memory they need. It enforces
what TensorRT documents: strong types, profiles for every dynamic input, timings of one GPU and version only.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
from onnx import numpy_helper

from tests.support.simulated_tensorrt import RuleBroken, SimulatedTensorRT

# As TensorRT 10 and 11 name one fused attention after another.
ENTERPRISE_NAMES = ("_gemm_mha_v2_myl0_{i}", "__mye80{i}_gemm_mha_v2", "_gemm_mha_v2_0x1c3f{i:04x}")


class LayerInformationFormat(enum.Enum):
    ONELINE = 0
    JSON = 1


class IProgressMonitor:
    pass


class IStreamWriter:
    pass


class SimulatedTensorRTBuilder(SimulatedTensorRT):
    """`name_kernel` names the kernel of an attention by its number, None if it was decomposed."""

    LayerInformationFormat = LayerInformationFormat
    IProgressMonitor = IProgressMonitor
    IStreamWriter = IStreamWriter
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    BuilderFlag = SimpleNamespace(REFIT="all", REFIT_IDENTICAL="identical", REFIT_INDIVIDUAL="individual")
    SerializationFlag = SimpleNamespace(EXCLUDE_WEIGHTS="exclude weights", INCLUDE_REFIT="include refit")

    def __init__(self, gpu: str = "H100") -> None:
        super().__init__()
        self.gpu = gpu
        self.name_kernel: Callable[[int], str | None] = lambda i: ENTERPRISE_NAMES[i % 3].format(i=i)
        self.lists_all_profiles = True
        self.device_memory_bytes = 1 << 12
        self.lost: set[str] = set()
        """Marked weights that an engine loses, as the biases of TensorRT 11.3."""
        self.refitted = 0
        self.timed: list[str] = []
        """Kernels that a build had to time, since no cache had them."""
        self.configs: list[Config] = []

    def Builder(self, logger: Any) -> Builder:
        if "Builder" in self.failing:
            self.tell(logger)
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return Builder(self, logger)

    def OnnxParser(self, network: Network, logger: Any) -> Parser:
        return Parser(network)

    def Refitter(self, engine: BuiltEngine, logger: Any) -> EngineRefitter:
        return EngineRefitter(engine, logger)

    def OnnxParserRefitter(self, refitter: EngineRefitter, logger: Any) -> ParserRefitter:
        return ParserRefitter(refitter, logger)

    def load(self, plan: bytes) -> Any:
        return BuiltEngine(self, **json.loads(plan))


class Network:
    def __init__(self) -> None:
        self.graph: onnx.GraphProto | None = None
        self.weights: dict[str, str] = {}
        self.marked: set[str] = set()

    def mark_weights_refittable(self, name: str) -> bool:
        self.marked |= {name} & self.weights.keys()
        return name in self.weights


class Parser:
    num_errors = 0

    def __init__(self, network: Network) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        self.network.graph = onnx.load(path, load_external_data=False).graph
        self.network.weights = weights_of(path)
        return True


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(
        self, name: str, low: tuple[int, ...], best: tuple[int, ...], high: tuple[int, ...]
    ) -> None:
        if not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            raise RuleBroken(f"{name}: expected min <= opt <= max, got {low}, {best}, {high}")
        self.shapes[name] = low, best, high


class TimingCache:
    """Its header ties it to one GPU and version."""

    def __init__(self, header: str, kept: bytes) -> None:
        self.header, _, entries = kept.decode().partition(":") if kept else (header, "", "")
        self.entries = set(filter(None, entries.split(",")))

    def serialize(self) -> memoryview:
        return memoryview(f"{self.header}:{','.join(sorted(self.entries))}".encode())


class Config:
    max_aux_streams: int | None = None
    builder_optimization_level = 3
    profiling_verbosity = "layer names only"
    progress_monitor: Any = None

    def __init__(self, sim: SimulatedTensorRTBuilder) -> None:
        self.sim = sim
        self.profiles: list[Profile] = []
        self.flags: set[str] = set()
        self.cache = self.create_timing_cache(b"")

    @property
    def _header(self) -> str:
        return f"{self.sim.gpu} {self.sim.__version__}"

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_flag(self, flag: str) -> None:
        if flag != self.sim.BuilderFlag.REFIT_INDIVIDUAL:
            raise RuleBroken("REFIT_IDENTICAL is undefined for other weights; REFIT marks constants too")
        self.flags.add(flag)

    def create_timing_cache(self, kept: bytes) -> TimingCache | None:
        return None if kept.startswith(b"damaged") else TimingCache(self._header, kept)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if ignore_mismatch:
            raise RuleBroken("timings of another GPU were taken for this one's")
        if cache.header != self._header:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.cache


class Builder:
    def __init__(self, sim: SimulatedTensorRTBuilder, logger: Any) -> None:
        self.sim = sim
        self.logger = logger

    def create_network(self, flags: int) -> Network:
        if not flags & 1 << self.sim.NetworkDefinitionCreationFlag.STRONGLY_TYPED:
            raise RuleBroken("types were left to the builder")
        return Network()

    def create_builder_config(self) -> Config:
        self.sim.configs.append(Config(self.sim))
        return self.sim.configs[-1]

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network_to_stream(self, network: Network, config: Config, writer: Any) -> bool:
        if "build_serialized_network_to_stream" in self.sim.failing:
            self.sim.tell(self.logger)
            return False
        assert network.graph is not None and config.cache is not None
        _check(network.graph, config)
        layers = [layer for number in range(len(config.profiles)) for layer in self._layers(network, number)]
        for layer in layers:
            kernel = layer["Name"]
            if kernel not in config.cache.entries:
                self.sim.timed.append(kernel)
                config.cache.entries.add(kernel)
        if not self.sim.lists_all_profiles:
            layers = self._layers(network, 0)
        if network.marked and not config.flags:
            raise RuleBroken("weights were marked without the flag")
        plan = {
            "layers": layers,
            "device_memory_size_v2": self.sim.device_memory_bytes,
            "weights": network.weights,
            "marked": sorted(network.marked - self.sim.lost),
        }
        written = json.dumps(plan).encode()
        # In parts, as the real one does.
        parts = written[: len(written) // 2], written[len(written) // 2 :]
        return all(writer.write(part) == len(part) for part in parts)

    def _layers(self, network: Network, profile: int) -> list[dict[str, str]]:
        """A kernel per attention and, named after its tensors, a copy before each."""
        assert network.graph is not None
        layers = []
        attentions = [node for node in network.graph.node if node.op_type == "Attention"]
        for place, node in enumerate(attentions):
            copied = f"Reformatting CopyNode for Input Tensor 0 to {node.name}_attention"
            layers.append({"Name": copied, "LayerType": "Reformat"})
            kernel = self.sim.name_kernel(profile * len(attentions) + place)
            layers.append({"Name": kernel or f"__myl_MaxSubExpSumDiv_{place}", "LayerType": "kgen"})
        return [*layers, {"Name": "__myl_FcMulAdd_0", "LayerType": "gemm", "TacticName": "sm90_xmma_gemm"}]


class BuiltEngine:
    def __init__(
        self,
        sim: SimulatedTensorRTBuilder,
        layers: list[dict[str, str]],
        device_memory_size_v2: int,
        weights: dict[str, str],
        marked: list[str],
    ) -> None:
        self.sim = sim
        self.layers = layers
        self.device_memory_size_v2 = device_memory_size_v2
        self.weights = weights
        self.marked = marked

    def create_engine_inspector(self) -> BuiltEngine:
        return self

    def create_serialization_config(self) -> SerializationConfig:
        return SerializationConfig()

    def serialize_with_config(self, config: SerializationConfig) -> bytes | None:
        if "serialize_with_config" in self.sim.failing:
            return None
        if self.sim.SerializationFlag.EXCLUDE_WEIGHTS in config.flags:
            raise RuleBroken("the engine was written without its weights")
        plan = {
            "layers": self.layers,
            "device_memory_size_v2": self.device_memory_size_v2,
            "weights": self.weights,
            "marked": self.marked if self.sim.SerializationFlag.INCLUDE_REFIT in config.flags else [],
        }
        return json.dumps(plan).encode()

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        if format is not LayerInformationFormat.JSON:
            raise RuleBroken("layers were asked for as text that is no JSON")
        return json.dumps({"Layers": self.layers, "Bindings": []})


class SerializationConfig:
    """By default an engine that can be refitted is written without its weights, and cannot be afterwards."""

    def __init__(self) -> None:
        self.flags = {"exclude weights"}

    def set_flag(self, flag: str) -> bool:
        self.flags.add(flag)
        return True

    def clear_flag(self, flag: str) -> bool:
        self.flags.discard(flag)
        return True


class EngineRefitter:
    """Refuses to begin while a marked weight has no new value."""

    def __init__(self, engine: BuiltEngine, logger: Any) -> None:
        self.engine = engine
        self.logger = logger
        self.given: dict[str, str] = {}

    def get_all_weights(self) -> list[str]:
        return self.engine.marked

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.engine.marked if name not in self.given]

    def refit_cuda_engine(self) -> bool:
        if "refit_cuda_engine" in self.engine.sim.failing or self.get_missing_weights():
            self.engine.sim.tell(self.logger)
            return False
        self.engine.weights |= self.given
        self.engine.sim.refitted += 1
        return True


class ParserRefitter:
    """Takes the values of a graph; it can be made to forget one."""

    num_errors = 0

    def __init__(self, refitter: EngineRefitter, logger: Any) -> None:
        self.refitter = refitter
        self.logger = logger

    def refit_from_file(self, path: str) -> bool:
        engine = self.refitter.engine
        if "refit_from_file" in engine.sim.failing:
            engine.sim.tell(self.logger)
            return False
        marked = engine.marked[1 if "get_missing_weights" in engine.sim.failing else 0 :]
        self.refitter.given = {name: value for name, value in weights_of(path).items() if name in marked}
        return True


def weights_of(path: str) -> dict[str, str]:
    """The hash of each initializer's values."""
    return {
        tensor.name: hashlib.sha256(numpy_helper.to_array(tensor).tobytes()).hexdigest()
        for tensor in onnx.load(path).graph.initializer
    }


def _check(graph: onnx.GraphProto, config: Config) -> None:
    if config.max_aux_streams != 0 or config.profiling_verbosity != "detailed":
        raise RuleBroken("auxiliary streams, or no names of kernels")
    weights = {initializer.name for initializer in graph.initializer}
    for info in graph.input:
        dims = info.type.tensor_type.shape.dim
        if info.name in weights or not any(dim.dim_param for dim in dims):
            continue
        if not config.profiles or not all(info.name in profile.shapes for profile in config.profiles):
            raise RuleBroken(f"{info.name}: a dynamic input without a profile")


def kernel_names(path: Path) -> list[str]:
    """The names in an inspector's file."""
    return [layer["Name"] for layer in json.loads(path.read_text())["Layers"]]
