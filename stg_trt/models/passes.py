"""The passes of a guided step: the model's predictions without the prompt, with it, and perturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from stg_trt.errors import InvalidRequest
from stg_trt.models.perturbation import Perturbation

T = TypeVar("T")
SkipBlocksByName = Mapping[str, tuple[int, ...]]
"""The blocks of every skip pass that a build can run."""


@dataclass(frozen=True)
class Pass:
    """One row per video. A skip pass has a perturbation; uncond, cond and isolation have none."""

    name: str
    perturbation: Perturbation | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def is_skip(self) -> bool:
        """Whether the pass is perturbed, and computes what cond computes up to its first perturbed block."""
        return self.perturbation is not None

    def of_stream(self, stream: str) -> Pass:
        """The same skip pass, which perturbs one stream alone."""
        assert self.perturbation is not None
        return replace(self, perturbation=self.perturbation.of_stream(stream))

    def perturbs(self, block: int) -> bool:
        """Whether the pass perturbs a block."""
        return self.perturbation is not None and block in self.perturbation.blocks


UNCOND, COND = Pass("uncond"), Pass("cond")
ISOLATION = Pass("isolation")
"""The prompt's prediction by streams that do not see each other; no block of it is shared."""
SKIP = "skip"
"""The name of a skip pass that was given none."""


def in_order(passes: Iterable[Pass]) -> tuple[Pass, ...]:
    """Uncond, isolation, cond, then the skip passes as they leave the shared prefix, the earliest first.

    In this order the passes that a segment computes are neighbours, so their rows are one slice.
    """

    def place(one: Pass) -> tuple[int, int]:
        if one.perturbation is None:
            return (0, (UNCOND, ISOLATION, COND).index(one))
        return (1, min(one.perturbation.blocks))

    return tuple(sorted(passes, key=place))


def row_groups(passes: Sequence[Pass]) -> range:
    """Where a step's passes have their rows in every buffer, a group each.

    The first group is uncond's, whether it is computed or not; the others all have the prompt.
    """
    first = 0 if UNCOND in passes else 1
    return range(first, first + len(passes))


def most_groups(skips: int, isolates: bool = False) -> int:
    """Row groups of steps with up to so many skip passes; engines and memory have room for one at least."""
    return 2 + isolates + max(1, skips)


def check_pass_names(names: Iterable[str]) -> None:
    """Raises InvalidRequest for a skip pass without a name of its own."""
    for name in names:
        if not name.isidentifier() or name in (UNCOND.name, ISOLATION.name, COND.name):
            raise InvalidRequest(
                f"stg_blocks: expected names of skip passes such as spatial and temporal, got {name!r}: "
                "use letters, other than uncond, isolation and cond"
            )


def read_skips(stg_blocks: Sequence[int] | Mapping[str, Sequence[int]]) -> SkipBlocksByName:
    """The skip passes of a build's `stg_blocks`: a mapping from their names, or the blocks of the only one.

    Raises InvalidRequest for names that mean another pass, and for a pass without blocks.
    """
    if not isinstance(stg_blocks, Mapping):
        return {SKIP: tuple(sorted(stg_blocks))} if len(stg_blocks) else {}
    check_pass_names(stg_blocks)
    for name, blocks in stg_blocks.items():
        if not blocks:
            raise InvalidRequest(f"stg_blocks: expected blocks for the pass {name}, got none: name one")
    return {name: tuple(sorted(blocks)) for name, blocks in stg_blocks.items()}


def all_blocks(skips: SkipBlocksByName) -> tuple[int, ...]:
    """All blocks that a skip pass may perturb."""
    return tuple(sorted({block for blocks in skips.values() for block in blocks}))


def parse_by_pass(
    option: str, texts: Sequence[str] | None, parse: Callable[[str], T]
) -> T | dict[str, T] | None:
    """One value, or those of several passes as NAME=VALUE; raises InvalidRequest for a mixture of both."""
    if not texts:
        return None
    named = [text.partition("=") for text in texts]
    if len(named) == 1 and not named[0][1]:
        return parse(texts[0])
    values = {name.strip(): parse(value) for name, equals, value in named if equals}
    if len(values) != len(named):
        raise InvalidRequest(
            f"{option}: expected one value, or NAME=VALUE for each skip pass, got {', '.join(texts)}: write "
            "spatial=14, then the option again with temporal=15"
        )
    return values
