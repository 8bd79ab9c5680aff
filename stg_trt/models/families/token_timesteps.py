"""Timesteps of single tokens, for models that tell the network which of its latents are clean.

A table of a few timesteps per row and an index of every token's place in it, instead of a timestep per token:
the same numbers, and a modulation per place instead of one per token. In the table, every place has the
step's timestep up to a limit of its own: 0 for latents that are given, none for the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.tensor_spec import TensorSpec

TIMESTEP_LIMITS = "timestep_limits"
TIMESTEP_INDEX = "timestep_index"
TRAIN_TIMESTEPS = 1000.0
"""Of every model that has such tables; the timestep of pure noise."""


def token_timestep_specs(tokens: int, places: int) -> tuple[TensorSpec, ...]:
    """The limit of every place in the table, and every token's place; both are shared by all rows."""
    return (
        TensorSpec(TIMESTEP_LIMITS, "float32", (places,)),
        TensorSpec(TIMESTEP_INDEX, "int64", (tokens,)),
    )


def token_timesteps(state: dict[str, Tensor]) -> Tensor:
    """The table of a step, (rows, places)."""
    return torch.minimum(state["timestep"][:, None], state[TIMESTEP_LIMITS])


def of_tokens(tables: Sequence[Tensor], state: dict[str, Tensor]) -> list[Tensor]:
    """Tables of (rows, places, channels) as (rows, tokens, channels)."""
    return [table.index_select(1, state[TIMESTEP_INDEX]) for table in tables]


def timestep_tables(strengths: Tensor, places: int) -> dict[str, Tensor]:
    """Both tensors, of the strength 0 to 1 with which each token (tokens,) is given; at 0 there is no limit.

    Raises InvalidRequest for more different strengths than places.
    """
    # The place of strength 0 is the first, and is there in any case.
    found, index = torch.unique(torch.cat([strengths.new_zeros(1), strengths]), return_inverse=True)
    if len(found) > places:
        raise InvalidRequest(
            f"strength: expected at most {places - 1} different ones in a call, got {len(found) - 1}: give "
            "some conditions the same strength"
        )
    limits = torch.full((places,), torch.inf)
    limits[1 : len(found)] = (1 - found[1:]) * TRAIN_TIMESTEPS
    return {TIMESTEP_LIMITS: limits, TIMESTEP_INDEX: index[1:]}
