"""The command line of the server."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..command import (
    BackendName,
    GuidanceParallel,
    LayoutName,
    Loras,
    Offload,
    VaeTiling,
    quiet_libraries,
)

if TYPE_CHECKING:
    from .served_model import ModelSource
    from .settings import ServerSettings

_PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")

Engines = Annotated[
    list[Path], typer.Option(help="A folder made by stg-trt build; repeat it, see docs/serving.md.")
]
Keys = Annotated[
    list[str] | None,
    typer.Option(envvar="STG_TRT_API_KEYS", help="One that clients may send; repeat it. [default: no key]"),
]
ModelNames = Annotated[
    list[str] | None, typer.Option(help="Of each checkpoint, in their order. [default: the folder's name]")
]


def serve(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="The checkpoints that the engines were built from.", metavar="CHECKPOINT..."),
    ],
    engines: Engines,
    data: Annotated[Path, typer.Option(help="The folder of jobs and videos; made if it is not there.")],
    host: Annotated[str, typer.Option(help="0.0.0.0 for all networks of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Keys = None,
    model_name: ModelNames = None,
    max_queue: Annotated[int, typer.Option(help="Videos that wait, at most.")] = 64,
    max_upload_mib: Annotated[float, typer.Option(help="Of a picture.")] = 32,
    expire_hours: Annotated[float, typer.Option(help="After which results are removed.")] = 24,
    quota_gib: Annotated[float, typer.Option(help="Of results, beyond which jobs are refused.")] = 20,
    drain_seconds: Annotated[float, typer.Option(help="For the running video on SIGTERM.")] = 600,
    variant: Annotated[str | None, typer.Option(help="Of the checkpoints' weight files, as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the checkpoints on the hub.")] = None,
    lora: Loras = None,
    layout: LayoutName = None,
    backend: BackendName = None,
    offload: Offload = False,
    vae_tiling: VaeTiling = False,
    guidance_parallel: GuidanceParallel = 1,
) -> None:
    """Answer OpenAI's video API with compiled engines."""
    _check_packages()
    from .model_sources import folders_of, names_of
    from .served_model import ModelSource
    from .settings import ServerSettings

    settings = ServerSettings(
        data=data,
        api_key=tuple(api_key or ()),
        max_queue=max_queue,
        max_upload_mib=max_upload_mib,
        expire_hours=expire_hours,
        quota_gib=quota_gib,
        drain_seconds=drain_seconds,
    )
    folders, names = folders_of(checkpoints, engines), names_of(checkpoints, model_name or [])
    options = {"variant": variant, "revision": revision, "layout": layout, "backend": backend}
    sources = [
        ModelSource(
            name,
            checkpoint,
            own,
            lora=tuple(lora or ()),
            offload=offload,
            vae_tiling=vae_tiling,
            guidance_parallel=guidance_parallel,
            **options,
        )
        for name, checkpoint, own in zip(names, checkpoints, folders, strict=True)
    ]
    _run(settings, sources, host, port)


def _run(settings: ServerSettings, sources: list[ModelSource], host: str, port: int) -> None:
    from .data_folder import DataFolder
    from .process import is_local, listen, serve_until_told, url_of
    from .served_model import ServedModel, ServedModels
    from .service import Service

    # Quick checks come first: opening the models takes seconds.
    with listen(host, port) as listening, DataFolder(settings.data) as folder:
        quiet_libraries()
        models = ServedModels([ServedModel.open(source) for source in sources])
        service = Service(settings, models, folder)
        if not settings.api_key and not is_local(host):
            print("stg-trt: no --api-key: whoever reaches this port may use it", file=sys.stderr)
        print(f"Serving {', '.join(model.name for model in models)} on {url_of(listening)}", flush=True)
        serve_until_told(service, listening)


def _check_packages() -> None:
    """Raises BackendUnavailable before anything heavy is imported."""
    from stg_trt.errors import BackendUnavailable

    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise BackendUnavailable(
            f"serve: expected the Python module {missing[0]}, got none: install the extra with "
            "pip install '.[serve]'"
        )
