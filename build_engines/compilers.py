"""The table of compilers: backend -> (module here, class in it), imported when first asked for."""

from __future__ import annotations

import importlib

from .compiler import Compiler
from .options import BuildOptions

_COMPILERS = {
    "onnxruntime": ("compile_onnxruntime", "OnnxRuntimeCompiler"),
    "tensorrt-rtx": ("compile_tensorrt", "TensorRTCompiler"),
    "tensorrt": ("compile_tensorrt", "TensorRTCompiler"),
    "inductor": ("compile_inductor", "InductorCompiler"),
}


def compiler_for(options: BuildOptions) -> Compiler:
    """The compiler of a build's backend."""
    module, name = _COMPILERS[options.backend.name]
    compiler: type[Compiler] = getattr(importlib.import_module(f".{module}", __package__), name)
    return compiler(options)
