"""The skip pass's change to the model: a mode and a set of blocks, as a value; no live model is patched."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, overload

from stg_trt.errors import InvalidRequest

Mode = Literal["stg-a", "stg-r"]
MODES: tuple[Mode, ...] = ("stg-a", "stg-r")


@dataclass(frozen=True)
class Perturbation:
    """stg-r skips the blocks; stg-a skips their self-attention (arXiv 2411.18664, section 3.2).

    Of a model that denoises several streams, `stream` is the only one whose attention is skipped; empty for
    that of all.
    """

    mode: str
    blocks: tuple[int, ...]
    stream: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        check_mode(self.mode)
        object.__setattr__(self, "blocks", tuple(sorted(set(self.blocks))))

    def of_stream(self, stream: str) -> Perturbation:
        """The same of one stream; stg-r skips whole blocks, with all streams in them."""
        return self if self.mode == "stg-r" else replace(self, stream=stream)


def check_mode(mode: str) -> None:
    """Raises InvalidRequest unless `mode` is stg-a or stg-r."""
    if mode not in MODES:
        raise InvalidRequest(
            f"stg_mode: expected one of {', '.join(MODES)}, got {mode!r}: choose one of them"
        )


def check_blocks(blocks: tuple[int, ...], num_blocks: int) -> None:
    """Raises InvalidRequest unless `blocks` are distinct block numbers of a model with `num_blocks`."""
    wrong = [block for block in blocks if not 0 <= block < num_blocks]
    if wrong:
        raise InvalidRequest(
            f"stg_blocks: expected block numbers from 0 to {num_blocks - 1}, got {wrong}: "
            f"name blocks that the model has, such as --stg-blocks {num_blocks // 2}"
        )
    if len(set(blocks)) != len(blocks):
        raise InvalidRequest(f"stg_blocks: expected distinct block numbers, got {list(blocks)}: drop repeats")


@overload
def parse_blocks(text: str, option: str = ..., example: str = ...) -> tuple[int, ...]: ...


@overload
def parse_blocks(text: str | None, option: str = ..., example: str = ...) -> tuple[int, ...] | None: ...


def parse_blocks(
    text: str | None, option: str = "stg_blocks", example: str = "14,19"
) -> tuple[int, ...] | None:
    """Numbers from "14,19", None from None; raises InvalidRequest, naming the option, for anything else."""
    try:
        return None if text is None else tuple(int(block) for block in text.split(",") if block.strip())
    except ValueError as error:
        raise InvalidRequest(
            f"{option}: expected numbers separated by commas, got {text!r}: write {example}"
        ) from error
