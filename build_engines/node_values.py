"""What nodes that a pass adds to a program compute, in shape and dtype."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node, map_arg


def set_values(nodes: Iterable[Node]) -> None:
    """Records it for each of them, from that of the nodes before."""
    for node in nodes:
        args, kwargs = map_arg((node.args, node.kwargs), lambda given: given.meta["val"])
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
