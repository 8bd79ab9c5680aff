"""Whole steps on the CPU and on a GPU, of a model whose attention every kernel of a GPU knows.

The goldens' heads have 12 channels and their texts 9 tokens, which a GPU's attention kernels may refuse,
though no published model has such shapes. Here a head has 64 channels and a text 16 tokens, and float32
diffusers on the CPU says what is right.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor

from stg_trt import VideoPipeline, build
from stg_trt.benchmarks.eager_step import EagerStep, perturbed_skip_row
from stg_trt.benchmarks.scenario import Inputs, Scenario
from stg_trt.benchmarks.verify import relative_l2
from stg_trt.engines import inductor
from stg_trt.engines.store import EngineStore
from stg_trt.errors import EngineRejected
from stg_trt.models.segment import LAYOUTS
from stg_trt.runtime.graph import StepGraph
from tests.conftest import BuiltOnce
from tests.support.cli import ROOT
from tests.support.golden_calls import every_step

STEPS, BLOCK = 4, 1
MODEL = ROOT / "benchmarks" / "models" / "ltx-video-128x2"


@dataclass(frozen=True)
class Place:
    """Where engines run, in which layouts, and the relative L2 that their precision leaves after a step."""

    backend: str
    target: str
    layouts: tuple[str, ...]
    limit: float


# The goldens have tried both layouts on the CPU.
CPU = Place("onnxruntime", "cpu", ("segmented",), limit=1e-4)
GPU = Place("inductor", "this-gpu", LAYOUTS, limit=3e-2)
CASES = [pytest.param(CPU, layout, id=f"cpu-{layout}") for layout in CPU.layouts]
CASES += [pytest.param(GPU, layout, id=f"gpu-{layout}", marks=pytest.mark.gpu) for layout in GPU.layouts]


@pytest.fixture(scope="module")
def fit_checkpoint(built_once: BuiltOnce) -> Path:
    """Three blocks of two heads with 64 channels; their weights are large, so that a perturbation shows."""

    def fill(folder: Path) -> None:
        config = json.loads((MODEL / "transformer" / "config.json").read_text())
        torch.manual_seed(0)
        model = LTXVideoTransformer3DModel.from_config(config | {"num_layers": 3})
        for weight in (weight for weight in model.parameters() if weight.dim() > 1):
            weight.data *= 2
        model.save_pretrained(folder / "transformer")
        shutil.copytree(MODEL / "scheduler", folder / "scheduler")

    return built_once("fit-ltx-checkpoint", fill)


@pytest.fixture(scope="module")
def scenario(fit_checkpoint: Path) -> Scenario:
    """The size, and the family's own guidance."""
    return Scenario(str(fit_checkpoint), 128, 128, 25, 16, "stg-a", (BLOCK,), "onnxruntime")


@pytest.fixture(scope="module")
def engines_of(built_once: BuiltOnce, fit_checkpoint: Path, scenario: Scenario) -> Callable[[Place], Path]:
    """Engines for a place; its layouts share their packages."""

    def fill(root: Path, place: Place) -> None:
        for layout in place.layouts:
            build(
                fit_checkpoint,
                root,
                height=scenario.height,
                width=scenario.width,
                num_frames=scenario.num_frames,
                text_length=scenario.text_length,
                stg_blocks=(BLOCK,),
                stg_mode=scenario.stg_mode,
                layout=layout,
                backend=place.backend,
                target=place.target,
                verify_timesteps=1,
            )

    return lambda place: built_once(f"fit-ltx-{place.backend}", lambda root: fill(root, place))


@pytest.fixture(scope="module")
def inputs(scenario: Scenario) -> Inputs:
    """A request at random."""
    return scenario.inputs(STEPS)


@pytest.fixture(scope="module")
def model(fit_checkpoint: Path) -> Any:
    """That of diffusers, in float32 on the CPU."""
    return LTXVideoTransformer3DModel.from_pretrained(fit_checkpoint, subfolder="transformer").eval()


