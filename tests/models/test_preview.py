"""Colours of latents: fitted exactly where they are linear, and shown as pictures."""

from __future__ import annotations

import numpy as np
import torch

from stg_trt.models.preview import PreviewMap


def test_a_linear_map_is_found_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5, 3, generator=generator), torch.tensor([0.1, -0.2, 0.3])
    latents = torch.randn(200, 5, generator=generator)
    latents[:, 4] = latents[:, 3]  # The VAE may say things twice.
    found = PreviewMap.of(latents, latents @ weight + bias)
    video = latents.T.reshape(1, 5, 2, 10, 10)
    shown = found.frames(video * 0.1)
    expected = (video.movedim(1, -1) * 0.1) @ weight + bias
    assert found.fit == 1.0 and shown.shape == (1, 2, 10, 10, 3) and shown.dtype == np.uint8
    wanted = ((expected / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
    assert np.abs(shown.astype(float) - wanted).max() <= 1


def test_what_is_not_linear_has_a_smaller_fit() -> None:
    latents = torch.randn(500, 4, generator=torch.Generator().manual_seed(1))
    assert PreviewMap.of(latents, latents[:, :3].square()).fit < 0.1


def test_numbers_that_are_no_colours_are_grey() -> None:
    found = PreviewMap(((1.0, 1.0, 1.0),), (0.0, 0.0, 0.0), 1.0)
    assert found.frames(torch.full((1, 1, 1, 1, 1), torch.nan)).tolist() == [[[[[128, 128, 128]]]]]
    assert found.frames(torch.full((1, 1, 1, 1, 1), 9.0)).max() == 255
