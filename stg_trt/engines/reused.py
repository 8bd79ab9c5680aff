"""What a build takes from an earlier one with other weights, and how it is called in messages."""

from __future__ import annotations

from typing import Literal

Reused = Literal["graph", "engine"]

REUSED: dict[Reused, str] = {"graph": "graph of an earlier build", "engine": "engine refitted"}
