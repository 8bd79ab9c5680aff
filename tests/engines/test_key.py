from __future__ import annotations

import dataclasses
import json
from typing import Any

from stg_trt.engines.key import EngineKey, digest
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import TensorSpec
from stg_trt.system.gpu import GpuIdentity

SPEC = TensorSpec("latents", "bfloat16", ("rows", 60, 8))
GPU = GpuIdentity("NVIDIA H100 80GB HBM3", "sm_90", 132, "580")
KEY = EngineKey(
    weights="aa",
    export_version="1.1",
    segment=Segment("back", 4, 6, back=True),
    inputs=(SPEC,),
    outputs=(TensorSpec("pred", "bfloat16", ("rows", 60, 8)),),
    profiles=((1, 3, 6),),
    precision="bf16",
    opset=23,
    backend="tensorrt-rtx",
    backend_version="1.7.1",
    target="sm_120",
    gpu=None,
    flags=("strongly_typed",),
)
OTHERS: dict[str, list[Any]] = {
    "weights": ["ab"],
    "export_version": ["1.2", "2.1"],
    "segment": [
        dataclasses.replace(KEY.segment, name="front"),
        dataclasses.replace(KEY.segment, start=3),
        dataclasses.replace(KEY.segment, stop=5),
        dataclasses.replace(KEY.segment, front=True),
        dataclasses.replace(KEY.segment, back=False),
        dataclasses.replace(KEY.segment, text=True),
        dataclasses.replace(KEY.segment, keep_input=True),
        dataclasses.replace(KEY.segment, stg_r_inside=True),
        dataclasses.replace(KEY.segment, indexed_before=3),
        dataclasses.replace(KEY.segment, expert=1),
        dataclasses.replace(KEY.segment, skipped=Perturbation("stg-a", (4,))),
        dataclasses.replace(KEY.segment, skipped=Perturbation("stg-a", (5,))),
        dataclasses.replace(KEY.segment, skipped=Perturbation("stg-r", (4,))),
    ],
    "inputs": [
        (),
        (dataclasses.replace(SPEC, name="text"),),
        (dataclasses.replace(SPEC, dtype="float32"),),
        (dataclasses.replace(SPEC, shape=("rows", 61, 8)),),
        (dataclasses.replace(SPEC, shape=(2, 60, 8)),),
    ],
    "outputs": [(SPEC,)],
    "profiles": [((1, 2, 6),), ((1, 3, 9),), ((2, 3, 6),), ((1, 1, 1), (3, 3, 3)), ()],
    "precision": ["fp32"],
    "opset": [24],
    "backend": ["tensorrt"],
    "backend_version": ["1.7.2"],
    "target": ["sm_89"],
    "gpu": [
        GPU,
        dataclasses.replace(GPU, name="NVIDIA H100 PCIe"),
        dataclasses.replace(GPU, sm="sm_80"),
        dataclasses.replace(GPU, multiprocessors=114),
        dataclasses.replace(GPU, driver="570"),
    ],
    "flags": [(), ("strongly_typed", "max_aux_streams=0")],
    "float8": ["ab", "ac"],
}


def test_every_fact_has_other_values_here() -> None:
    assert OTHERS.keys() == {field.name for field in dataclasses.fields(EngineKey)}
    segment_fields = {field.name for field in dataclasses.fields(Segment)}
    changed = {
        name for other in OTHERS["segment"] for name in segment_fields
        if getattr(other, name) != getattr(KEY.segment, name)
    }  # fmt: skip
    assert changed == segment_fields


def test_the_key_changes_with_every_fact() -> None:
    keys = [KEY] + [
        dataclasses.replace(KEY, **{name: other}) for name, others in OTHERS.items() for other in others
    ]
    assert len({digest(key.facts()) for key in keys}) == len(keys)


def test_what_few_segments_have_leaves_the_keys_of_others_as_they_were() -> None:
    """Engines of a release without it are found again, by a build and by their folder's name."""
    assert digest(KEY.facts()) == "36a593a5ea2bf9a1cb0a55422b32fbf7d4fe7a679f868f93685980f9db75be41"
    few = dataclasses.replace(KEY, segment=dataclasses.replace(KEY.segment, expert=1))
    assert few.facts()["segment"]["expert"] == 1


def test_the_key_is_the_same_for_the_same_facts() -> None:
    assert digest(dataclasses.replace(KEY).facts()) == digest(KEY.facts())
    reordered = dict(reversed(KEY.facts().items()))
    assert digest(reordered) == digest(KEY.facts())


def test_facts_survive_json() -> None:
    assert json.loads(json.dumps(KEY.facts())) == KEY.facts()
    assert digest(json.loads(json.dumps(KEY.facts()))) == digest(KEY.facts())
