"""AOTInductor engines: chains of compiled packages; equal pieces share one, each over its own weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stg_trt.engines.inductor_chain import Chain, check_machine
from stg_trt.errors import EngineRejected
from stg_trt.models.segment import engine_outputs
from stg_trt.models.tensor_spec import TensorSpec, index_of

# Compiled code reads and writes vectors of this size; it would copy an input that is not aligned, and so
# lose what it writes to an output that is not.
_ALIGNMENT_BYTES = 16
_SIDES = 2


class Scratch:
    """Memory for the tensors between a chain's pieces; all contexts share it, as they run one by one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[tuple[TensorSpec, int, int], Tensor] = {}

    def tensor(self, spec: TensorSpec, rows: int, side: int) -> Tensor:
        """Memory that stays where it is; a piece reads one side and writes the other."""
        key = spec, rows, side % _SIDES
        if key not in self._tensors:
            self._tensors[key] = torch.empty(
                spec.with_rows(rows), dtype=spec.torch_dtype, device=self._device
            )
        return self._tensors[key]


class InductorEngine:
    """A chain with its weights in memory once; its contexts share them."""

    alignment = _ALIGNMENT_BYTES

    def __init__(self, files: Sequence[Path], device: torch.device, scratch: Scratch) -> None:
        self.path = files[0]
        self.device = device
        self.scratch = scratch
        packages = {path.name: path for path in files[1:]}
        with safe_open(self.path, framework="pt") as weights:
            self.chain = Chain.from_metadata(weights.metadata(), self.path)
            check_machine(self.chain, device.type, self.path)
            # Copied, since the file is mapped: a later change of it must not reach the engine.
            self.weights = {
                name: weights.get_tensor(name).to(device, copy=True)
                for name in weights.keys()  # noqa: SIM118
            }
        self.pieces = [
            self._load(packages[piece.package], place) for place, piece in enumerate(self.chain.pieces)
        ]

    def context(self) -> InductorContext:
        """A new context with nothing bound."""
        return InductorContext(self)

    def _load(self, package: Path, place: int) -> Any:
        """One piece over its own weights, which stay the engine's: the package holds none."""
        try:
            # The C++ loader itself: torch's Python wrapper around it also reads pickled parts of a package.
            # Single-threaded, it records no events, which a CUDA graph could not capture.
            index = -1 if self.device.index is None else self.device.index
            loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", True, 1, index)
            weights = {name: self.weights[f"{place}.{name}"] for name in loader.get_constant_fqns()}
            loader.load_constants(weights, False, True, True)
        except (RuntimeError, KeyError) as error:
            raise EngineRejected(
                f"{package}: inductor cannot load it: {str(error).splitlines()[0]}: build the engines again"
            ) from error
        return loader


class InductorContext:
    """Calls the pieces in order; each writes its results where the next, or the caller, reads them.

    A package is compiled with its outputs as arguments that it writes to, so nothing is copied out of it.
    Memory in between comes from torch's allocator: in a CUDA graph, from the graph's pool.
    """

    def __init__(self, engine: InductorEngine) -> None:
        self._engine = engine
        chain = engine.chain
        specs = {spec.name: spec for spec in chain.tensors}
        names = engine_outputs(chain.inputs, chain.outputs)
        self._specs = {name: specs[name] for name in chain.inputs}
        self._specs |= {name: specs[output] for name, output in zip(names, chain.outputs, strict=True)}
        self._bound: dict[str, Tensor] = {}
        self._calls: list[tuple[Any, list[Tensor]]] = []

    def bind(self, name: str, tensor: Tensor) -> None:
        """Gives an input or output its memory and its shape; raises EngineRejected if it does not fit."""
        assert tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT_BYTES == 0, name
        path, spec = self._engine.path, self._specs[name]
        # Packages do not check what they are called with.
        if tensor.dtype != spec.torch_dtype or not spec.fits(tuple(tensor.shape)):
            raise EngineRejected(
                f"{path}: expected {name} as {spec.torch_dtype} of shape {spec.shape}, got {tensor.dtype} of "
                f"shape {tuple(tensor.shape)}: build again"
            )
        if spec.row_axis is not None and tensor.shape[spec.row_axis] > self._engine.chain.max_rows:
            raise EngineRejected(
                f"{path}: expected at most {self._engine.chain.max_rows} rows of {name}, got "
                f"{tuple(tensor.shape)}: rebuild with a larger --max-batch"
            )
        self._bound[name] = tensor
        self._calls = []

    def enqueue(self, stream: int) -> None:
        """Runs on torch's current stream, which the device's scope has set to `stream`."""
        if not self._calls:
            self._calls = self._chained(stream)
        for loader, tensors in self._calls:
            loader.run(tensors)

    def _chained(self, stream: int) -> list[tuple[Any, list[Tensor]]]:
        """Every piece with its inputs and outputs; the last writer of an output writes to the caller's."""
        engine, chain = self._engine, self._engine.chain
        missing = self._specs.keys() - self._bound.keys()
        assert not missing, f"{engine.path.name}: {missing} not bound"
        rows = {
            tensor.shape[axis]
            for name, tensor in self._bound.items()
            # A tensor that is read by an index keeps its own rows.
            if (axis := self._specs[name].row_axis) is not None and index_of(name) not in self._specs
        }
        assert len(rows) == 1, f"{engine.path.name}: bound to {rows} rows"
        if engine.device.type == "cuda":
            assert torch.cuda.current_stream(engine.device).cuda_stream == stream
        names = engine_outputs(chain.inputs, chain.outputs)
        results = {output: self._bound[name] for name, output in zip(names, chain.outputs, strict=True)}
        return _chain_calls(
            engine, {name: self._bound[name] for name in chain.inputs}, results, next(iter(rows))
        )


def _chain_calls(
    engine: InductorEngine, state: dict[str, Tensor], results: dict[str, Tensor], rows: int
) -> list[tuple[Any, list[Tensor]]]:
    pieces = engine.chain.pieces
    specs = {spec.name: spec for spec in engine.chain.tensors}
    last = {name: place for place, piece in enumerate(pieces) for name in piece.outputs}
    side = dict.fromkeys(specs, 0)
    calls = []
    for place, (loader, piece) in enumerate(zip(engine.pieces, pieces, strict=True)):
        written = {}
        for name in piece.outputs:
            if name in results and last[name] == place:
                written[name] = results[name]
            else:
                side[name] += 1
                written[name] = engine.scratch.tensor(specs[name], rows, side[name])
        calls.append((loader, [*(state[name] for name in piece.inputs), *written.values()]))
        state = state | written
    return calls


def load_all(
    backend: str, files: Mapping[str, Sequence[Path]], device: torch.device
) -> dict[str, InductorEngine]:
    """The engines of a build; raises EngineRejected if they were built for another machine or torch."""
    scratch = Scratch(device)
    return {name: InductorEngine(paths, device, scratch) for name, paths in files.items()}
