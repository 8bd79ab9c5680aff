"""The files of a call's videos, written while later videos are decoded."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from stg_trt import VideoPipeline
from stg_trt.errors import InvalidRequest
from stg_trt.runtime.callbacks import shown_to
from stg_trt.runtime.output import VideoPipelineOutput
from stg_trt.runtime.video_file import save_video
from stg_trt.runtime.video_writer import VideoWriter
from tests.support.cli import invoke
from tests.support.family_cases import LTX, FamilyCase
from tests.support.whole_pipelines import PROMPTS, call, seeded

CPU_SECONDS_TO_STOP = 5
ONE = pytest.mark.parametrize("case", [LTX], ids=str, indirect=True)


class TwoVideos:
    """All that a writer asks a pipeline for."""

    num_videos = 2


def video(frames: int, side: int = 64) -> VideoPipelineOutput:
    return VideoPipelineOutput(np.random.default_rng(0).random((1, frames, side, side, 3), np.float32))


@ONE
def test_a_file_is_written_before_the_next_video_is_decoded(
    case: FamilyCase, pipeline: VideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.scheduler = case.schedulers[0]
    vae = pipeline.components.load_vae(case.workload, torch.device("cpu")).vae
    decode = vae.decode
    found: list[list[str]] = []

    def wait_for_the_first_file(latents: Tensor, *given: Any, **options: Any) -> Any:
        """Would wait in vain if the files were written after the call, or in its thread."""
        deadline = time.monotonic() + 30
        while found and not (tmp_path / "x-0.mp4").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        found.append(sorted(os.listdir(tmp_path)))
        return decode(latents, *given, **options)

    monkeypatch.setattr(vae, "decode", wait_for_the_first_file)
    given = {**call(case, pipeline, PROMPTS), "num_inference_steps": 1, "output_type": "np"}
    with VideoWriter(tmp_path / "x.mp4", 25.0) as writer:
        made = pipeline(**given, generator=seeded(1), callback_on_video_end=writer.take)
        paths = writer.finish()
    assert found == [[], ["x-0.mp4"]]
    assert paths == [tmp_path / "x-0.mp4", tmp_path / "x-1.mp4"]
    for path, frames in zip(paths, made.frames, strict=True):
        save_video(frames, tmp_path / "expected.mp4", 25.0)
        assert path.read_bytes() == (tmp_path / "expected.mp4").read_bytes()


def test_each_video_is_shown_with_its_sound() -> None:
    shown: list[VideoPipelineOutput] = []
    pipe, sound = Mock(), torch.rand(2, 2, 100)
    show = shown_to(pipe, lambda pipe, index, made: shown.append(made), sound, 16_000)
    for name in ("first", "second"):
        show([name])
    assert [made.frames for made in shown] == [["first"], ["second"]]
    for made, expected in zip(shown, sound, strict=True):
        assert made.audio is not None and made.audio.shape == (1, 2, 100)
        assert torch.equal(made.audio[0], expected) and made.audio_sampling_rate == 16_000


@ONE
def test_the_command_line_names_one_file_per_video(
    case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline, tmp_path: Path
) -> None:
    options = ("--engines", pipeline.store.root, "--prompt", PROMPTS[0], "--num-inference-steps=1")
    for videos, names in ((1, ["x.mp4"]), (2, ["x-0.mp4", "x-1.mp4"])):
        folder = tmp_path / str(videos)
        folder.mkdir()
        output = ("--output", folder / "x.mp4", f"--num-videos-per-prompt={videos}")
        result = invoke("generate", checkpoint, *options, *output)
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == [str(folder / name) for name in names]
        assert sorted(os.listdir(folder)) == names
    first, second = ((tmp_path / "2" / name).read_bytes() for name in names)
    assert first != second


def test_a_file_that_cannot_be_written_ends_the_call(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "nowhere" / "x.mp4", 25.0) as writer:
        writer.take(TwoVideos(), 0, video(2))  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match=r"expected to write .*x-0\.mp4, got No such file"):
            writer.finish()
        with pytest.raises(InvalidRequest, match=r"expected to write .*x-0\.mp4"):
            writer.take(TwoVideos(), 1, video(2))  # type: ignore[arg-type]


def test_whoever_leaves_early_keeps_whole_files_alone(tmp_path: Path) -> None:
    """As Ctrl-C does."""
    whole = tmp_path / "x-0.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "x.mp4", 25.0) as writer:
        writer.take(TwoVideos(), 0, video(2))  # type: ignore[arg-type]
        writer.finish()
        kept = whole.read_bytes()
        # Encoding it would take minutes.
        frames = np.broadcast_to(video(1, 512).frames, (1, 5000, 512, 512, 3))
        writer.take(TwoVideos(), 1, VideoPipelineOutput(frames))  # type: ignore[arg-type]
        deadline = time.monotonic() + 30
        while len(os.listdir(tmp_path)) == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(os.listdir(tmp_path)) == 2
        began = time.process_time()
        raise KeyboardInterrupt
    assert time.process_time() - began < CPU_SECONDS_TO_STOP
    assert os.listdir(tmp_path) == ["x-0.mp4"] and whole.read_bytes() == kept
