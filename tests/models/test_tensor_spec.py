"""Rows of a tensor: its segment's, or its own, which an index reads."""

from __future__ import annotations

import torch

from stg_trt.models.tensor_spec import ROWS, TensorSpec, index_of, index_spec, kept_name

SPEC = TensorSpec("skip_3", "bfloat16", (ROWS, 2, 5))


def test_a_kept_tensor_has_rows_of_its_own() -> None:
    kept = SPEC.kept
    assert kept.shape == ("rows_of_skip_3", 2, 5) and kept.row_axis == 0
    assert SPEC.has_rows and not kept.has_rows
    assert kept.with_rows(2) == (2, 2, 5) and kept.fits((7, 2, 5))
    assert TensorSpec("fps", "float32", (1,)).row_axis is None


def test_the_profile_of_a_kept_tensor_starts_at_one_row() -> None:
    """An engine for exactly four rows reads a tensor of two."""
    assert SPEC.profile((4, 4, 4)) == ((4, 2, 5),) * 3
    assert SPEC.kept.profile((4, 4, 4)) == ((1, 2, 5), (4, 2, 5), (4, 2, 5))


def test_an_index_is_named_after_its_tensor() -> None:
    spec = index_spec("skip_3")
    assert (spec.name, spec.shape, spec.torch_dtype) == (index_of("skip_3"), (ROWS,), torch.int64)
    assert kept_name(spec.name) == "skip_3" and kept_name("skip_3") is None
    assert not spec.random(3, torch.Generator()).any()
