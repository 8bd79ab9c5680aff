"""Checkpoint to verified engines: cut, export, verify, compile. `stg_trt.build` does it from Python."""
