"""The parts of a run on a GPU: their order and limits; a rehearsal plans the same parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from stg_trt.benchmarks import gpu_plan
from stg_trt.benchmarks.gpu_plan import ON_GPU, REHEARSAL, Part, Scale, choose_parts, plan_stages
from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from tests.support.cli import assert_one_line_error, invoke

WORKLOADS = ("build", "step", "peers", "sample")
LTX, LARGE_LTX = "ltx-video-2b-704x480x121", "ltx-video-2b-1216x704x121"
COGVIDEOX, WAN = "cogvideox-2b-720x480x49", "wan2.1-t2v-1.3b-832x480x81"


@pytest.fixture(autouse=True)
def _built_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_plan, "KERNEL_LIBRARY", Path(__file__))


def planned(folder: Path, scale: Scale = ON_GPU) -> list[tuple[Part, ...]]:
    return plan_stages(scale, folder, folder / "engines", scale.backend)


def test_the_order_and_the_limits(tmp_path: Path) -> None:
    """The kernels' tests beside the first compilation; then what is worth most."""
    stages = choose_parts(planned(tmp_path), None)
    assert [[(part.name, part.limit_s) for part in stage] for stage in stages] == [
        [("kernel tests", 60), ("compile ltx-video-2b-6-blocks-704x480x121", 120)],
        [("step ltx-video-2b-6-blocks-704x480x121", 150)],
        [("kernels", 45)],
        [(f"step {LTX}", 200)],
        [(f"peers {LTX}", 200)],
        [(f"sample {LTX}", 90)],
        [("engine tests", 120)],
        [(f"twin {LTX}", 200)],
    ]


def test_larger_models_wait_to_be_asked_for(tmp_path: Path) -> None:
    asked = [part.name for stage in planned(tmp_path) for part in stage if part.asked]
    models = (LARGE_LTX, COGVIDEOX, WAN)
    steps_and_peers = [f"{workload} {model}" for model in models for workload in ("step", "peers")]
    assert asked == [*steps_and_peers, "foreign engine"]


def test_a_part_at_a_time_is_timed(tmp_path: Path) -> None:
    """Beside the first compilation nothing is timed."""
    together = [stage for stage in planned(tmp_path) if len(stage) > 1]
    assert [[part.command[3] for part in stage] for stage in together] == [["-q", "build"]]


def test_a_rehearsal_plans_the_same_parts(tmp_path: Path) -> None:
    """Of other models, and with other values of the same options."""

    def shape(scale: Scale) -> list[list[tuple[str, bool]]]:
        stages = choose_parts(planned(tmp_path, scale), None)
        return [[(part.name.split(" ltx")[0], part.tests) for part in stage] for stage in stages]

    assert shape(REHEARSAL) == shape(ON_GPU)
    real, rehearsed = (
        {part.name.split(" ltx")[0]: part for stage in planned(tmp_path, scale) for part in stage}
        for scale in (ON_GPU, REHEARSAL)
    )
    for name, part in rehearsed.items():
        if not part.tests:
            assert part.command[:4] == real[name].command[:4]
            assert options(real[name]) <= options(part) | {"--num-inference-steps", "--rounds"}


def options(part: Part) -> set[str]:
    return {word.split("=")[0] for word in part.command if word.startswith("--")}


@pytest.mark.parametrize("scale", [ON_GPU, REHEARSAL], ids=["gpu", "rehearsal"])
def test_models_are_perturbed_as_their_families_are(scale: Scale) -> None:
    for model in (scale.shortened, scale.model, *scale.larger):
        checkpoint = Checkpoint.open(model.checkpoint, random_weights=True)
        defaults = checkpoint.family.defaults
        assert model.stg_mode == defaults.stg_mode
        if scale is ON_GPU and model is not scale.shortened:
            assert (model.stg_block,) == defaults.stg_blocks
        kept = checkpoint.shortened(None if model.blocks is None else (model.blocks,))
        assert 0 <= model.stg_block < kept.family.num_blocks


def test_the_shortened_model_has_every_piece_of_the_whole_one() -> None:
    """Blocks before the perturbed one and after it, so that the whole model's packages are all there."""
    assert 0 < ON_GPU.shortened.stg_block < (ON_GPU.shortened.blocks or 0) - 1


def test_results_have_files_of_their_own(tmp_path: Path) -> None:
    outputs = [part.output for stage in planned(tmp_path) for part in stage if part.output is not None]
    assert len(set(outputs)) == len(outputs)
    assert all(output.parent == tmp_path and output.name.startswith("unfinished-") for output in outputs)
    assert tmp_path / f"unfinished-step-{LTX}.json" in outputs


def test_kernels_are_built_first_where_they_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_plan, "KERNEL_LIBRARY", tmp_path / "none")
    monkeypatch.setattr(gpu_plan.shutil, "which", lambda tool: tool)
    (first,) = planned(tmp_path)[0]
    assert first.name == "kernel build" and "CMAKE_CUDA_ARCHITECTURES=native" in first.command[-1]
    assert planned(tmp_path, REHEARSAL)[0][0].name == "kernel tests"
    monkeypatch.setattr(gpu_plan.shutil, "which", lambda tool: None)
    assert planned(tmp_path)[0][0].name == "kernel tests"


def test_some_parts_can_be_chosen() -> None:
    names = ("kernel tests", "kernel build", "step a-1x1", "peers a-1x1", "step b-1x1")
    stages = [(Part(name, (), 1, asked="b-1" in name),) for name in names]
    assert [stage[0].name for stage in choose_parts(stages, None)] == [*names[:4]]
    chosen = choose_parts(stages, "b-1, peers")
    assert [stage[0].name for stage in chosen] == ["kernel build", "peers a-1x1", "step b-1x1"]
    for wrong in ("sample", "step,", ""):
        with pytest.raises(InvalidRequest, match=r"only: expected words of the parts kernel tests, .* got '"):
            choose_parts(stages, wrong)


def test_one_of_two_parts_of_a_stage_can_be_chosen(tmp_path: Path) -> None:
    ((part,),) = choose_parts(planned(tmp_path), "kernel tests")
    assert part.name == "kernel tests"


def test_a_backend_of_another_device(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="backend: expected one that runs on cpu, got tensorrt"):
        plan_stages(REHEARSAL, tmp_path, tmp_path, "tensorrt")


def test_the_planned_commands_parse(tmp_path: Path) -> None:
    """Every option of every part is known to its command; a precision that is not there ends it."""
    parts = [part for stage in planned(tmp_path) for part in stage]
    of_each_kind = {part.command[3]: part for part in parts if part.command[3] in WORKLOADS}
    assert of_each_kind.keys() == set(WORKLOADS)
    for part in of_each_kind.values():
        answer = invoke("bench", *part.command[3:], "--target=no-such-target")
        assert_one_line_error(answer, "target: expected one of this-gpu, cpu for inductor, got 'no-such-targ")
