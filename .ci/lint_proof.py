#!/usr/bin/env python3
"""Plants a wrong keyword and a wrong type at every border of the package, and expects mypy to report each.

Run by `make lint-proof`, in the tree that `make in-place` links and with the cache that `make lint` left.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKED, CACHE = ROOT / "build/in_place", ROOT / "build/mypy_cache"
Place = tuple[str, int]
# Where to plant, what to import there, a call with a misspelt keyword, and one with a wrong type.
MISTAKES = {
    "stg_trt/build_engines/build.py": (
        "from stg_trt.models.workload import Workload",
        'Workload(1, 2, 3, 4, precison="fp32")',
        'Workload(1, 2, 3, "4")',
    ),
    "stg_trt/runtime/pipeline.py": (
        "from stg_trt.engines.store import EngineRequest",
        "EngineRequest(hieght=1)",
        'EngineRequest(height="1")',
    ),
    "stg_trt/benchmarks/step.py": (
        "from stg_trt.guidance.options import GuidanceOptions",
        "GuidanceOptions(stg_scal=1.0)",
        'GuidanceOptions(stg_scale="1")',
    ),
    "stg_trt/benchmarks/sample.py": (
        "from stg_trt.runtime.device import open_device",
        'open_device(nmae="cpu")',
        "open_device(1)",
    ),
    "stg_trt/benchmarks/build.py": (
        "from stg_trt.build_engines.build import build",
        'build("a", "b", hieght=1, width=1, num_frames=1)',
        'build("a", "b", height="1", width=1, num_frames=1)',
    ),
    "stg_trt/cli/main.py": (
        "from pathlib import Path\n    from stg_trt.runtime.command import generate",
        'generate("a", Path("b"), Path("c"), promt=["x"])',
        'generate("a", Path("b"), "c")',
    ),
    "stg_trt/cli/doctor.py": (
        "from pathlib import Path\n    from stg_trt.build_engines.command import build",
        'build("a", Path("b"), 1, 1, 1, layuot="twin")',
        'build("a", "b", 1, 1, 1)',
    ),
    "stg_trt/cli/inspect.py": (
        "from stg_trt.engines.store import EngineStore",
        'EngineStore.open(rooot="a")',
        "EngineStore.open(1)",
    ),
    "tests/runtime/test_sampler.py": (
        "from stg_trt.runtime.noise import draw",
        "draw(shap=(1,), generator=None)",
        'draw("x", None)',
    ),
    "tests/build_engines/test_verify.py": (
        "from stg_trt.build_engines.compiler import Tolerance",
        "Tolerance(relativ_l2=1.0, cosine=1.0)",
        'Tolerance("1", 1.0)',
    ),
    "tests/benchmarks/test_clock.py": (
        "from stg_trt.benchmarks.clock import Work",
        "Work(rnu=print)",
        "Work(1)",
    ),
    "tests/test_goldens.py": (
        "from stg_trt import VideoPipeline",
        'VideoPipeline.from_pretrained("a", "b", layuot="twin")',
        'VideoPipeline.from_pretrained("a", "b", layout=1)',
    ),
    "examples/moving_shapes/demo.py": (
        "from stg_trt import build",
        'build("a", "b", hieght=1, width=1, num_frames=1)',
        'build("a", "b", height="1", width=1, num_frames=1)',
    ),
    "examples/moving_shapes/evaluate.py": (
        "from examples.moving_shapes.clips import Label",
        'Label("plain", "red", "circle", direktion="left")',
        'Label("plain", "red", "circle", 1)',
    ),
}
EXPECTED = (r"Unexpected keyword argument", r"Argument .* has incompatible type")


def plant(tree: Path) -> dict[Place, str]:
    """Copies what mypy reads to `tree`, appends the mistakes, and returns what to expect of each line."""
    shutil.copytree(LINKED, tree, ignore=lambda folder, names: [n for n in names if is_data(folder, n)])
    wanted: dict[Place, str] = {}
    for path, (imports, *calls) in MISTAKES.items():
        source = (tree / path).read_text("utf-8")
        source += f"\n\ndef planted() -> None:\n    {imports}\n"
        for call, message in zip(calls, EXPECTED, strict=True):
            wanted[path, source.count("\n") + 1] = message
            source += f"    {call}\n"
        (tree / path).write_text(source, "utf-8")
    return wanted


def is_data(folder: str, name: str) -> bool:
    """True for a file that mypy does not read."""
    return not (Path(folder) / name).is_dir() and not name.endswith((".py", "py.typed"))


def run_mypy(tree: Path, cache: Path) -> dict[Place, str]:
    """Every error of the tree; several at one line are joined."""
    command = (sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", cache)
    answer = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if answer.returncode != 1:
        sys.exit(f"lint-proof: expected errors from mypy, got {answer.stderr or answer.stdout}")
    reported: dict[Place, str] = {}
    for path, line, message in re.findall(r"^(\S+?):(\d+): error: (.*)$", answer.stdout, flags=re.MULTILINE):
        place = path, int(line)
        reported[place] = f"{reported.get(place, '')}{message}; "
    return reported


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tree, cache = Path(folder) / "tree", Path(folder) / "cache"
        if CACHE.is_dir():
            shutil.copytree(CACHE, cache)
        wanted = plant(tree)
        reported = run_mypy(tree, cache)
    wrong = [
        f"{path}:{line}: expected {message!r}, got {reported.get((path, line), 'no error')}"
        for (path, line), message in wanted.items()
        if not re.search(message, reported.get((path, line), ""))
    ]
    wrong += [
        f"{path}:{line}: expected no error, got {reported[path, line]}"
        for path, line in reported.keys() - wanted
    ]
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"lint-proof: mypy reports all {len(wanted)} mistakes at {len(MISTAKES)} borders")


if __name__ == "__main__":
    main()
