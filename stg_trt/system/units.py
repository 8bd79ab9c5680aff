"""Units of displayed sizes."""

GIB = 1 << 30
"""Bytes."""
