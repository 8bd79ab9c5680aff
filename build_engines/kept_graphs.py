"""The graphs of pieces, kept beside the builds: other weights of the same model need no export.

They have no weights. A file's name says what its graph was exported from and what the file contains, so one
that was changed or cut short counts as not there.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir import tensor_adapters
from torch import Tensor

import stg_trt.models
from stg_trt.engines.key import digest
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.system.files import file_sha256

from .export import PieceGraph, weight_name
from .piece_key import PieceKey
from .weights import weights_of

# Below the folder of the builds; the store passes over hidden folders.
FOLDER = ".graphs"
# Whatever takes part in an export, and folds constants in it.
_EXPORTERS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy")
_DIGITS = 32

_log = logging.getLogger(__name__)


class KeptGraphs:
    """Below a folder of builds; `export` is what decides a graph besides its piece and this installation."""

    def __init__(self, output: Path, export: dict[str, Any]) -> None:
        self._folder = output / FOLDER
        self._export = export

    def read(self, key: PieceKey, module: SegmentModule) -> PieceGraph | None:
        """The graph of a piece whose module this is, from any earlier build; None if none is whole."""
        facts = self._facts(key)
        for path in sorted(self._folder.glob(f"{facts}-*.onnx")) if facts else ():
            try:
                if path.name != _name(facts, file_sha256(path)):
                    _log.info("%s: not the file that was kept", path)
                    continue
                model = ir.load(path)
            except OSError as error:
                _log.info("%s: cannot be read: %s", path, error.strerror)
                continue
            if not _takes(model.graph, key, [tensor for _, tensor in weights_of(module)]):
                _log.info("%s: of other inputs or weights", path)
                continue
            return PieceGraph(model.graph, model.ir_version)
        return None

    def write(self, key: PieceKey, piece: PieceGraph, work: Path) -> None:
        """Keeps a graph, whole or not at all, written in `work` first.

        A folder that cannot be written costs the next build time, not this one.
        """
        facts = self._facts(key)
        if not facts:
            return
        model = ir.Model(piece.graph, ir_version=piece.ir_version)
        data = ir.to_proto(model).SerializeToString(deterministic=True)
        sha256 = hashlib.sha256(data).hexdigest()
        path = self._folder / _name(facts, sha256)
        unfinished = work / path.name
        try:
            if path.is_file() and file_sha256(path) == sha256:
                return
            self._folder.mkdir(exist_ok=True)
            with unfinished.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            warnings.warn(
                f"{path}: the graph cannot be kept ({error.strerror}), a build with other weights exports it "
                "again",
                stacklevel=2,
            )

    def _facts(self, key: PieceKey) -> str:
        """A digest of all that decides the graph; empty for a piece that is equal to no other."""
        try:
            piece = key.words()
        except LookupError as error:
            _log.info("a graph is not kept: %s", error)
            return ""
        return digest({**self._export, "piece": piece, "installed": _installed()})[:_DIGITS]


def _name(facts: str, sha256: str) -> str:
    return f"{facts}-{sha256[:_DIGITS]}.onnx"


def _takes(graph: ir.Graph, key: PieceKey, weights: Sequence[Tensor]) -> bool:
    """Whether the graph's inputs are the piece's and then its weights: names, dtypes and shapes, in order."""
    named = [*(spec.name for spec in key.inputs), *map(weight_name, range(len(weights)))]
    if [value.name for value in graph.inputs] != named:
        return False
    own, placeholders = graph.inputs[: len(key.inputs)], graph.inputs[len(key.inputs) :]
    return all(
        value.dtype == tensor_adapters.from_torch_dtype(spec.torch_dtype)
        for value, spec in zip(own, key.inputs, strict=True)
    ) and all(
        value.dtype == tensor_adapters.from_torch_dtype(tensor.dtype)
        and value.shape is not None
        and value.shape.is_static()
        and tuple(value.shape.numpy()) == tuple(tensor.shape)
        for value, tensor in zip(placeholders, weights, strict=True)
    )


@functools.cache
def _installed() -> dict[str, str]:
    """Versions of what exports, and the source of our own part in it."""
    sources = hashlib.sha256()
    for folder in (Path(stg_trt.models.__path__[0]), Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            sources.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    versions = {name: version(name) for name in _EXPORTERS}
    return {**versions, "python": platform.python_version(), "sources": sources.hexdigest()}
