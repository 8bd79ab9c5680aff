"""Engines and a prompt to video."""
