"""What decides the program of a piece, read from its module: equal pieces need one trace between them.

Blocks of a model mostly differ in the values of their weights alone, and these are no part of a program.
"""

from __future__ import annotations

import enum
import operator
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import TensorSpec

_PLAIN = (NoneType, bool, int, float, str, bytes, torch.dtype, torch.device, enum.Enum)
_NAMED = (type, FunctionType, BuiltinFunctionType)
_CONTENTS = frozenset({"_parameters", "_buffers", "_modules"})


@dataclass(frozen=True)
class PieceKey:
    """Pieces with equal keys have one program: same code, configuration, borders, and shapes of weights.

    Block numbers do not count: a segment's module reads them only to find the block.
    """

    module: Hashable
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_rows: int

    @classmethod
    def of(
        cls, module: SegmentModule, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], max_rows: int
    ) -> PieceKey:
        """The key of a piece as it is now; a change of the module afterwards is not seen."""
        return cls(_Reader().module(module), tuple(inputs), tuple(outputs), max_rows)

    def words(self) -> str:
        """The key as text that is the same in every process; raises LookupError where it has none."""
        return _words(self)


class _Reader:
    """Turns one module into nested tuples; what it does not know is equal to nothing else."""

    def __init__(self) -> None:
        self._tensors: dict[int, int] = {}
        self._open: set[int] = set()

    def module(self, module: nn.Module) -> Hashable:
        """Its class, attributes, weights and submodules, in the order they are registered."""
        attributes = {name: value for name, value in vars(module).items() if name not in _CONTENTS}
        weights = (*module._parameters.items(), *module._buffers.items())
        children = [
            # Blocks are filed under their numbers; what counts is which of the piece's blocks it is.
            (place if name.isdigit() else name, None if child is None else self.module(child))
            for place, (name, child) in enumerate(module._modules.items())
        ]
        return (
            type(module),
            self._value(attributes),
            tuple((name, None if weight is None else self._weight(weight)) for name, weight in weights),
            tuple(children),
        )

    def _weight(self, weight: Tensor) -> Hashable:
        """Shape and dtype, and which weight it is, since two names may share one."""
        place = self._tensors.setdefault(id(weight), len(self._tensors))
        return tuple(weight.shape), weight.dtype, place

    def _value(self, value: Any) -> Hashable:
        if isinstance(value, Segment):
            return _from_zero(value)
        if isinstance(value, _PLAIN):
            # The type too: True, 1 and 1.0 are equal, and a program may treat them differently.
            return type(value), value
        if isinstance(value, _NAMED):
            return value
        if isinstance(value, Tensor | nn.Module) or id(value) in self._open:
            return _unique()
        self._open.add(id(value))
        try:
            return self._container(value)
        finally:
            self._open.discard(id(value))

    def _container(self, value: Any) -> Hashable:
        if isinstance(value, Mapping):
            return type(value), tuple((self._value(key), self._value(item)) for key, item in value.items())
        if isinstance(value, Sequence):
            return type(value), tuple(map(self._value, value))
        if isinstance(value, set | frozenset):
            return type(value), frozenset(map(self._value, value))
        return self._object(value)

    def _object(self, value: Any) -> Hashable:
        """What a copy of it would be made from, which its class alone knows."""
        try:
            parts = value.__reduce_ex__(2)
        except TypeError:
            return _unique()
        return type(value), self._value(parts)


def _from_zero(segment: Segment) -> Segment:
    """The segment of the first expert, numbered from 0, without its name; its inputs tell what is indexed."""
    skipped = segment.skipped
    if skipped is not None:
        skipped = replace(skipped, blocks=tuple(block - segment.start for block in skipped.blocks))
    counted = replace(segment, name="", start=0, stop=len(segment.blocks), skipped=skipped)
    return replace(counted, indexed_before=None, expert=0)


def _unique() -> Hashable:
    """Equal to itself alone, so that a piece with it is never taken for another."""
    return object()


def _words(part: object) -> str:
    if isinstance(part, _NAMED):
        return _path_of(part)
    if isinstance(part, enum.Enum):
        return f"{_path_of(type(part))}.{part.name}"
    if isinstance(part, tuple):
        return f"({','.join(map(_words, part))})"
    if isinstance(part, frozenset):
        return f"{{{','.join(sorted(map(_words, part)))}}}"
    if is_dataclass(part):
        values = (getattr(part, field.name) for field in fields(part))
        return f"{_path_of(type(part))}({','.join(map(_words, values))})"
    if isinstance(part, _PLAIN):
        return repr(part)
    raise LookupError(f"a {type(part).__name__} is equal to no other")


def _path_of(named: type | FunctionType | BuiltinFunctionType) -> str:
    """Module and name, under which the same one must be found."""
    module, name = named.__module__, named.__qualname__
    path = f"{module}.{name}"
    if named is NoneType:
        return path
    try:
        found = operator.attrgetter(name)(sys.modules[module])
    except (AttributeError, KeyError):
        found = None
    if found is not named:
        raise LookupError(f"{path} has no name of its own")
    return path
