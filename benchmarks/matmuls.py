"""Matrix products of several libraries on random matrices, from which a ceiling is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stg_trt.runtime.device import Device

Shape = tuple[int, int, int]
"""(m, k, n) of a product: (m, k) times (k, n)."""

Multiply = Callable[[], object]
Prepare = Callable[[Shape, torch.dtype, Device], Multiply | None]
"""Makes the matrices and returns their product as a call; None if the library lacks the dtype here."""


def _torch(shape: Shape, dtype: torch.dtype, device: Device) -> Multiply:
    """torch.mm: MKL, OpenBLAS or oneDNN, as torch was built; cuBLAS on a GPU."""
    left, right, out = _matrices(shape, dtype, device)
    return lambda: torch.mm(left, right, out=out)


def _onednn(shape: Shape, dtype: torch.dtype, device: Device) -> Multiply | None:
    """oneDNN with weights in its own layout, as compiled models use it on a CPU."""
    from torch.utils.mkldnn import to_mkldnn

    known = torch.backends.mkldnn.is_available()
    if not known or (dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    _, k, n = shape
    left, right, _ = _matrices(shape, dtype, device)
    linear = torch.nn.Linear(k, n, bias=False).requires_grad_(False)
    linear.weight.copy_(right.t())
    layer, rows = to_mkldnn(linear, dtype), left.to_mkldnn()
    return lambda: layer(rows)


def _onnxruntime(shape: Shape, dtype: torch.dtype, device: Device) -> Multiply | None:
    """ONNX Runtime's own, with as many threads as torch; on a CPU it has float32 alone."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    if dtype != torch.float32:
        return None
    m, k, n = shape
    left, right, _ = _matrices(shape, dtype, device)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["left", "right"], ["out"])],
        "matmul",
        [helper.make_tensor_value_info("left", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [m, n])],
        [numpy_helper.from_array(right.numpy(), "right")],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"left": left.numpy()}
    return lambda: session.run(None, feed)[0]


def _cublas(name: str) -> Prepare:
    """torch.mm on a GPU through cublas or cublaslt, whose choices of kernels differ."""

    def prepare(shape: Shape, dtype: torch.dtype, device: Device) -> Multiply:
        multiply = _torch(shape, dtype, device)

        def run() -> None:
            with _blas_library(name):
                multiply()

        return run

    return prepare


@contextmanager
def _blas_library(name: str) -> Iterator[None]:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def _matrices(shape: Shape, dtype: torch.dtype, device: Device) -> tuple[Tensor, Tensor, Tensor]:
    """Both factors, and memory for the product; random, since zeros multiply faster."""
    m, k, n = shape
    left, right = (_random(size, device).to(dtype) for size in ((m, k), (k, n)))
    return left, right, left.new_empty(m, n)


def _random(size: tuple[int, int], device: Device) -> Tensor:
    return torch.randn(size, device=device.torch_device)


LIBRARIES: dict[str, dict[str, Prepare]] = {
    "cpu": {"torch": _torch, "oneDNN": _onednn, "ONNX Runtime": _onnxruntime},
    "cuda": {"cuBLAS": _cublas("cublas"), "cuBLASLt": _cublas("cublaslt")},
}
