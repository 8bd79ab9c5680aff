"""Units of displayed sizes."""

MIB, GIB = 1 << 20, 1 << 30
"""Bytes."""
