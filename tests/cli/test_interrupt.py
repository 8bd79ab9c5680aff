"""Ctrl-C, a killed process, full and read-only disks, and two builders at once."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest

from stg_trt.build_engines.kept_graphs import FOLDER
from stg_trt.engines import manifest as manifests
from stg_trt.engines.manifest import FileRecord
from stg_trt.engines.store import EngineRequest, EngineStore
from stg_trt.errors import InvalidRequest
from stg_trt.runtime.device import Cpu
from stg_trt.runtime.video_file import save_video
from stg_trt.system.files import file_sha256
from tests.support.cli import (
    PROGRAM,
    ROOT,
    SIZES,
    SMALL,
    assert_one_line_error,
    contents,
    invoke,
)
from tests.support.endless_graph import loop_after
from tests.support.fine_tuned import save_fine_tuned
from tests.support.forked_program import ForkedProgram, ProgramServer, program_server

pytestmark = pytest.mark.slow(reason="starts programs and interrupts them")

UNVERIFIED = (*SMALL, "--verify-timesteps=0")
CUT = (*SIZES, "--verify-timesteps=0", "--stg-blocks=0")
SEGMENTS = ("text", "front", "block_0", "back")
# Seconds for an interrupted program to end, on a loaded machine.
CPU_SECONDS_TO_END = 2
A_MINUTE = 60


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, one_block: Path) -> Iterator[ProgramServer]:
    """Its builds export the blocks that can be perturbed and no other piece."""
    with program_server(tmp_path_factory.mktemp("server") / "log", one_block, *UNVERIFIED) as started:
        yield started


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


def builds_in(engines: Path) -> list[Path]:
    """Folders of builds, finished or not."""
    return [path for path in engines.iterdir() if path.name != FOLDER]


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
def test_an_interrupted_build_resumes(
    kill: signal.Signals, tmp_path: Path, one_block: Path, server: ProgramServer
) -> None:
    command = ("build", one_block, "--output", tmp_path / "engines", *CUT)
    with (tmp_path / "stderr").open("w+") as stderr:
        process = server.start(*command, output=stderr)
        wait_for(process, tmp_path / "stderr", "text: done")
        process.send_signal(kill)
        status = process.wait(A_MINUTE)
    (folder,) = builds_in(tmp_path / "engines")
    kept = contents(folder)
    # On a busy machine more may be finished before the signal comes.
    done = [segment for segment in SEGMENTS if f"{segment}: done" in (tmp_path / "stderr").read_text()]
    assert 0 < len(done) < len(SEGMENTS)
    if kill == signal.SIGINT:
        report = (tmp_path / "stderr").read_text()
        result = subprocess.CompletedProcess(command, status, "", report)
        assert_one_line_error(result, "interrupted: nothing half-written is left, finished segments are kept")
        files = [f"{segment}.onnx" for segment in SEGMENTS]
        assert {"manifest.json", *files[: len(done)]} <= kept.keys() <= {"manifest.json", *files[:-1]}
        assert {*os.listdir(folder)} == {*kept, ".lock"}
    again = invoke(*command)
    assert again.returncode == 0, again.stderr
    for segment in done:
        assert f"{segment}: already built" in again.stderr
        assert contents(folder)[f"{segment}.onnx"] == kept[f"{segment}.onnx"]
    assert "back: done" in again.stderr
    assert_whole(tmp_path / "engines")


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_with_other_weights_leaves_the_first_one_whole(
    kill: signal.Signals, tmp_path: Path, one_block: Path, server: ProgramServer
) -> None:
    engines, other = tmp_path / "engines", save_fine_tuned(one_block, tmp_path / "other")
    assert invoke("build", one_block, "--output", engines, *CUT).returncode == 0
    (first,) = builds_in(engines)
    before, graphs = contents(first), contents(engines / FOLDER)
    command = ("build", other, "--output", engines, *CUT)
    with (tmp_path / "stderr").open("w+") as stderr:
        process = server.start(*command, output=stderr)
        wait_for(process, tmp_path / "stderr", "text: done")
        process.send_signal(kill)
        process.wait(A_MINUTE)
    # Without exports a segment takes a moment: more than the text may be finished when the signal comes.
    done = [segment for segment in SEGMENTS if f"{segment}: done" in (tmp_path / "stderr").read_text()]
    again = invoke(*command)
    assert again.returncode == 0 and "text" in done, again.stderr
    for segment in SEGMENTS:
        (line,) = (line for line in again.stderr.splitlines() if line.startswith(f"{segment}: "))
        assert ("already built" if segment in done else "graph of an earlier build") in line
    assert contents(first) == before and contents(engines / FOLDER) == graphs
    assert_whole(engines, builds=2)


def wait_for(process: ForkedProgram, report: Path, text: str) -> None:
    deadline = time.monotonic() + 120
    while text not in report.read_text():
        assert process.poll() is None and time.monotonic() < deadline, report.read_text()
        time.sleep(0.05)


def test_an_interrupted_generation_writes_nothing(
    tmp_path: Path, ltx_checkpoint: Path, ltx_engines: Path, embeds: Path
) -> None:
    """The program as users start it."""
    arguments = ("--engines", ltx_engines, "--output", tmp_path / "x.safetensors", "--embeds", embeds)
    command = [PROGRAM, "generate", ltx_checkpoint, *arguments, "--num-inference-steps=600"]

    def start(terminal: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*map(str, command)], stdout=terminal, stderr=terminal, cwd=ROOT)

    # On a terminal the bar says when the sampling has begun.
    interrupt_at(b"sampling", start, lambda: None)
    assert not os.listdir(tmp_path)


def test_an_interrupt_ends_a_running_call(
    tmp_path: Path, ltx_checkpoint: Path, ltx_engines: Path, embeds: Path, server: ProgramServer
) -> None:
    """The first engine never comes back from the second step."""
    (source,) = ltx_engines.glob("segmented-*")
    engines = tmp_path / "engines"
    shutil.copytree(source, engines / source.name)
    never_end(engines / source.name, "front")
    arguments = ("--engines", engines, "--output", tmp_path / "x.safetensors", "--embeds", embeds)
    command = ("generate", ltx_checkpoint, *arguments, "--num-inference-steps=2")
    ended = interrupt_at(b"sampling", lambda terminal: server.start(*command, output=terminal), a_moment)
    assert ended < CPU_SECONDS_TO_END
    assert os.listdir(tmp_path) == ["engines"]


def test_an_interrupt_ends_the_numerics_gate(tmp_path: Path, one_block: Path, server: ProgramServer) -> None:
    """The graph that the gate runs never comes back."""
    command = ("build", one_block, "--output", tmp_path / "engines", *SMALL)
    ended = interrupt_at(b"verify", with_an_endless_gate(server, *command), a_moment)
    assert ended < CPU_SECONDS_TO_END
    assert not os.listdir(tmp_path)


def with_an_endless_gate(server: ProgramServer, *command: str | Path) -> Callable[[int], ForkedProgram]:
    return lambda terminal: server.start(*command, output=terminal, program="endless gate")


def test_a_builder_goes_on_where_the_one_it_waits_for_has_built_nothing(
    tmp_path: Path, one_block: Path, server: ProgramServer
) -> None:
    report = tmp_path / "stderr"
    command = ("build", one_block, "--output", tmp_path / "engines", *SMALL, "--verify-timesteps=1")
    waiting = []

    def start_another() -> None:
        with report.open("w") as stderr:
            waiting.append(server.start(*command, output=stderr))
        wait_for(waiting[0], report, "another build is at work here")

    interrupt_at(b"verify", with_an_endless_gate(server, *command), start_another)
    assert waiting[0].wait(A_MINUTE) == 0, report.read_text()
    assert_whole(tmp_path / "engines")


def interrupt_at(
    sign: bytes,
    start: Callable[[int], ForkedProgram | subprocess.Popen[bytes]],
    meanwhile: Callable[[], None],
) -> float:
    """Starts a program on a terminal, lets it show a sign, calls `meanwhile`, and interrupts it.

    The CPU time that a forked one took to end, in seconds.
    """
    ours, theirs = pty.openpty()
    process = start(theirs)
    os.close(theirs)
    shown = b""
    while sign not in shown:
        part = read(ours)
        assert part, shown
        shown += part
    meanwhile()
    assert process.poll() is None
    until_then = psutil.Process(process.pid).cpu_times()
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + A_MINUTE
    while (part := read(ours)) and time.monotonic() < deadline:
        shown += part
    assert process.wait(A_MINUTE) == 1 and b"Traceback" not in shown
    os.close(ours)
    assert b"stg-trt: interrupted: " in shown.splitlines()[-1]
    before_s: float = until_then.user + until_then.system
    return process.cpu_s - before_s if isinstance(process, ForkedProgram) else 0.0


def a_moment() -> None:
    """After it the call that is to be interrupted has begun."""
    time.sleep(1)


def never_end(folder: Path, segment: str) -> None:
    """Gives a segment's engine a loop that a call leaves only in the first step of the schedule."""
    manifest = manifests.load(folder)
    record = manifest.record(segment)
    assert record is not None
    path = folder / record.files[0].name
    model = onnx.load(path)
    loop_after(model, "timestep", below=999.0)
    onnx.save(model, path)
    file = FileRecord(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))
    records = tuple(r.model_copy(update={"files": (file,)}) if r == record else r for r in manifest.segments)
    manifests.save(manifest.model_copy(update={"segments": records}), folder)


