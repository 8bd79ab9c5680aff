"""Passes of steps, as tests write them down."""

from __future__ import annotations

from stg_trt.models.passes import COND, SKIP, UNCOND, Pass
from stg_trt.models.perturbation import Perturbation

UNCOND_COND = (UNCOND, COND)


def skip_pass(mode: str = "stg-a", blocks: tuple[int, ...] = (0,), name: str = SKIP) -> Pass:
    """A skip pass."""
    return Pass(name, Perturbation(mode, blocks))


def named(names: tuple[str, ...], mode: str = "stg-a", blocks: tuple[int, ...] = (0,)) -> tuple[Pass, ...]:
    """Passes by their names; what is neither uncond nor cond is a skip pass."""
    plain = {one.name: one for one in UNCOND_COND}
    return tuple(plain.get(name) or skip_pass(mode, blocks, name) for name in names)
