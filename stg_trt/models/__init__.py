"""Checkpoints, model families, and how a model is cut into segments."""
