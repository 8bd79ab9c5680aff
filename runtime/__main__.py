"""`python -m runtime` from a checkout is `stg-trt generate`."""

from stg_trt.cli.main import run_command

from .command import generate

run_command(generate)
