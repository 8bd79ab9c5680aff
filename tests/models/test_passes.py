"""Skip passes by name, as a build and the command line take them."""

from __future__ import annotations

import pytest

from stg_trt.errors import InvalidRequest
from stg_trt.models.passes import parse_by_pass, read_skips
from stg_trt.models.perturbation import parse_blocks


def test_a_list_is_the_pass_skip() -> None:
    assert read_skips([19, 14]) == {"skip": (14, 19)}
    assert read_skips([]) == {}
    assert read_skips({"spatial": [14], "temporal": [15, 13]}) == {"spatial": (14,), "temporal": (13, 15)}


def test_passes_of_a_build_are_checked() -> None:
    with pytest.raises(InvalidRequest, match=r"stg_blocks: expected names of skip passes .* got 'uncond'"):
        read_skips({"uncond": [1]})
    with pytest.raises(
        InvalidRequest, match="stg_blocks: expected blocks for the pass a, got none: name one"
    ):
        read_skips({"a": []})


def test_the_command_line_names_passes() -> None:
    assert parse_by_pass("stg_blocks", None, parse_blocks) is None
    assert parse_by_pass("stg_blocks", ["14,19"], parse_blocks) == (14, 19)
    assert parse_by_pass("stg_blocks", ["spatial=14"], parse_blocks) == {"spatial": (14,)}
    both = parse_by_pass("stg_blocks", ["spatial=14", "temporal = 13, 15"], parse_blocks)
    assert both == {"spatial": (14,), "temporal": (13, 15)}


@pytest.mark.parametrize("texts", [["14", "15"], ["spatial=14", "15"], ["spatial=14", "spatial=15"]])
def test_mixtures_are_refused(texts: list[str]) -> None:
    with pytest.raises(
        InvalidRequest, match="stg_blocks: expected one value, or NAME=VALUE for each skip pass"
    ):
        parse_by_pass("stg_blocks", texts, parse_blocks)
