"""A strict stand-in for TensorRT's builder: it reads real graphs and compiles them for no GPU.

Its engines tell an inspector the kernels that TensorRT would name, and how much memory they need. It enforces
what TensorRT documents: strong types, profiles for every dynamic input, timings of one GPU and version only.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx

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
    BuilderFlag = SimpleNamespace()

    def __init__(self, gpu: str = "H100") -> None:
        super().__init__()
        self.gpu = gpu
        self.name_kernel: Callable[[int], str | None] = lambda i: ENTERPRISE_NAMES[i % 3].format(i=i)
        self.lists_all_profiles = True
        self.device_memory_bytes = 1 << 12
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

    def load(self, plan: bytes) -> Any:
        return BuiltEngine(**json.loads(plan))


class Network:
    def __init__(self) -> None:
        self.graph: onnx.GraphProto | None = None


class Parser:
    num_errors = 0

    def __init__(self, network: Network) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        self.network.graph = onnx.load(path, load_external_data=False).graph
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
        self.cache = self.create_timing_cache(b"")

    @property
    def _header(self) -> str:
        return f"{self.sim.gpu} {self.sim.__version__}"

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

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
        plan = {"layers": layers, "device_memory_size_v2": self.sim.device_memory_bytes}
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
    def __init__(self, layers: list[dict[str, str]], device_memory_size_v2: int) -> None:
        self.layers = layers
        self.device_memory_size_v2 = device_memory_size_v2

    def create_engine_inspector(self) -> BuiltEngine:
        return self

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        if format is not LayerInformationFormat.JSON:
            raise RuleBroken("layers were asked for as text that is no JSON")
        return json.dumps({"Layers": self.layers, "Bindings": []})


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
