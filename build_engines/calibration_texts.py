"""The prompts of a calibration, encoded by the checkpoint's own text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.parts import load_connector_part, load_text_parts
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload

_FLOAT32 = {"default": torch.float32}


@dataclass(frozen=True)
class Texts:
    """The condition of every prompt, a row each, and that of the rows without a prompt."""

    conds: tuple[TextCondition, ...]
    uncond: TextCondition


def shipped_prompts() -> tuple[str, ...]:
    """Eight of different subjects, light and motion."""
    text = files(__package__).joinpath("calibration_prompts.txt").read_text("utf-8")
    return _lines(text)


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt per line; raises InvalidRequest for a file without any."""
    try:
        prompts = _lines(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"calibration_prompts: expected a text file with a prompt per line, got {path} ({error}): "
            "correct the path"
        ) from error
    if not prompts:
        raise InvalidRequest(
            f"calibration_prompts: expected a prompt per line, got none in {path}: write some"
        )
    return prompts


def can_encode(checkpoint: Checkpoint) -> bool:
    """Whether prompts can be read: a text encoder is there, and needs no picture."""
    return checkpoint.has_text_encoder and not checkpoint.family.text_image_parts


def encode(checkpoint: Checkpoint, workload: Workload, prompts: tuple[str, ...]) -> Texts:
    """The prompts and, beside them, an empty one."""
    family = checkpoint.family
    pipeline = load_text_parts(checkpoint, _FLOAT32, workload)
    with torch.no_grad():
        every = [family.encode_prompt(pipeline, [prompt], workload) for prompt in (*prompts, "")]
        if family.connector is not None:
            part = load_connector_part(checkpoint, _FLOAT32)
            every = [family.connector.connect(part, text) for text in every]
    *conds, uncond = every
    if family.null_text is not None:
        null = checkpoint.weight(family.null_text)[: workload.text_length]
        uncond = TextCondition(null.expand_as(uncond.embeds), conds[0].mask)
    return Texts(tuple(conds), uncond)


def random_texts(checkpoint: Checkpoint, workload: Workload) -> Texts:
    """One random prompt, for a checkpoint whose prompts cannot be read here."""
    family = checkpoint.family
    if not family.reads_text:
        return Texts((TextCondition.none(1),), TextCondition.none(1))
    cond, uncond = (family.random_text(workload, 1, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    return Texts((cond,), uncond)


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())
