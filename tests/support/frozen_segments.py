"""Segments that work at the traced number of rows only, which an export must notice."""

from __future__ import annotations

from torch import Tensor

from stg_trt.models.families.segment_module import SegmentModule


class ViewsTwoRows(SegmentModule):
    """Works at two rows only."""

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": tensors["x"].view(2, 24).view(2, 4, 6) + 1}


class BranchesOnRows(SegmentModule):
    """Reads a second input only if there are two rows, as there are in the trace."""

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        x = tensors["x"]
        return {"out": x * tensors["y"] if len(x) == 2 else x}
