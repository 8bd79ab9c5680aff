"""The real command line in a subprocess."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(sys.executable).with_name("stg-trt")
# What a build reports where stderr is no terminal: its name and segments, then a line per segment.
PROGRESS = re.compile(
    r"(segmented|twin)-\S+: (\w+(, \w+)*|another build is at work .*)|\w+: (done, .* s|already built)"
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = ("--height=32", "--width=32", "--num-frames=9", "--text-length=4", "--stg-blocks=")


def run(*args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`stg-trt` with arguments, to its end."""
    settings = {"capture_output": True, "text": True, "timeout": 180, "cwd": ROOT, **options}
    return subprocess.run([PROGRAM, *map(str, args)], **settings)


def start(*args: str | Path, **options: Any) -> subprocess.Popen[str]:
    """`stg-trt` with arguments, running."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, **options}
    return subprocess.Popen([PROGRAM, *map(str, args)], **settings)


def finish(process: subprocess.Popen[str], timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Waits for a started command."""
    stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def cpu_seconds_of_ended_children() -> float:
    """Of this process, so far; other programs on the machine do not stretch it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def assert_one_line_error(result: subprocess.CompletedProcess[str], pattern: str) -> None:
    """Exit code 1, and beside progress one line: `stg-trt: ` and what `pattern` finds."""
    assert result.returncode == 1, result.stderr
    assert not result.stdout, result.stdout
    lines = result.stderr.splitlines()
    errors = [line for line in lines if not PROGRESS.fullmatch(line)]
    assert len(errors) == 1 and errors == lines[-1:], result.stderr
    assert errors[0].startswith("stg-trt: ") and re.search(pattern, errors[0]), errors[0]


def keep_one_block(checkpoint: Path) -> None:
    """Drops every block but the first, so that a build takes a few seconds."""
    config = checkpoint / "transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 1}))
    weights = checkpoint / "transformer" / WEIGHTS
    tensors = load_file(weights)
    kept = {name: t for name, t in tensors.items() if not re.match(r"transformer_blocks\.[1-9]", name)}
    save_file(kept, weights)


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, locks aside."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
