from __future__ import annotations

import json
from pathlib import Path

import pytest

from stg_trt.build_engines.fused_attention import count_in_layers, count_in_plan


def information(*names: str) -> str:
    return json.dumps({"Layers": [{"Name": name, "LayerType": "gemm_mha"} for name in names], "Bindings": []})


@pytest.mark.parametrize(
    "name",
    [
        "_gemm_mha_v2",
        "_gemm_mha_v2_myl0_172",
        "__mye8037_gemm_mha_v2",
        "_gemm_mha_v2_0x7be1d2c09a3f",
        "_gemv_mha_v1_myl3_9",
        "fmha_v2_flash_attention_bf16_64_64_S_q_k_v_128_sm90_kernel",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma",
        "FusedAttention_4",
    ],
)
def test_every_known_name_of_a_fused_attention_counts(name: str) -> None:
    assert count_in_layers(information("__myl_FcMul_0", name), wanted=1, profiles=1) == 1


def test_a_name_counts_where_the_tactic_has_it() -> None:
    layer = {"Name": "node_Attention_5_myl0_2", "LayerType": "fusion", "TacticName": "_gemm_mha_v2_0x12"}
    plain = {"Name": "to_attention_output", "LayerType": "gemm", "TacticName": "sm90_xmma_gemm_bf16"}
    assert count_in_layers(json.dumps({"Layers": [layer, plain]}), wanted=1, profiles=1) == 1


def test_layers_that_are_names_alone_count() -> None:
    assert count_in_layers(json.dumps({"Layers": ["_gemm_mha_v2_myl0_1", "__myl_Fc_2"]}), 1, 1) == 1


@pytest.mark.parametrize(
    ("kernels", "wanted", "profiles", "counted"),
    [
        (2, 2, 1, 2),
        (1, 2, 1, 1),
        (6, 2, 3, 2),
        (2, 2, 3, 2),
        (5, 2, 3, 5),
        (3, 2, 3, 3),
        (4, 2, 1, 2),
        (0, 0, 3, 0),
        (1, 0, 1, 0),
    ],
    ids=[
        "all",
        "one decomposed",
        "all in all profiles",
        "one profile is listed",
        "one decomposed in one profile",
        "one decomposed in all profiles",
        "two kernels each",
        "none to fuse",
        "none wanted",
    ],
)
def test_kernels_of_profiles(kernels: int, wanted: int, profiles: int, counted: int) -> None:
    names = (f"_gemm_mha_v2_myl0_{i}" for i in range(kernels))
    assert count_in_layers(information(*names), wanted, profiles) == counted


@pytest.mark.parametrize(
    "unknown",
    ["", "not JSON", "[]", "{}", '{"Layers": 3}', '{"Layers": [1]}', information("__myl_Fc_0", "new_kernel")],
)
def test_what_is_not_known_is_not_guessed(unknown: str) -> None:
    assert count_in_layers(unknown, wanted=2, profiles=1) is None


def test_a_plan_names_each_attention_once_as_a_word(tmp_path: Path) -> None:
    plan = tmp_path / "a.engine"
    plan.write_bytes(b"\0_gemm_mha_v2\0_gemm_mha_v2_v3\0x.._gemm_mha_v2\0a_gemm_mha_v2\0 _gemm_mha_v2;")
    assert count_in_plan(plan) == 2
