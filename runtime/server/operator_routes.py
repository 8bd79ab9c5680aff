"""Routes for whoever runs the server, and for those who choose a model."""

from __future__ import annotations

from typing import TypedDict

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from .job import seconds_text
from .served_model import ServedModel
from .service import Service


class SizeJson(TypedDict):
    """One size that is built."""

    size: str
    num_frames: int
    seconds: str


class ModelJson(TypedDict):
    """OpenAI's Model, with the sizes that are built; `seconds` at its usual frames per second."""

    id: str
    object: str
    created: int
    owned_by: str
    fps: float
    sizes: list[SizeJson]


def add_operator_routes(app: FastAPI, service: Service) -> None:
    """Models, health and metrics."""

    @app.get("/v1/models")
    def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [_json(model) for model in service.models]})

    @app.get("/v1/models/{name}")
    def retrieve_model(name: str) -> Response:
        return JSONResponse(_json(service.models.get(name)))

    @app.get("/health/live")
    def is_live() -> Response:
        alive = service.workers.alive
        return JSONResponse({"status": "live" if alive else "ended"}, 200 if alive else 503)

    @app.get("/health/ready")
    def is_ready() -> Response:
        status = "ready" if service.ready else "draining" if service.draining else "warming up"
        return JSONResponse({"status": status}, 200 if service.ready else 503)

    @app.get("/metrics")
    def show_metrics() -> Response:
        text = service.metrics.text(service.levels)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _json(model: ServedModel) -> ModelJson:
    fps = model.family.defaults.frame_rate
    sizes: list[SizeJson] = [
        {"size": size.pixels, "num_frames": size.num_frames, "seconds": seconds_text(size.num_frames, fps)}
        for size in model.sizes
    ]
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_at,
        "owned_by": "stg-trt",
        "fps": fps,
        "sizes": sizes,
    }
