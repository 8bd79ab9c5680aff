"""What nodes that a pass adds to a program compute, in shape and dtype."""

from __future__ import annotations

from collections.abc import Iterable

from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node, map_arg


def set_values(nodes: Iterable[Node]) -> None:
    """Records it for each of them, from that of the nodes before."""
    # Without it, operators that torch composes of others refuse symbolic sizes, up to torch 2.11.
    with enable_python_dispatcher():
        for node in nodes:
            args, kwargs = map_arg((node.args, node.kwargs), lambda given: given.meta["val"])
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
