"""Who called: warnings point at the user's line."""

from __future__ import annotations

import sys

_INSIDE = ("stg_trt", "torch", "contextlib")


def level_outside() -> int:
    """The `stacklevel` of warnings.warn, of the caller's, for the first line outside of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    return level
