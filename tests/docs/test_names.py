"""Arguments, options, messages, defaults and costs: the pages have all of them, as the code does."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer.main

from stg_trt import VideoPipeline, build, errors
from stg_trt.build_engines.command import build as build_command
from stg_trt.build_engines.verify_command import verify as verify_command
from stg_trt.cli.inspect import inspect as inspect_command
from stg_trt.cli.main import _application
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.passes import COND, Pass, all_blocks, read_skips
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.plan import full_plan, plan_step
from stg_trt.models.published import published
from stg_trt.models.workload import Workload
from stg_trt.runtime.command import generate as generate_command
from stg_trt.runtime.server.command import serve as serve_command
from stg_trt.runtime.server.video_request import VideoRequest
from tests.support.pages import ROOT, table, text
from tests.support.passes import UNCOND_COND

FAMILIES = {
    "LTX-Video": "ltx-video-2b",
    "Mochi 1": "mochi-1-preview",
    "HunyuanVideo": "hunyuan-video",
    "CogVideoX": "cogvideox-2b",
    "Wan 2.1": "wan2.1-t2v-1.3b",
    "Wan 2.2": "wan2.2-t2v-a14b",
    "Wan 2.2 TI2V": "wan2.2-ti2v-5b",
    "Open-Sora": "open-sora-1.2",
    "LTX-2": "ltx-2",
    "LTX-2.3": "ltx-2.3",
    "Stable Video Diffusion": "svd-xt",
}
MESSAGES = {error.__name__ for error in errors.StgTrtError.__subclasses__()} | {"warnings.warn"}
COSTS = table("docs/models.md", "configuration")


def named(page: str, *names: str) -> bool:
    """Whether the page has one of the names in backticks."""
    return any(
        re.search(rf"`[^`\n]*(?<![\w-]){re.escape(name)}(?![\w-])[^`\n]*`", text(page)) for name in names
    )


def parameters(function: Callable[..., Any]) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
    ]


@pytest.mark.parametrize(
    "function", [VideoPipeline.__call__, VideoPipeline.from_pretrained], ids=lambda f: f.__name__
)
def test_every_argument_of_the_pipeline_is_explained(function: Callable[..., Any]) -> None:
    assert [name for name in parameters(function) if not named("docs/guidance.md", name)] == []


def test_every_decode_option_is_explained() -> None:
    options = {name for configuration in published() for name in family(configuration).decode_options}
    assert {name for name in options if not named("docs/guidance.md", name)} == set()


def test_every_option_of_build_is_explained() -> None:
    options = {
        name: f"--{name.replace('_', '-')}" for name in parameters(build_command) if name != "checkpoint"
    }
    assert [option for option in options.values() if not named("docs/building-engines.md", option)] == []
    assert {*parameters(build)} == {"checkpoint", *options, "progress"}


def test_every_option_of_generate_is_explained() -> None:
    missing = [
        name
        for name in parameters(generate_command)
        if not named("docs/guidance.md", name, f"--{name.replace('_', '-')}")
    ]
    assert missing == []


def test_every_option_and_field_of_serve_is_explained() -> None:
    options = [
        "CHECKPOINT" if name == "checkpoints" else f"--{name.replace('_', '-')}"
        for name in parameters(serve_command)
    ]
    fields = [*VideoRequest.model_fields, "input_reference", "extra_params"]
    assert [name for name in (*options, *fields) if not named("docs/serving.md", name)] == []


@pytest.mark.parametrize("command", [inspect_command, verify_command], ids=lambda f: f.__name__)
def test_every_option_of_inspect_and_verify_is_explained(command: Callable[..., Any]) -> None:
    named_otherwise = {"engines": "ENGINES", "as_json": "--json"}
    names = [named_otherwise.get(name, f"--{name.replace('_', '-')}") for name in parameters(command)]
    assert [name for name in names if name != "ENGINES" and not named("docs/building-engines.md", name)] == []


def test_every_command_is_shown() -> None:
    group: Any = typer.main.get_command(_application())
    names = ("quickstart", "building-engines", "benchmarks", "serving")
    shown = "".join(map(text, ("README.md", *(f"docs/{name}.md" for name in names))))
    commands = [*group.commands, *(f"bench {name}" for name in group.commands["bench"].commands)]
    assert [command for command in commands if f"stg-trt {command}" not in shown] == []


def messages() -> Iterator[tuple[str, str]]:
    """Where a message for users is, and the message with X for what is not constant."""
    folders = ("stg_trt", "runtime", "build_engines", "benchmarks")
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in MESSAGES:
                message = _constant(node.args[0])
                if message.strip("X"):
                    yield path.relative_to(ROOT).as_posix(), message


def _constant(message: ast.expr) -> str:
    if isinstance(message, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in message.values)
    return str(message.value) if isinstance(message, ast.Constant) else "X"


def test_every_message_is_in_troubleshooting() -> None:
    rows = re.findall(r"^\| (`.*?) \|", text("docs/troubleshooting.md"), re.MULTILINE)
    cells = [cell for row in rows for cell in re.findall(r"`([^`]+)`", row)]
    patterns = [re.compile(".*".join(map(re.escape, re.split(" ?…", f"{cell}…")))) for cell in cells]
    found = [*messages()]
    missing = [entry for entry in found if not any(pattern.fullmatch(entry[1]) for pattern in patterns)]
    assert len(found) > 150
    assert missing == []


def family(configuration: str) -> ModelFamily:
    return Checkpoint.open(configuration, random_weights=True).family


@pytest.mark.parametrize(
    "row",
    table("docs/models.md", "family | STG mode, blocks"),
    ids=lambda row: row["family"],
)
def test_defaults_are_those_of_the_family(row: dict[str, str]) -> None:
    of = family(FAMILIES[row["family"]]).defaults
    assert row["STG mode, blocks"] == f"`{of.stg_mode}` {[*all_blocks(read_skips(of.stg_blocks))]}"
    assert row["`guidance_scale`"].split(",")[0] == str(of.embedded_guidance or of.guidance_scale)
    wanted = (of.stg_scale, of.rescale, of.num_inference_steps, of.frame_rate)
    got = (row["`stg_scale`"], row["`rescale`"], row["steps"], row["frames per second"])
    assert tuple(map(float, got)) == wanted
    assert ("`true_cfg_scale`" in row["`guidance_scale`"]) == (of.embedded_guidance is not None)


def test_every_published_configuration_has_its_cost() -> None:
    assert sorted(row["configuration"].strip("`") for row in COSTS) == sorted(published())


@pytest.mark.parametrize("row", COSTS, ids=lambda row: row["configuration"])
def test_costs_are_those_of_the_plans(row: dict[str, str]) -> None:
    """FLOPs of a step with the family's STG over one without, shared and in full; the README's too."""
    of = family(row["configuration"].strip("`"))
    width, height, frames = map(int, row["size"].split("x"))
    sound = of.audio_num_frames(frames, of.defaults.frame_rate)
    workload = Workload(height, width, frames, of.defaults.text_length, "bf16", audio_num_frames=sound)
    of.check(workload)
    mode, skips = of.defaults.stg_mode, read_skips(of.defaults.stg_blocks)
    segments = of.segments("segmented", mode, all_blocks(skips))
    plain = UNCOND_COND if of.embedded_guidance is None else (COND,)
    passes = (*plain, *(Pass(name, Perturbation(mode, blocks)) for name, blocks in skips.items()))

    def cost(plan: Any) -> float:
        flops: int = plan.flops(lambda segment: of.segment_flops(segment, workload))
        return flops

    without = cost(plan_step(segments, plain))
    shared = cost(plan_step(segments, passes)) / without
    full = cost(full_plan(segments, passes)) / without
    assert row["blocks"] == str(of.num_blocks)
    assert row["video tokens"] == f"{of.tokens(workload):,}"
    assert (row["shared prefix"], row["all passes in full"]) == (f"{shared:.2f}", f"{full:.2f}")
    costs = " ".join(row["STG step / step without, FLOPs"] for row in table("README.md", "model"))
    assert f"{shared:.2f}" in costs and f"{full:.2f}" in costs
