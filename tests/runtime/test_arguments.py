"""How the arguments of a call and of the command line become one set of options."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file

from stg_trt import GuidanceOptions, VideoPipeline
from stg_trt.engines.store import EngineStore
from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.runtime import pipeline as pipeline_module
from stg_trt.runtime.arguments import ForeignArguments
from stg_trt.runtime.command import generate

OPTIONS: dict[str, Any] = {
    "guidance_scale": 2.0,
    "stg_scale": 3.0,
    "rescale": 0.25,
    "stg_mode": "stg-r",
    "stg_blocks": [3],
    "stg_range": (1, 2),
    "preset": "ltx-video-13b-0.9.8-dev",
    "cfg_zero_star": False,
    "use_dynamic_cfg": True,
    "true_cfg_scale": 6.0,
    "guidance_scale_2": 7.0,
    "min_guidance_scale": 1.5,
    "max_guidance_scale": 2.5,
    "modality_scale": 3.5,
    "audio_guidance_scale": 4.5,
    "audio_stg_scale": 0.5,
    "audio_modality_scale": 5.5,
    "audio_rescale": 0.25,
}
# Of single families, so among the options.
OF_FEW = ("guidance_scale_2", "min_guidance_scale", "max_guidance_scale", "modality_scale", "audio_")


class Taken(Exception):
    """Ends a call once its options are made."""


def test_every_option_is_an_argument_of_the_same_type() -> None:
    arguments = inspect.signature(VideoPipeline.__call__).parameters
    assert OPTIONS.keys() == {field.name for field in fields(GuidanceOptions)}
    for field in (field for field in fields(GuidanceOptions) if not field.name.startswith(OF_FEW)):
        assert (
            arguments[field.name].annotation == field.type and arguments[field.name].default == field.default
        )


def test_every_argument_reaches_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[GuidanceOptions] = []

    def take(guidance: GuidanceOptions | None, arguments: GuidanceOptions) -> None:
        made.append(arguments)
        raise Taken

    monkeypatch.setattr(pipeline_module, "choose_options", take)
    pipeline = VideoPipeline.__new__(VideoPipeline)
    with pytest.raises(Taken):
        pipeline(prompt="a red circle", **OPTIONS)
    assert made == [GuidanceOptions(**OPTIONS)]


def test_options_beside_arguments_are_refused_before_anything_else() -> None:
    pipeline = VideoPipeline.__new__(VideoPipeline)
    with pytest.raises(InvalidRequest, match="got stg_scale beside it: move them into GuidanceOptions"):
        pipeline(prompt="a red circle", stg_scale=1.0, guidance=GuidanceOptions())


def counted(calls: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which counts its calls."""

    def run(*args: Any, **options: Any) -> Any:
        calls[name] += 1
        return function(*args, **options)

    return run


def test_the_command_line_makes_the_same_options(
    ltx_checkpoint: Path,
    ltx_engines: Path,
    embeds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It opens both folders once, and looks for a build before the models load and once more in the call."""
    calls: Counter[str] = Counter()
    for owner, name in ((Checkpoint, "open"), (EngineStore, "open"), (EngineStore, "find")):
        found = counted(calls, f"{owner.__name__}.{name}", getattr(owner, name))
        monkeypatch.setattr(owner, name, staticmethod(found) if name == "open" else found)
    choose = Mock(wraps=pipeline_module.choose_options)
    monkeypatch.setattr(pipeline_module, "choose_options", choose)
    output = tmp_path / "x.safetensors"
    generate(
        str(ltx_checkpoint), ltx_engines, output, embeds=embeds, num_inference_steps=9, sigmas="1,0.6",
        guidance_scale="3", stg_scale=["0,1"], stg_mode="stg-r", stg_blocks=["3"], rescale="0.5",
        layout="segmented",
    )  # fmt: skip
    options = GuidanceOptions(3.0, [0.0, 1.0], 0.5, "stg-r", (3,))
    assert [call.args[0] for call in choose.call_args_list] == [options]
    assert calls == {"Checkpoint.open": 1, "EngineStore.open": 1, "EngineStore.find": 2}
    tensors = load_file(embeds)
    pipeline = VideoPipeline.from_pretrained(ltx_checkpoint, ltx_engines, layout="segmented")
    again = pipeline(**tensors, sigmas=[1.0, 0.6], guidance=options, output_type="latent").frames
    assert load_file(output)["latents"].equal(again)
    with pytest.raises(InvalidRequest, match="timesteps: expected a scheduler that steps between them"):
        generate(str(ltx_checkpoint), ltx_engines, output, embeds=embeds, timesteps="1000,500")


def test_the_rescale_of_a_sound_has_two_names_and_takes_one() -> None:
    read = ForeignArguments.read({"audio_guidance_rescale": 0.5, "audio_stg_scale": None}, None, None, None)
    assert read.scales == {"audio_rescale": 0.5, "audio_stg_scale": "video"}
    with pytest.raises(InvalidRequest, match="audio_guidance_rescale: expected audio_rescale under one name"):
        ForeignArguments.read({"audio_guidance_rescale": 0.5, "audio_rescale": 0.5}, None, None, None)
