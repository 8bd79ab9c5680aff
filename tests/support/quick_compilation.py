"""What torch's compilers do again and again, done once; graphs and packages stay the same."""

from __future__ import annotations

import functools
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult
from onnxscript.rewriter._matcher import SimplePatternMatcher
from torch._export import utils as export_utils
from torch._inductor import config as inductor
from torch._inductor.config import aot_inductor
from torch.onnx._internal.exporter._registration import ONNXRegistry

# g++ takes longest over the code that calls a package's kernels. Tests need its results alone, so it is not
# optimized and has no line numbers for profilers; the kernels are compiled as for users.
QUICK_CALLS = {"compile_wrapper_opt_level": "O0", "enable_line_tables": False}


def compile_quickly() -> None:
    """In this process, from now on."""
    # The exporter collects thousands of operators anew for each graph, always the same ones.
    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]
    # Not every supported torch has it; it looks for operators that are new since, and tests make none.
    if hasattr(export_utils, "_materialize_cpp_cia_ops"):
        export_utils._materialize_cpp_cia_ops = functools.cache(export_utils._materialize_cpp_cia_ops)
    SimplePatternMatcher.match = _match_unless_another_operator(SimplePatternMatcher.match)  # type: ignore[method-assign]
    for name, value in QUICK_CALLS.items():
        # Not every supported torch has both.
        if hasattr(aot_inductor, name):
            setattr(aot_inductor, name, value)
    # Else torch compiles a trial for each instruction set that the processor says it has.
    inductor.cpp.vec_isa_ok = True


def _match_unless_another_operator(match: Any) -> Any:
    """A pattern of two slices is looked for at every node, each time in a list of the whole graph's nodes."""

    @functools.wraps(match)
    def matched(self: Any, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> MatchResult:
        outputs = self.pattern.output_nodes
        if len(outputs) > 1 and outputs[0].op_identifier() not in (None, node.op_identifier()):
            return MatchResult().fail("No match found.")
        found: MatchResult = match(self, model, graph, node, **options)
        return found

    return matched