def read(terminal: int) -> bytes:
    """The program's next output; empty once it has ended."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:
        return b""


def test_a_build_continues_when_the_full_disk_has_space(disk: Path, one_block: Path) -> None:
    command = ("build", one_block, "--output", disk / "engines", *UNVERIFIED)
    too_small = r"disk: expected at least 0\.1 MiB free in .* got 0\.1 MiB: free some"
    assert_one_line_error(invoke(*command), too_small)
    # Room for the weights of the block, but not for all that stands beside them.
    assert mount("-o", "remount,size=96k", disk) == 0
    assert_one_line_error(invoke(*command), "expected free disk space, got none left: free some or choose")
    (folder,) = builds_in(disk / "engines")
    assert contents(folder).keys() == {"manifest.json", "text.onnx"}
    assert {*os.listdir(folder)} == {"manifest.json", "text.onnx", ".lock"}
    assert mount("-o", "remount,size=8m", disk) == 0
    again = invoke(*command)
    assert again.returncode == 0 and "text: already built" in again.stderr, again.stderr
    assert_whole(disk / "engines")


def test_a_full_disk_keeps_the_old_result(
    tmp_path: Path, disk: Path, ltx_checkpoint: Path, ltx_engines: Path, embeds: Path
) -> None:
    for name in ("x.safetensors", "x.mp4"):
        (disk / name).write_text("before")
    fill(disk)
    before = contents(disk)
    arguments = ("--engines", ltx_engines, "--output", disk / "x.safetensors", "--embeds", embeds)
    result = invoke("generate", ltx_checkpoint, *arguments, "--num-inference-steps=2")
    assert_one_line_error(result, "expected free disk space, got none left: free some or choose")
    noise = np.random.default_rng(0).random((9, 64, 64, 3), np.float32)
    with pytest.raises(InvalidRequest, match="No space left on device: choose another or free disk space"):
        save_video(noise, disk / "x.mp4", 25.0)
    assert contents(disk) == before


def test_a_disk_that_cannot_be_written(
    tmp_path: Path, disk: Path, one_block: Path, ltx_checkpoint: Path, ltx_engines: Path, embeds: Path
) -> None:
    assert mount("-o", "remount,ro", disk) == 0
    arguments = ("--engines", ltx_engines, "--output", disk / "x.safetensors", "--embeds", embeds)
    for result in (
        invoke("generate", ltx_checkpoint, *arguments),
        invoke("build", one_block, "--output", disk, *CUT),
    ):
        assert_one_line_error(result, "output: expected a folder that can be written, got .*: choose another")
    assert not os.listdir(disk)


def test_an_output_below_a_file(tmp_path: Path, one_block: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = invoke("build", one_block, "--output", tmp_path / "file" / "engines", *CUT)
    assert_one_line_error(
        result, r"output: expected a folder that can be written, got .* \(Not a directory\)"
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_builders_share_a_folder(tmp_path: Path, one_block: Path, server: ProgramServer) -> None:
    command = ("build", one_block, "--output", tmp_path / "engines", *CUT)
    reports = [tmp_path / f"stderr_{number}" for number in range(3)]
    others = []
    for report, options in zip(reports, [(), (), ("--max-batch=2",)], strict=True):
        with report.open("w") as stderr:
            others.append(server.start(*command, *options, output=stderr))
    statuses, printed = [p.wait(120) for p in others], [report.read_text() for report in reports]
    assert statuses == [0, 0, 0], printed
    reused = [text.count("already built") for text in printed]
    assert sorted(reused[:2]) == [0, len(SEGMENTS)] and reused[2] == 0
    waited = ["another build is at work here, waiting for it to end" in text for text in printed]
    assert waited == [reused[0] > 0, reused[1] > 0, False]
    assert_whole(tmp_path / "engines", builds=2)
