"""Tries a TensorRT-RTX engine built for SM 8.0 on this GPU, once, and records the answer word for word.

The engines are loaded and run in a process of their own, so that a crash is an answer too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from stg_trt.engines.store import Build, EngineStore
from stg_trt.errors import BackendUnavailable, GateMissed
from stg_trt.models.plan import plan_step
from stg_trt.runtime.device import open_device

from . import record
from .loaded_build import LoadedBuild
from .scenario import Scenario
from .verify import Reference, load_model

BACKEND = "tensorrt-rtx"
TARGET = "sm_80"
_MODEL = Path(__file__).parent / "models" / "ltx-video-128x2"
_SCENARIO = Scenario(
    checkpoint=str(_MODEL),
    height=128,
    width=128,
    num_frames=25,
    text_length=16,
    stg_mode="stg-a",
    stg_blocks=(1,),
    backend=BACKEND,
    target=TARGET,
)
_LIMIT_S = 60


def try_foreign_engine(output: Path) -> None:
    """Builds for SM 8.0, then loads, runs and compares in another process; records what each stage said."""
    results = record.Record(output, "foreign-engine", **_SCENARIO.to_json())
    with tempfile.TemporaryDirectory() as root:
        try:
            _SCENARIO.build("segmented", Path(root))
        except BackendUnavailable as error:
            results.add(stages=[], answer=str(error))
        else:
            results.add(**_asked(root))
    results.finish()
    print(results.result["answer"])


def _asked(root: str) -> dict[str, object]:
    """Stages that were reached, exit status, and the output, word for word."""
    command = [sys.executable, "-m", __name__, root]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"stages": [], "answer": f"no answer within {_LIMIT_S} s"}
    stages = child.stdout.split("\n")[:-1]
    said = child.stderr.strip()
    answer = stages[-1] if child.returncode == 0 else said.splitlines()[-1] if said else "no message"
    return {"stages": stages, "exit_status": child.returncode, "stderr": said, "answer": answer}


def _load_and_run(root: str) -> None:
    """Prints every stage before it begins, so that the last line shows where it ended."""
    print("device", flush=True)
    device = open_device("cuda")
    (build,) = EngineStore.open(root).builds
    print("load", flush=True)
    engines = build.load_engines(device)
    print(f"loaded {', '.join(engines)}", flush=True)
    del engines
    _run(build)


def _run(build: Build) -> None:
    device, inputs = _SCENARIO.device(), _SCENARIO.inputs()
    reference = Reference.of_step(_SCENARIO, load_model(_SCENARIO, device), inputs, device)
    loaded = LoadedBuild(_SCENARIO, build, inputs, device)
    print("run", flush=True)
    step = loaded.step(plan_step(loaded.sampler.segments, _SCENARIO.passes))
    preds = loaded.preds(step)
    print("compare", flush=True)
    verdict = reference.check("foreign engine", preds)
    if reference.doubts or verdict.doubts:
        raise GateMissed("; ".join((*reference.doubts, *verdict.doubts)))
    print(f"ran, relative L2 {max(verdict.errors.values()):.1e}", flush=True)


if __name__ == "__main__":
    _load_and_run(sys.argv[1])
