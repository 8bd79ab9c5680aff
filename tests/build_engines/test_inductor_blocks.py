"""A perturbable block of every family, compiled by inductor for the CPU; the rest is traced elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stg_trt.build_engines.compiler import Job
from stg_trt.build_engines.reusable_files import ReusableFiles
from stg_trt.engines.manifest import Manifest
from stg_trt.models.families.base import KEEP_ATTENTION
from stg_trt.models.segment import Segment
from tests.build_engines.test_compile_inductor import compiler_of
from tests.support.family_cases import COGVIDEOX, HUNYUAN_VIDEO, MOCHI, WAN, FamilyCase

pytestmark = pytest.mark.slow(reason="compiles packages with AOTInductor")

MAX_ROWS = 6
# LTX-Video is compiled whole elsewhere. HunyuanVideo has blocks of two kinds.
BLOCKS = [(WAN, 2), (MOCHI, 2), (HUNYUAN_VIDEO, 0), (HUNYUAN_VIDEO, 4), (COGVIDEOX["2b"], 2)]


@pytest.mark.parametrize(("case", "block"), BLOCKS, ids=str)
def test_a_compiled_block_equals_the_module(case: FamilyCase, block: int, tmp_path: Path) -> None:
    """For numbers of rows that it was not traced with; some rows skip their attention."""
    compiler = compiler_of(case.goldens, tmp_path, "fp32", sizes=case.sizes)
    family, segment = case.family, Segment("block", block, block + 1, keep_input=True)
    specs = tuple(family.inputs(segment, case.workload)), tuple(family.outputs(segment, case.workload))
    job = Job(segment, *specs, (1, 3, MAX_ROWS), tmp_path, lambda phase: None)
    module = family.module(case.checkpoint.load_transformer(segment.blocks), segment, expand_masks=False)
    exported = compiler.export(job, iter([(segment, module)]))
    nothing = ReusableFiles(tmp_path, Manifest.model_construct(segments=()))
    result = compiler.compile(job, exported, "cpu", nothing)
    assert result.fused_attentions == family.attentions(segment) and result.runner is not None
    run = result.runner()
    for rows in (1, 2, 3, MAX_ROWS):
        inputs = dict(zip(module.inputs, family.trace_inputs(segment, case.workload, rows), strict=True))
        inputs[KEEP_ATTENTION] = torch.arange(rows) % 2 == 0
        with torch.no_grad():
            expected = module(*inputs.values())
        for got, wanted in zip(run(inputs), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
