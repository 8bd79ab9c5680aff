"""The names that `import stg_trt` offers, in any order of imports, and the README's calls."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import stg_trt
from tests.support.cli import ROOT


@pytest.mark.slow(reason="imports torch in processes of their own")
@pytest.mark.parametrize("before", ["", "import stg_trt.build_engines.build, stg_trt.runtime.pipeline"])
def test_the_names_of_the_package_are_the_same_in_any_order(before: str) -> None:
    """The module that `build` lies in is called build too."""
    program = f"{before}\nfrom stg_trt import VideoPipeline, build\nprint(type(build), type(VideoPipeline))"
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split("\n")[0] == "<class 'function'> <class 'type'>"


def test_every_name_is_there() -> None:
    assert all(getattr(stg_trt, name) is not None for name in stg_trt.__all__)
    with pytest.raises(AttributeError, match="module 'stg_trt' has no attribute 'biuld'"):
        _ = getattr(stg_trt, "biuld")  # noqa: B009


def calls(block: str) -> list[tuple[str, ast.Call]]:
    """Every call of a program, by the name of what it calls."""
    return [
        (ast.unparse(node.func), node) for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)
    ]


def test_the_readme_calls_what_there_is() -> None:
    """Each of its programs, whose `pipe` is a VideoPipeline."""
    known: dict[str, Callable[..., Any]] = {
        "build": stg_trt.build,
        "pipe": stg_trt.VideoPipeline.__call__,
        "VideoPipeline.from_pretrained": stg_trt.VideoPipeline.from_pretrained,
        "GuidanceOptions": stg_trt.GuidanceOptions,
    }
    readme = (ROOT / "README.md").read_text("utf-8")
    seen = set()
    for block in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL):
        for name, call in calls(block):
            if name not in known:
                continue
            seen.add(name)
            given = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
            parameters = inspect.signature(known[name]).parameters
            assert given <= parameters.keys(), (name, given - parameters.keys())
    assert seen >= {"build", "pipe", "VideoPipeline.from_pretrained"}
