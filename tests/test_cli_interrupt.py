"""Ctrl-C, a killed process, full and read-only disks, and two builders at once."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from stg_trt.device import Cpu
from stg_trt.engine_store import EngineRequest, EngineStore
from stg_trt.errors import InvalidRequest
from stg_trt.video_file import save_video
from tests.cli import SMALL, assert_one_line_error, contents, finish, run, start

UNVERIFIED = (*SMALL, "--verify-timesteps=0")
CUT = (*UNVERIFIED, "--stg-blocks=0")
SEGMENTS = ("text", "front", "block_0", "back")
# A step of the tiny engines takes milliseconds; an interrupt ends at the next one.
A_FEW_SECONDS = 10


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB; `mount -o remount` changes it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", folder):
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def mount(*arguments: str | Path) -> int:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode


def fill(disk: Path) -> None:
    """Takes what space is left."""
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(1024))


def embeds(path: Path, checkpoint: Path) -> Path:
    tensors = load_file(checkpoint / "cfg.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "expected" not in name}, path)
    return path


def assert_whole(engines: Path, builds: int = 1) -> None:
    """Every build is complete and loads, and nothing else lies beside its engines."""
    store = EngineStore.open(engines)
    assert len(store.builds) == builds and not store.unreadable
    for build in store.builds:
        assert EngineRequest().rejects(build.manifest) is None
        assert build.load_engines(Cpu())
        files = {file.name for record in build.manifest.segments for file in record.files}
        assert set(os.listdir(build.folder)) == {"manifest.json", ".lock", *files}


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_resumes(kill: signal.Signals, tmp_path: Path, one_block: Path) -> None:
    command = ("build", one_block, "--output", tmp_path / "engines", *CUT)
    with (tmp_path / "stderr").open("w+") as stderr:
        process = start(*command, stderr=stderr)
        wait_for(process, tmp_path / "stderr", "front: done")
        start_s = time.monotonic()
        process.send_signal(kill)
        process.wait(A_FEW_SECONDS)
    assert time.monotonic() - start_s < A_FEW_SECONDS
    (folder,) = (tmp_path / "engines").iterdir()
    kept = contents(folder)
    if kill == signal.SIGINT:
        report = (tmp_path / "stderr").read_text()
        result = subprocess.CompletedProcess(command, process.returncode, "", report)
        assert_one_line_error(result, "interrupted: nothing half-written is left, finished segments are kept")
        assert kept.keys() == {"manifest.json", "text.onnx", "front.onnx"}
        assert {*os.listdir(folder)} == {*kept, ".lock"}
    again = run(*command)
    assert again.returncode == 0, again.stderr
    for segment in SEGMENTS[:2]:
        assert f"{segment}: already built" in again.stderr
        assert contents(folder)[f"{segment}.onnx"] == kept[f"{segment}.onnx"]
    assert "back: done" in again.stderr
    assert_whole(tmp_path / "engines")


def wait_for(process: subprocess.Popen[str], report: Path, text: str) -> None:
    deadline = time.monotonic() + 120
    while text not in report.read_text():
        assert process.poll() is None and time.monotonic() < deadline, report.read_text()
        time.sleep(0.05)


def test_an_interrupted_generation_writes_nothing(
    tmp_path: Path, ltx_checkpoint: Path, ltx_engines: Path
) -> None:
    source = embeds(tmp_path / "embeds.safetensors", ltx_checkpoint)
    arguments = ("--engines", ltx_engines, "--output", tmp_path / "x.safetensors", "--embeds", source)
    ours, theirs = pty.openpty()
    # On a terminal the bar says when the sampling has begun.
    process = start("generate", ltx_checkpoint, *arguments, "--num-inference-steps=600", stderr=theirs)
    os.close(theirs)
    shown = b""
    while b"sampling" not in shown:
        shown += os.read(ours, 1 << 16)
    process.send_signal(signal.SIGINT)
    while part := read(ours):
        shown += part
    process.wait(A_FEW_SECONDS)
    os.close(ours)
    assert process.returncode == 1 and b"Traceback" not in shown
    assert b"stg-trt: interrupted: " in shown.splitlines()[-1]
    assert os.listdir(tmp_path) == ["embeds.safetensors"]


def read(terminal: int) -> bytes:
    """What the program shows next; empty once it has ended."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:
        return b""


def test_a_build_continues_when_the_full_disk_has_space(disk: Path, one_block: Path) -> None:
    command = ("build", one_block, "--output", disk / "engines", *UNVERIFIED)
    assert_one_line_error(run(*command), "expected free disk space, got none left: free some or choose")
    (folder,) = (disk / "engines").iterdir()
    assert contents(folder).keys() == {"manifest.json", "text.onnx"}
    assert {*os.listdir(folder)} == {"manifest.json", "text.onnx", ".lock"}
    assert mount("-o", "remount,size=8m", disk) == 0
    again = run(*command)
    assert again.returncode == 0 and "text: already built" in again.stderr, again.stderr
    assert_whole(disk / "engines")


def test_a_full_disk_keeps_the_old_result(
    tmp_path: Path, disk: Path, ltx_checkpoint: Path, ltx_engines: Path
) -> None:
    source = embeds(tmp_path / "embeds.safetensors", ltx_checkpoint)
    for name in ("x.safetensors", "x.mp4"):
        (disk / name).write_text("before")
    fill(disk)
    before = contents(disk)
    arguments = ("--engines", ltx_engines, "--output", disk / "x.safetensors", "--embeds", source)
    result = run("generate", ltx_checkpoint, *arguments, "--num-inference-steps=2")
    assert_one_line_error(result, "expected free disk space, got none left: free some or choose")
    noise = np.random.default_rng(0).random((9, 64, 64, 3), np.float32)
    with pytest.raises(InvalidRequest, match="No space left on device: choose another or free disk space"):
        save_video(noise, disk / "x.mp4", 25.0)
    assert contents(disk) == before


def test_a_disk_that_cannot_be_written(
    tmp_path: Path, disk: Path, one_block: Path, ltx_checkpoint: Path, ltx_engines: Path
) -> None:
    assert mount("-o", "remount,ro", disk) == 0
    source = embeds(tmp_path / "embeds.safetensors", ltx_checkpoint)
    arguments = ("--engines", ltx_engines, "--output", disk / "x.safetensors", "--embeds", source)
    for result in (
        run("generate", ltx_checkpoint, *arguments),
        run("build", one_block, "--output", disk, *CUT),
    ):
        assert_one_line_error(result, "output: expected a folder that can be written, got .*: choose another")
    assert not os.listdir(disk)


def test_an_output_below_a_file(tmp_path: Path, one_block: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = run("build", one_block, "--output", tmp_path / "file" / "engines", *CUT)
    assert_one_line_error(
        result, r"output: expected a folder that can be written, got .* \(Not a directory\)"
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_builders_share_a_folder(tmp_path: Path, one_block: Path) -> None:
    command = ("build", one_block, "--output", tmp_path, *UNVERIFIED)
    others = [start(*command), start(*command), start(*command, "--max-batch=2")]
    results = [finish(process) for process in others]
    assert [result.returncode for result in results] == [0, 0, 0], [result.stderr for result in results]
    reused = [result.stderr.count("already built") for result in results]
    assert sorted(reused[:2]) == [0, 2] and reused[2] == 0
    waited = ["another build is at work here, waiting for it to end" in result.stderr for result in results]
    assert waited == [reused[0] == 2, reused[1] == 2, False]
    assert_whole(tmp_path, builds=2)
