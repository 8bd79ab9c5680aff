"""Compares finished engines with their sources, through Polygraphy's runners and comparator.

TensorRT's engines are compared with their ONNX graphs in ONNX Runtime, ONNX Runtime's with the eager model.
This module is run as a program, once per backend, since Polygraphy chooses between TensorRT and TensorRT-RTX
when it is imported: `python -m stg_trt.build_engines.engine_comparison REQUEST ANSWER`, both JSON.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
import typer
from torch import Tensor

from stg_trt.cli.main import run_command
from stg_trt.engines import manifest as manifests
from stg_trt.engines.manifest import SegmentRecord
from stg_trt.engines.store import Build
from stg_trt.errors import BackendUnavailable, EngineRejected, InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.segment import engine_outputs

from .calibration import converting
from .compiler import Distance, Tolerance, tolerance_of
from .float32_graph import write_float32_graph
from .reference import Reference
from .reproduction import KEPT_GRAPHS
from .streamed_model import unchanged
from .verify import distance

_ROWS = 2
_TIMESTEPS = 1


@dataclass(frozen=True)
class Request:
    """Builds of one backend, and their checkpoint if the comparison needs it."""

    folders: tuple[Path, ...]
    checkpoint: str | None = None
    random_weights: bool = False
    variant: str | None = None
    revision: str | None = None
    lora: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """One segment at one number of rows, and what it was compared with."""

    build: str
    segment: str
    rows: int
    against: str
    found: Distance
    limit: Tolerance


REQUEST = pydantic.TypeAdapter(Request)
ANSWER = pydantic.TypeAdapter(tuple[Comparison, ...])


def compare_engines(request: Request) -> Iterator[Comparison]:
    """Every segment of every build; raises EngineRejected if an engine cannot be loaded."""
    _quiet_polygraphy()
    for folder in request.folders:
        build = Build(folder, manifests.load(folder))
        build.check_files(whole=True)
        if build.manifest.backend == "onnxruntime":
            yield from _against_eager(build, _opened(build, request))
        else:
            yield from _against_graphs(build)


def _opened(build: Build, request: Request) -> Checkpoint:
    """The checkpoint of the build; raises InvalidRequest if it is another one or was not given."""
    if request.checkpoint is None:
        raise InvalidRequest(
            f"checkpoint: expected the one that {build.folder.name} was built from, since ONNX Runtime's "
            "engines are their graphs, got none: give --checkpoint"
        )
    checkpoint = Checkpoint.open(
        request.checkpoint,
        random_weights=request.random_weights,
        variant=request.variant,
        revision=request.revision,
        lora=request.lora,
    )
    built = build.manifest.weights, build.manifest.lora
    if (checkpoint.fingerprint(), checkpoint.applied_lora) != built:
        raise InvalidRequest(
            f"checkpoint: expected the one that {build.folder.name} was built from, got other weights: "
            "give that one, or build again from this one"
        )
    return checkpoint


def _against_eager(build: Build, checkpoint: Checkpoint) -> Iterator[Comparison]:
    """ONNX Runtime against the eager model in float32, on the inputs that a step gives each segment."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    records = build.manifest.segments
    segments = tuple(record.segment for record in records)
    float8, parts = build.manifest.float8, checkpoint.family.transformers
    change = unchanged if float8 is None else converting(float8, parts)
    reference = Reference(checkpoint, build.manifest.workload, segments, _TIMESTEPS, _ROWS, change=change)
    for record in records:
        module = reference.module(record.segment, expand_masks=True)
        feeds = reference.inputs(record.segment)
        _, expected = reference.run(record.segment, module)
        reference.outputs(record.segment)
        runner = OnnxrtRunner(SessionFromOnnx(str(build.folder / record.files[0].name)))
        names = engine_outputs(module.inputs, module.outputs)
        results = _run(build, record, [runner], feeds)
        results.add(
            [dict(zip(names, state.values(), strict=True)) for state in expected], runner_name="eager float32"
        )
        yield _compared(build, record, _ROWS, "eager float32", results)


