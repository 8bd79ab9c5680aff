"""The record that a build leaves beside its engines: JSON with a schema version, written atomically."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from stg_trt.engines.float8_record import Float8Record
from stg_trt.engines.reused import Reused
from stg_trt.errors import EngineRejected
from stg_trt.models.families import family_for
from stg_trt.models.lora import AppliedLora
from stg_trt.models.passes import SkipBlocksByName, read_skips
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.preview import PreviewMap
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import TensorSpec
from stg_trt.models.workload import Workload
from stg_trt.system.files import write_atomically
from stg_trt.system.gpu import GpuIdentity

if TYPE_CHECKING:
    from stg_trt.models.families.base import ModelFamily

SCHEMA_VERSION = 3
FILE_NAME = "manifest.json"


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """One engine file."""

    name: str
    bytes: int
    sha256: str


class Verification(_Record):
    """How far a segment's graph is from eager float32 at one timestep.

    `piece` is the one that is farthest of those that were compared, such as block 3; None if the segment was
    compared as a whole.
    """

    timestep: float
    cosine: float
    relative_l2: float
    max_abs: float
    piece: str | None = None


class SegmentRecord(_Record):
    """A finished segment: what it is, what it was made from, and what the gates found.

    `commands` for trtexec and Polygraphy build or run the same graph, if `--keep-onnx` kept it. `reused` is
    what builds with other weights had already: the graph, which was not exported again, and the engine, which
    was refitted. `structure_sha256` is of the graph without its weights, if the engine can be refitted.
    """

    segment: Segment
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    key: str
    facts: dict[str, Any]
    files: tuple[FileRecord, ...]
    graph_sha256: str
    flops: int
    attentions: int
    fused_attentions: int | None
    attention_kernels: tuple[str, ...]
    activation_bytes: int | None
    verification: tuple[Verification, ...]
    commands: tuple[str, ...]
    seconds: dict[str, float]
    peak_bytes: int
    reused: tuple[Reused, ...] = ()
    structure_sha256: str | None = None

    @property
    def engine_bytes(self) -> int:
        """Size of the segment's files."""
        return sum(file.bytes for file in self.files)


class Manifest(_Record):
    """One build: a model at one size, in one layout, for one backend and target.

    `gpu` is the one that a build for `this-gpu` was compiled on.
    """

    schema_version: int = SCHEMA_VERSION
    stg_trt_version: str
    export_version: str
    versions: dict[str, str]
    backend: str
    target: str
    gpu: GpuIdentity | None
    family: str
    transformer_config: dict[str, Any]
    vae_config: dict[str, Any] | None
    image_encoder_config: dict[str, Any] | None = None
    weights: str
    lora: tuple[AppliedLora, ...] = ()
    workload: Workload
    layout: str
    stg_mode: str
    stg_blocks: tuple[int, ...]
    # By name; without any, stg_blocks are those of one pass.
    skip_passes: dict[str, tuple[int, ...]] = {}
    max_batch: int
    preview: PreviewMap | None = None
    float8: Float8Record | None = None
    complete: bool
    segments: tuple[SegmentRecord, ...]

    @property
    def perturbation(self) -> Perturbation:
        """The mode and all blocks that the build can perturb."""
        return Perturbation(self.stg_mode, self.stg_blocks)

    @property
    def model(self) -> ModelFamily:
        """The model family; raises InvalidRequest if this release does not know it."""
        return family_for(
            self.transformer_config, self.vae_config, image_encoder_config=self.image_encoder_config
        )

    @property
    def skips(self) -> SkipBlocksByName:
        """The skip passes that a step can have, each with the blocks that it was named with."""
        return self.skip_passes or read_skips(self.stg_blocks)

    @property
    def engine_bytes(self) -> int:
        """Size of the engines; a file that several segments share counts once."""
        return sum(file.bytes for file in {file for record in self.segments for file in record.files})

    @property
    def peak_bytes(self) -> int:
        """The most memory that building a segment took."""
        return max(record.peak_bytes for record in self.segments)

    def record(self, name: str) -> SegmentRecord | None:
        """The finished segment of that name."""
        return next((record for record in self.segments if record.segment.name == name), None)


def save(manifest: Manifest, folder: Path) -> None:
    """Writes manifest.json whole or not at all."""
    body = manifest.model_dump(mode="json")
    text = json.dumps({**body, "sha256": _digest(body)}, indent=1) + "\n"
    write_atomically(folder / FILE_NAME, text.encode())


def load(folder: Path) -> Manifest:
    """Reads a manifest; raises EngineRejected with the reason if it cannot be trusted."""
    path = folder / FILE_NAME
    try:
        body = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise EngineRejected(f"{path}: no such file: the build was not finished; run it again") from None
    except OSError as error:
        raise EngineRejected(f"{path}: cannot be read ({error.strerror}): build the engines again") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineRejected(f"{path}: not JSON ({error}): build the engines again") from None
    if not isinstance(body, dict) or body.get("schema_version") != SCHEMA_VERSION:
        found = body.get("schema_version") if isinstance(body, dict) else type(body).__name__
        raise EngineRejected(
            f"{path}: expected schema version {SCHEMA_VERSION}, got {found}: build the engines again"
        )
    digest = body.pop("sha256", None)
    if digest != _digest(body):
        raise EngineRejected(
            f"{path}: expected what the build wrote, got an edited file (its sha256 is another): "
            "build the engines again"
        )
    try:
        return Manifest.model_validate(body)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise EngineRejected(f"{path}: {first['loc']}: {first['msg']}: build the engines again") from None


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
