"""The ONNX graphs of pieces, in a folder that all processes of a run share: each kind is exported once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import onnx_ir as ir

from stg_trt.build_engines.export import PieceGraph
from stg_trt.build_engines.onnx_compiler import OnnxCompiler
from stg_trt.build_engines.piece_key import PieceKey

# Programs that tests start find the folder in it.
FOLDER = "STG_TRT_TEST_GRAPHS"


class SharedGraphs(MutableMapping[PieceKey, PieceGraph]):
    """For `OnnxCompiler._graphs`; a piece that is equal to no other stays in this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._graphs: dict[PieceKey, PieceGraph] = {}

    def __contains__(self, key: object) -> bool:
        assert isinstance(key, PieceKey)
        if key not in self._graphs and (path := self._path(key)) is not None and path.exists():
            model = ir.load(path)
            self._graphs[key] = PieceGraph(model.graph, model.ir_version)
        return key in self._graphs

    def __getitem__(self, key: PieceKey) -> PieceGraph:
        if key not in self:
            raise KeyError(key)
        return self._graphs[key]

    def __setitem__(self, key: PieceKey, graph: PieceGraph) -> None:
        path = self._path(key)
        if path is None:
            self._graphs[key] = graph
        else:
            unfinished = path.with_name(f"{path.name}.{os.getpid()}")
            ir.save(ir.Model(graph.graph, ir_version=graph.ir_version), unfinished, format="protobuf")
            unfinished.rename(path)

    def __delitem__(self, key: PieceKey) -> None:
        del self._graphs[key]

    def __iter__(self) -> Iterator[PieceKey]:
        return iter(self._graphs)

    def __len__(self) -> int:
        return len(self._graphs)

    def _path(self, key: PieceKey) -> Path | None:
        try:
            words = key.words()
        except LookupError:
            return None
        # What tests define may differ from test to test.
        if "tests." in words:
            return None
        return self._folder / f"{hashlib.sha256(words.encode()).hexdigest()}.onnx"


def share_graphs(folder: Path) -> None:
    """Here, and in the programs that this process starts for its tests."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[FOLDER] = str(folder)
    OnnxCompiler._graphs = SharedGraphs(folder)  # type: ignore[assignment]