def _against_graphs(build: Build) -> Iterator[Comparison]:
    """TensorRT against ONNX Runtime in float32, on random inputs, at the rows of every profile."""
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    for record in build.manifest.segments:
        engine = EngineFromBytes(BytesFromPath(str(build.folder / record.files[0].name)))
        with _float32_graph(build, record) as graph:
            for profile, (_, rows, _) in enumerate(record.facts["profiles"]):
                session = OnnxrtRunner(SessionFromOnnx(str(graph)))
                runners = [TrtRunner(engine, optimization_profile=profile), session]
                results = _run(build, record, runners, [random_inputs(record, rows)])
                yield _compared(build, record, rows, "ONNX graph", results)


@contextmanager
def _float32_graph(build: Build, record: SegmentRecord) -> Iterator[Path]:
    """The segment's kept graph as ONNX Runtime runs it; raises InvalidRequest if it was not kept."""
    graph = build.folder / KEPT_GRAPHS / f"{record.segment.name}.onnx"
    if not graph.exists():
        raise InvalidRequest(
            f"{build.folder.name}: expected the graph {graph}, got no such file: build again with --keep-onnx"
        )
    with tempfile.TemporaryDirectory() as folder:
        widened = Path(folder) / graph.name
        write_float32_graph(graph, widened)
        yield widened


def random_inputs(record: SegmentRecord, rows: int) -> dict[str, Tensor]:
    """Standard normal values in float32, which Polygraphy rounds to what each runner takes; bool is true."""
    generator = torch.Generator().manual_seed(0)
    tensors = {spec.name: spec.random(rows, generator) for spec in record.inputs}
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def _run(
    build: Build, record: SegmentRecord, runners: Sequence[Any], feeds: Sequence[Mapping[str, Tensor]]
) -> Any:
    """Polygraphy's results; raises EngineRejected if a runner cannot load or run its engine."""
    from polygraphy.comparator import Comparator

    try:
        return Comparator.run(runners, data_loader=[OrderedDict(feed) for feed in feeds])
    except Exception as error:
        # Polygraphy's own exceptions, or those of the library below, which have no common base.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EngineRejected(
            f"{build.folder.name}: {record.segment.name}: expected an engine that Polygraphy can run here, "
            f"got {reason}: build the engines again here"
        ) from error


def _compared(build: Build, record: SegmentRecord, rows: int, against: str, results: Any) -> Comparison:
    """The first runner's results against the second's."""
    from polygraphy.comparator import Comparator

    limit = tolerance_of(build.manifest.workload)
    distances: list[Distance] = []

    def compare(engine: Any, reference: Any) -> OrderedDict[str, bool]:
        outputs = ([torch.as_tensor(result[name]) for name in engine] for result in (reference, engine))
        distances.append(distance(*outputs))
        return OrderedDict({record.segment.name: limit.allows(distances[-1])})

    Comparator.compare_accuracy(results, compare_func=compare)
    (found,) = distances
    return Comparison(build.folder.name, record.segment.name, rows, against, found, limit)


def _quiet_polygraphy() -> None:
    """It reports every tensor otherwise."""
    try:
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise BackendUnavailable(
            f"verify: expected the Python module polygraphy, got {error}: pip install 'stg-trt[verify]'"
        ) from error
    G_LOGGER.module_severity = G_LOGGER.CRITICAL


def compare(
    request: Annotated[Path, typer.Argument(help="What to compare, as JSON.")],
    answer: Annotated[Path, typer.Argument(help="Where what was found is written, as JSON.")],
) -> None:
    """Compare engines of one backend with what they were made from."""
    found = tuple(compare_engines(REQUEST.validate_json(request.read_bytes())))
    answer.write_bytes(ANSWER.dump_json(found))


if __name__ == "__main__":
    run_command(compare)
