"""The weights of an ONNX graph: inside it while they are few, else beside it, written as they come."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

# protobuf refuses messages of 2 GiB, and holds those that it writes in memory several times.
_EMBEDDED_BYTES = 256 << 20
# Shapes and scalars stay in the graph, where compilers look for them.
_SMALL_BYTES = 64
# Of a page, so that readers can map a weight.
_ALIGNMENT = 4096


class GraphWeights:
    """Takes the values of a graph that have constants, one by one.

    Once they are more than a graph should hold, their tensors are on disk alone.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._in_memory: list[ir.Value] = []
        self._bytes = 0

    def add(self, value: ir.Value) -> None:
        """From here on the value's tensor may be one that lies in the file."""
        assert value.const_value is not None
        self._in_memory.append(value)
        self._bytes += value.const_value.nbytes
        if self._bytes > _EMBEDDED_BYTES:
            self._write()

    def _write(self) -> None:
        with self._file.open("ab") as file:
            for value in self._in_memory:
                tensor = value.const_value
                if tensor is not None and tensor.nbytes > _SMALL_BYTES:
                    value.const_value = _written(tensor, file, self._file)
        self._in_memory.clear()


def _written(tensor: ir.TensorProtocol, file: BinaryIO, path: Path) -> ir.ExternalTensor:
    """The same tensor at the end of the file."""
    file.write(bytes(-file.tell() % _ALIGNMENT))
    offset = file.tell()
    file.write(tensor.tobytes())
    assert isinstance(tensor.shape, ir.Shape)
    return ir.ExternalTensor(
        path.name,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=tensor.shape,
        name=str(tensor.name),
        base_dir=path.parent,
    )
