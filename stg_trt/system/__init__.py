"""The machine: GPU, files, interrupts, versions."""
