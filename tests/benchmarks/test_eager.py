"""The peers' model: its batch of three equals three passes with the perturbation written plainly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stg_trt.benchmarks.eager import EagerStep, perturbed_skip_row
from stg_trt.benchmarks.setting import Setting
from stg_trt.perturbation import Perturbation
from tests.eager_reference import perturbed


@pytest.fixture(scope="module")
def model() -> Any:
    from tests.benchmarks.conftest import MODEL

    setting = Setting(str(MODEL), 64, 64, 9, 8, stg_mode="stg-a", stg_blocks=(1,), backend="onnxruntime")
    return setting.opened.load_transformer()


@pytest.mark.parametrize("mode", ["stg-a", "stg-r"])
@pytest.mark.parametrize("blocks", [(1,), (0, 1)])
def test_rows_equal_passes_of_their_own(
    setting: Setting, model: Any, mode: str, blocks: tuple[int, ...]
) -> None:
    inputs = setting.inputs(4)
    timestep = torch.tensor([500.0])

    def row(text: Any) -> torch.Tensor:
        pred: torch.Tensor = model(
            inputs.noise,
            text.embeds,
            timestep,
            text.mask,
            num_frames=2,
            height=2,
            width=2,
            rope_interpolation_scale=(8 / 25, 32, 32),
            return_dict=False,
        )[0]
        return pred

    with torch.no_grad():
        expected = [row(inputs.uncond), row(inputs.cond)]
        with perturbed(model, mode, blocks):
            expected.append(row(inputs.cond))
        eager = EagerStep(setting, model, inputs, torch.float32, "cpu")
        with perturbed_skip_row(model, Perturbation(mode, blocks)):
            preds = eager.preds(inputs.noise, timestep)
        torch.testing.assert_close(preds, torch.cat(expected), rtol=0, atol=1e-5)
        assert (preds[2] - preds[1]).abs().max() > 1e-3
        restored = eager.preds(inputs.noise, timestep)
        torch.testing.assert_close(restored[2], restored[1], rtol=0, atol=1e-5)
