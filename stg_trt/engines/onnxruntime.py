"""ONNX Runtime on the CPU: the embedded default, for any machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from stg_trt.errors import EngineRejected
from stg_trt.system.interruptible import run_interruptibly

Result = TypeVar("Result")

_ELEMENT_TYPES = {"torch.float32": np.float32, "torch.bool": np.bool_, "torch.int64": np.int64}


class OnnxRuntimeEngine:
    """A session; its contexts are I/O bindings."""

    alignment = 1

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session

    def context(self) -> OnnxRuntimeContext:
        """A new binding."""
        return OnnxRuntimeContext(self.session)


class OnnxRuntimeContext:
    """Binds torch CPU tensors by address, so that nothing is copied."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._inputs = {node.name for node in session.get_inputs()}
        self._bound: dict[str, Tensor] = {}

    def bind(self, name: str, tensor: Tensor) -> None:
        """Gives an input or output its memory and its shape."""
        assert tensor.is_contiguous() and tensor.device.type == "cpu"
        bind = self._binding.bind_input if name in self._inputs else self._binding.bind_output
        dtype = _ELEMENT_TYPES[str(tensor.dtype)]
        bind(name, "cpu", 0, dtype, tuple(tensor.shape), tensor.data_ptr())
        self._bound[name] = tensor

    def enqueue(self, stream: int) -> None:
        """Runs now; a CPU has no stream."""
        run_session(lambda options: self._session.run_with_iobinding(self._binding, options))


def load_all(
    backend: str, files: Mapping[str, Sequence[Path]], device: torch.device
) -> dict[str, OnnxRuntimeEngine]:
    """One session per engine, with a thread per physical core each; they never run at the same time."""
    return {name: _load(backend, paths[0]) for name, paths in files.items()}


def _load(backend: str, path: Path) -> OnnxRuntimeEngine:
    try:
        session = ort.InferenceSession(path, session_options(), providers=["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime raises a dozen pybind exception classes with no common base.
        raise EngineRejected(f"{path}: {backend} cannot load it: {str(error).splitlines()[0]}") from error
    return OnnxRuntimeEngine(session)


def session_options() -> ort.SessionOptions:
    """Options of every session: no words of its own, and threads that sleep while they have no work."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Each session has threads of its own, and those that wait for work would take the cores of the next one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def run_session(call: Callable[[ort.RunOptions], Result]) -> Result:
    """The result of `call`, which runs a session with the options that it is given.

    An interrupt ends the run after the operator that it is at.
    """
    options = ort.RunOptions()

    def terminate() -> None:
        options.terminate = True

    return run_interruptibly(lambda: call(options), terminate)
