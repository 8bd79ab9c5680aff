"""`stg-trt verify`: whether finished engines still match the graphs or models that they were made from."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stg_trt.engines.manifest import Manifest

    from .engine_comparison import Comparison, Request

_PROGRAM = "stg_trt.build_engines.engine_comparison"


def verify(
    engines: Annotated[Path, typer.Argument(help="A folder made by stg-trt build --keep-onnx.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="What ONNX Runtime's engines were built from and are compared with.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="The checkpoint's weights were random.")
    ] = False,
    variant: Annotated[str | None, typer.Option(help="Of the checkpoint's weight files, as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the checkpoint on the hub.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="FILE:SCALE, as at the build.")] = None,
) -> None:
    """Compare every engine with its ONNX graph or the eager model, through Polygraphy."""
    from .engine_comparison import Request

    found: list[Comparison] = []
    for backend, folders in _comparable(engines).items():
        found += _compare(
            backend, Request(tuple(folders), checkpoint, random_weights, variant, revision, tuple(lora or ()))
        )
    _print(found)
    _check(found)


def _comparable(engines: Path) -> dict[str, list[Path]]:
    """Builds that can be compared here, by backend; says why others cannot.

    Raises EngineRejected, with the reasons, if none can be.
    """
    from stg_trt.engines.store import EngineStore
    from stg_trt.errors import EngineRejected

    store = EngineStore.open(engines)
    store.check_has_builds()
    found: dict[str, list[Path]] = {}
    left_out = dict(store.unreadable)
    for build in store.builds:
        reason = _why_not(build.manifest)
        if reason is None:
            found.setdefault(build.manifest.backend, []).append(build.folder.resolve())
        else:
            left_out[build.folder.name] = reason
    reasons = [f"{name}: {reason}" for name, reason in left_out.items()]
    if not found:
        raise EngineRejected(
            f"verify: expected engines in {engines} that can be compared here, got {'; '.join(reasons)}"
        )
    for reason in reasons:
        print(f"not compared: {reason}")
    return found


def _why_not(manifest: Manifest) -> str | None:
    from stg_trt.engines.store import EngineRequest
    from stg_trt.system.gpu import this_machine

    if manifest.backend == "inductor":
        return "Polygraphy has no runner for inductor's engines; their build compares them when they are done"
    return EngineRequest(machine=this_machine()).rejects(manifest)


def _compare(backend: str, request: Request) -> tuple[Comparison, ...]:
    """In a process of its own: Polygraphy's choice of TensorRT or TensorRT-RTX is one per process."""
    from stg_trt.errors import EngineRejected

    from .engine_comparison import ANSWER, REQUEST

    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        question.write_bytes(REQUEST.dump_json(request))
        child = subprocess.run(
            [sys.executable, "-m", _PROGRAM, question, answer],
            env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": str(int(backend == "tensorrt-rtx"))},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if child.returncode:
            lines = child.stderr.splitlines() or [f"{backend}: ended with status {child.returncode}"]
            raise EngineRejected(lines[-1].removeprefix("stg-trt: "))
        return ANSWER.validate_json(answer.read_bytes())


def _print(comparisons: list[Comparison]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    for build, group in groupby(comparisons, lambda one: one.build):
        console.print(build, soft_wrap=True)
        table = Table()
        for column in ("segment", "against", "", "rows", "relative L2", "limit", "cosine"):
            table.add_column(column, justify="left" if column in ("segment", "against", "") else "right")
        for one in group:
            table.add_row(
                one.segment,
                one.against,
                "equal" if one.limit.allows(one.found) else "DIFFERS",
                str(one.rows),
                f"{one.found.relative_l2:.1e}",
                f"{one.limit.relative_l2:.0e}",
                f"{one.found.cosine:.6f}",
            )
        console.print(table)


def _check(comparisons: list[Comparison]) -> None:
    """Raises GateMissed for the farthest of the engines beyond their limits."""
    from stg_trt.errors import GateMissed

    beyond = [one for one in comparisons if not one.limit.allows(one.found)]
    if beyond:
        one = max(beyond, key=lambda one: one.found.relative_l2)
        raise GateMissed(
            f"verify: expected relative L2 <= {one.limit.relative_l2:.0e} against the {one.against}, got "
            f"{one.found.relative_l2:.1e} for {one.segment} of {one.build}, {len(beyond)} of "
            f"{len(comparisons)} engines differ: build them again"
        )