@pytest.fixture(scope="module")
def expected(scenario: Scenario, model: Any, inputs: Inputs) -> list[Tensor]:
    """Its latents after every step."""
    with perturbed_skip_row(scenario, model):
        return eager_steps(scenario, model, inputs)


def eager_steps(scenario: Scenario, model: Any, inputs: Inputs) -> list[Tensor]:
    """Latents after every step; without a perturbed row, STG changes nothing."""
    eager = EagerStep(scenario, model, inputs, torch.float32, "cpu")
    latents, preds = [inputs.noise], list[Tensor]()
    for i in range(STEPS):
        latents.append(eager.step(latents[-1], i, preds))
    return latents[1:]


def arguments(scenario: Scenario, inputs: Inputs) -> dict[str, Any]:
    """The request in VideoPipeline's names."""
    defaults = scenario.family.defaults
    return {
        "prompt_embeds": inputs.cond.embeds,
        "prompt_attention_mask": inputs.cond.mask,
        "negative_prompt_embeds": inputs.uncond.embeds,
        "negative_prompt_attention_mask": inputs.uncond.mask,
        "latents": inputs.noise,
        "num_inference_steps": STEPS,
        "frame_rate": inputs.frame_rate,
        "guidance_scale": defaults.guidance_scale,
        "stg_scale": defaults.stg_scale,
        "stg_mode": scenario.stg_mode,
        "stg_blocks": [BLOCK],
        "rescale": defaults.rescale,
        "output_type": "latent",
    }


@pytest.mark.slow(reason="exports graphs of its own")
@pytest.mark.parametrize(("place", "layout"), CASES)
def test_every_step_matches(
    engines_of: Callable[[Place], Path],
    fit_checkpoint: Path,
    scenario: Scenario,
    inputs: Inputs,
    expected: list[Tensor],
    recwarn: pytest.WarningsRecorder,
    place: Place,
    layout: str,
) -> None:
    """On a GPU as CUDA graphs that were compared with a plain run."""
    pipeline = VideoPipeline.from_pretrained(fit_checkpoint, engines=engines_of(place), layout=layout)
    steps = every_step(pipeline, **arguments(scenario, inputs))
    assert len(steps) == STEPS
    for i, (latents, wanted) in enumerate(zip(steps, expected, strict=True)):
        assert relative_l2(latents.cpu(), wanted) <= place.limit, f"step {i}"
    if place is GPU:
        programs: list[Any] = [p for s in pipeline._samplers._samplers.values() for p in s._bound.values()]
        assert programs and all(isinstance(p, StepGraph) and p._graph is not None for p in programs)
        assert not [w for w in recwarn.list if "capture failed" in str(w.message)]


def test_no_limit_hides_the_perturbation(
    scenario: Scenario, model: Any, inputs: Inputs, expected: list[Tensor]
) -> None:
    """Engines that perturb nothing would be noticed after every step."""
    for without, wanted in zip(eager_steps(scenario, model, inputs), expected, strict=True):
        assert relative_l2(without, wanted) > max(CPU.limit, GPU.limit)


@pytest.mark.gpu
def test_every_attention_on_a_gpu_is_fused(engines_of: Callable[[Place], Path]) -> None:
    for found in EngineStore.open(engines_of(GPU)).builds:
        for record in found.manifest.segments:
            assert record.fused_attentions == record.attentions
            assert record.activation_bytes is not None and record.verification


@pytest.mark.gpu
def test_engines_of_another_gpu_are_refused(
    engines_of: Callable[[Place], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (99, 9))
    found = EngineStore.open(engines_of(GPU)).builds[0]
    files = {r.segment.name: [found.folder / f.name for f in r.files] for r in found.manifest.segments}
    with pytest.raises(EngineRejected, match=r"expected a machine with sm_\d+, got .* without it"):
        inductor.load_all("inductor", files, torch.device("cuda"))
