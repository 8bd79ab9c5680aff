"""Runs pytest once per line of its input, in a fork: what takes seconds to import is imported once.

A line holds the tests' ids. The answer is the exit status; the file `printed` has what pytest printed.
"""

from __future__ import annotations

import importlib
import os
import sys

# What tests import that is not of this repository.
_IMPORTED = (
    "av",
    "diffusers.pipelines.cogvideo",
    "diffusers.pipelines.cogvideo.pipeline_cogvideox",
    "diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video",
    "diffusers.pipelines.ltx.pipeline_ltx_condition",
    "diffusers.pipelines.mochi.pipeline_mochi",
    "diffusers.pipelines.wan.pipeline_wan",
    "onnxruntime",
    "onnxscript",
    "pydantic",
    "torch.onnx",
    "typer",
)


def run_pytest(tests: list[str]) -> int:
    """In this process; what it prints goes to the file. Engines are kept for the next run."""
    printed = os.open("printed", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    import pytest

    return int(pytest.main(["-x", "-q", *tests]))


if __name__ == "__main__":
    # The folder of this file, in which no test is to find its neighbours.
    sys.path[0] = os.getcwd()
    for module in _IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run_pytest(line.rstrip("\n").split("\0")))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
