"""The server as an application of Ray Serve, for `serve run` and for its config files."""

# Ray Serve reads the annotation of `application` as a class, so annotations are no texts in this module.

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.handle import DeploymentHandle

from stg_trt.models.lora import Lora

from ..command import quiet_libraries
from .app import create_app
from .data_folder import DataFolder
from .model_sources import folders_of, names_of
from .replica import VideoReplica
from .replica_maker import ReplicaMaker
from .served_model import ModelSource, ServedModel, ServedModels
from .service import Service
from .settings import ServerSettings

# Requests that the server answers at a time: those that wait for a video's end, or watch it, are cheap.
_MAX_REQUESTS = 1000
# Of a custom resource, which says on which node the server runs, not how much of it there is.
_A_BIT = 0.001
# After the drain: for replicas to stop within a step, and for the server to write down what came of it.
_STOP_S = 15


def _listed(given: object) -> object:
    """A text, as the command line of Ray Serve gives it, is a list with one entry."""
    return [given] if isinstance(given, str | Path) else given


def _keys() -> list[str]:
    return os.environ.get("STG_TRT_API_KEYS", "").split()


Texts = Annotated[list[str], BeforeValidator(_listed)]
Paths = Annotated[list[Path], BeforeValidator(_listed)]


class ServedArguments(BaseModel):
    """The arguments of the application: the options of `stg-trt serve`, and how many replicas there are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoints: Texts
    engines: Paths
    data: Path
    api_key: Texts = Field(default_factory=_keys)
    model_name: Texts = []
    max_queue: int = 64
    max_upload_mib: float = 32
    expire_hours: float = 24
    quota_gib: float = 20
    drain_seconds: float = 600
    variant: str | None = None
    revision: str | None = None
    lora: Texts = []
    layout: str | None = None
    backend: str | None = None
    offload: bool = False
    vae_tiling: bool = False
    guidance_parallel: int = 1
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    upscale_delay_s: float = Field(default=30, ge=0)
    downscale_delay_s: float = Field(default=600, ge=0)
    gpus_per_replica: float | None = Field(default=None, ge=0)
    cpus_per_replica: float = Field(default=1, ge=0)
    server_resource: str | None = None

    @property
    def gpus(self) -> float:
        """Of each replica: those that share the passes of its steps, unless it was said otherwise."""
        return self.guidance_parallel if self.gpus_per_replica is None else self.gpus_per_replica

    @property
    def settings(self) -> ServerSettings:
        """Raises InvalidRequest for numbers that make no sense."""
        return ServerSettings(
            data=self.data.absolute(),
            api_key=tuple(self.api_key),
            max_queue=self.max_queue,
            max_upload_mib=self.max_upload_mib,
            expire_hours=self.expire_hours,
            quota_gib=self.quota_gib,
            drain_seconds=self.drain_seconds,
        )

    @property
    def sources(self) -> list[ModelSource]:
        """Of each checkpoint; their paths are the same in every process of the cluster."""
        folders = folders_of(self.checkpoints, [folder.absolute() for folder in self.engines])
        names = names_of(self.checkpoints, self.model_name)
        return [
            ModelSource(
                name,
                _whole_path(checkpoint),
                own,
                variant=self.variant,
                revision=self.revision,
                lora=tuple(Lora.parse(lora).text for lora in self.lora),
                layout=self.layout,
                backend=self.backend,
                offload=self.offload,
                vae_tiling=self.vae_tiling,
                guidance_parallel=self.guidance_parallel,
            )
            for name, checkpoint, own in zip(names, self.checkpoints, folders, strict=True)
        ]


class VideoServer:
    """The process with the jobs, their folder and the HTTP API; replicas make `at_a_time` videos."""

    def __init__(
        self,
        replicas: DeploymentHandle[Any],
        settings: ServerSettings,
        sources: Sequence[ModelSource],
        at_a_time: int,
    ) -> None:
        quiet_libraries()
        # One that is being replaced keeps the folder until its videos are made.
        self._folder = DataFolder(settings.data, wait_s=settings.drain_seconds + _STOP_S)
        models = ServedModels([ServedModel.open(source, elsewhere=True) for source in sources])
        makers = [ReplicaMaker(replicas, self._folder, asks=number == 0) for number in range(at_a_time)]
        self._service = Service(settings, models, self._folder, makers)
        self._service.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve for the application that answers HTTP."""
        return create_app(self._service, numbered=True)

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a process whose health raises an error."""
        if not self._service.workers.alive:
            raise RuntimeError("a worker of the server has ended") from self._service.workers.failure

    async def __del__(self) -> None:
        """Called by Ray Serve before it ends the process: videos that run have their time to finish."""
        await asyncio.to_thread(self._service.drain, self._service.settings.drain_seconds)
        await asyncio.to_thread(self._service.stop)
        self._folder.close()


def application(arguments: ServedArguments) -> serve.Application:
    """Builds the application; raises InvalidRequest for arguments that contradict each other."""
    settings, sources = arguments.settings, arguments.sources
    replicas = serve.deployment(
        max_ongoing_requests=1,
        autoscaling_config=AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            max_replicas=arguments.max_replicas,
            target_ongoing_requests=1,
            upscale_delay_s=arguments.upscale_delay_s,
            downscale_delay_s=arguments.downscale_delay_s,
        ),
        graceful_shutdown_timeout_s=settings.drain_seconds + _STOP_S,
        ray_actor_options={
            "num_gpus": arguments.gpus,
            "num_cpus": arguments.cpus_per_replica,
        },
    )(VideoReplica)
    server = serve.deployment(
        name=VideoServer.__name__,
        num_replicas=1,
        max_ongoing_requests=_MAX_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_seconds + 2 * _STOP_S,
        ray_actor_options={
            "num_cpus": 1,
            "resources": {arguments.server_resource: _A_BIT} if arguments.server_resource else {},
            # It reads the engines' descriptions, and must not take memory of a GPU.
            "runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
        },
    )(serve.ingress()(VideoServer))
    return server.bind(replicas.bind(sources), settings, sources, arguments.max_replicas)


def _whole_path(checkpoint: str) -> str:
    """A path; or the name of a published model or a repository, as it is."""
    return str(Path(checkpoint).absolute()) if Path(checkpoint).exists() else checkpoint
