"""Mistakes that matter, and the tests that must notice each: `make mistakes` plants them in a copy."""

from __future__ import annotations

from tests.planted_mistakes.in_benchmarks import IN_BENCHMARKS
from tests.planted_mistakes.in_build_engines import IN_BUILD_ENGINES
from tests.planted_mistakes.in_engines import IN_ENGINES
from tests.planted_mistakes.in_guidance import IN_GUIDANCE
from tests.planted_mistakes.in_models import IN_MODELS
from tests.planted_mistakes.in_ranks import IN_RANKS
from tests.planted_mistakes.in_runtime import IN_RUNTIME
from tests.planted_mistakes.in_server import IN_SERVER
from tests.planted_mistakes.in_videos import IN_VIDEOS

MISTAKES = (
    *IN_MODELS,
    *IN_GUIDANCE,
    *IN_ENGINES,
    *IN_BUILD_ENGINES,
    *IN_RUNTIME,
    *IN_RANKS,
    *IN_VIDEOS,
    *IN_SERVER,
    *IN_BENCHMARKS,
)
