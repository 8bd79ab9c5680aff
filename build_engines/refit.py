"""TensorRT engines whose weights can be replaced: other weights of the same graph need no compilation.

REFIT_IDENTICAL is for the same weights again; with others its engines are undefined. So the checkpoint's
weights are marked one by one (REFIT_INDIVIDUAL), and constants such as shapes stay as they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from stg_trt.engines.tensorrt_runtime import error_log, open_runtime, read_engine
from stg_trt.errors import BackendUnavailable, GateMissed
from stg_trt.system.gpu import Gpu

from .tensorrt_recipe import Recipe

FLAG = "refit_individual"
# Its engines may drop the bias of a product, and do not tell a refitter of it (NVIDIA's release notes).
_DROPS_BIASES = "11.3."


class CannotRefit(Exception):
    """TensorRT does not put the weights of a graph into an engine; it says why."""


def check_refittable(backend: str, version: str, targets: Collection[str], gpu: Gpu | None) -> None:
    """Raises BackendUnavailable where engines that can be refitted cannot be built, or would be wrong."""
    if backend == "tensorrt" and version.startswith(_DROPS_BIASES):
        raise BackendUnavailable(
            f"refittable: expected a TensorRT other than 11.3, whose engines lose biases if they can be "
            f"refitted, got {version}: pip install --upgrade 'stg-trt[tensorrt]', or leave --refittable out"
        )
    for target in targets if backend == "tensorrt-rtx" else ():
        if gpu is None or gpu.sm != target:
            raise BackendUnavailable(
                f"refittable: expected a GPU of {target} to build with {backend} on, got "
                f"{'none' if gpu is None else gpu.sm}: build on that GPU, or leave --refittable out"
            )


def mark_weights(trt: Any, network: Any, config: Any, recipe: Recipe) -> None:
    """Lets the engine take other values for the recipe's weights; GateMissed for one that it cannot."""
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    for name in recipe.refittable:
        if not network.mark_weights_refittable(name):
            raise GateMissed(
                f"{recipe.segment}: expected {name} to be a weight that {recipe.backend} can refit, got none "
                "of that name: leave --refittable out"
            )


def check_marked(trt: Any, recipe: Recipe) -> None:
    """Raises GateMissed unless a finished engine has every weight that was marked."""
    log = error_log(trt)
    runtime = open_runtime(trt, recipe.backend, log)
    engine = read_engine(trt, recipe.backend, runtime, recipe.engine, log)
    lost = _lost(trt.Refitter(engine, log), recipe)
    if lost:
        raise GateMissed(
            f"{recipe.segment}: expected {len(recipe.refittable)} weights that can be refitted, got an "
            f"engine without {lost[0]}: leave --refittable out"
        )


def refit_engine(trt: Any, recipe: Recipe, source: Path) -> int:
    """Writes the recipe's engine: that of `source`, with the weights of the recipe's graph.

    Returns the bytes of its activations. Raises CannotRefit if any weight is not replaced, and EngineRejected
    if the engine cannot be loaded here.
    """
    log = error_log(trt)
    runtime = open_runtime(trt, recipe.backend, log)
    engine = read_engine(trt, recipe.backend, runtime, source, log)
    refitter = trt.Refitter(engine, log)
    lost = _lost(refitter, recipe)
    if lost:
        raise CannotRefit(f"the engine has no weight {lost[0]}")
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(os.fspath(recipe.graph)):
        errors = [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
        raise CannotRefit("; ".join([*errors, *log.errors][:3]) or "the graph's weights are refused")
    missing = refitter.get_missing_weights()
    if missing:
        raise CannotRefit(f"{len(missing)} weights would stay those of the other build, such as {missing[0]}")
    if not refitter.refit_cuda_engine():
        raise CannotRefit("; ".join(log.errors[:3]) or "the weights are refused")
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    # So that the next build can refit this one.
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    plan = engine.serialize_with_config(config)
    if plan is None:
        raise CannotRefit("; ".join(log.errors[:3]) or "the engine cannot be written")
    recipe.engine.write_bytes(plan)
    return int(engine.device_memory_size_v2)


def structure_sha256(graph: Path, weights: Collection[str]) -> str:
    """Of all of a graph but the values of these weights: names, shapes, nodes, and every other constant."""
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            blank = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            tensor.CopyFrom(blank)
        elif uses_external_data(tensor):
            load_external_data_for_tensor(tensor, os.fspath(graph.parent))
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _lost(refitter: Any, recipe: Recipe) -> list[str]:
    return sorted({*recipe.refittable} - {*refitter.get_all_weights()})
