"""Every family: the checkpoints, sizes and schedulers that it takes, and those that it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families import family_for
from stg_trt.models.segment import cut
from stg_trt.models.workload import Workload
from tests.support.family_cases import CASES, FamilyCase, Published, SomeSizes


@pytest.mark.parametrize(
    ("one", "sizes", "message"),
    [(one, sizes, message) for one in CASES for sizes, message in one.refused_sizes],
    ids=str,
)
def test_sizes_that_a_model_cannot_have(one: FamilyCase, sizes: SomeSizes, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        one.family.check(replace(one.workload, **sizes))
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("one", "transformer", "vae", "message"),
    [(one, *refused) for one in CASES for refused in one.refused],
    ids=str,
)
def test_variants_that_are_not_the_family(
    one: FamilyCase, transformer: dict[str, Any], vae: dict[str, Any], message: str
) -> None:
    changed = family_for({**one.checkpoint.transformer_config, **transformer}, vae or None)
    with pytest.raises(InvalidRequest) as refused:
        changed.check(one.workload)
        (whole,) = cut("segmented", changed.num_blocks, "stg-r", ())
        changed.segment_flops(whole, one.workload)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("one", "scheduler", "steps", "message"),
    [(one, *refused) for one in CASES for refused in one.refused_steps],
    ids=str,
)
def test_steps_that_a_family_cannot_take(one: FamilyCase, scheduler: Any, steps: int, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        one.family.set_timesteps(scheduler, steps, one.workload)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("one", "index", "message"),
    [(one, *refused) for one in CASES for refused in one.refused_indexes],
    ids=str,
)
def test_pipelines_that_are_not_the_family(one: FamilyCase, index: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        replace(one.checkpoint, model_index=index).family.check_pipeline()
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_precisions_are_checked() -> None:
    with pytest.raises(InvalidRequest, match="precision: expected one of fp32, bf16, fp8, got 'fp16'"):
        Workload(128, 160, 17, 9, "fp16")


@pytest.mark.parametrize("known", [known for one in CASES for known in one.published], ids=str)
def test_sizes_the_published_models_have(known: Published) -> None:
    published = Checkpoint.open(known.name, random_weights=True).family
    published.check(known.workload)
    assert published.latent_shape(known.workload) == known.latents
    assert published.tensors(known.workload)["latents"].with_rows(2) == (2, *known.packed)
