"""`python -m benchmarks` from a checkout is `stg-trt bench`."""

from stg_trt.cli.main import run_group

from .command import bench

run_group(bench)
