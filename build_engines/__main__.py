"""`python -m build_engines` from a checkout is `stg-trt build`."""

from stg_trt.cli.main import run_command

from .command import build

run_command(build)
