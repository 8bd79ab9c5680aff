"""The mathematics of a guided step: options, per-step tables, their combination, solvers."""
