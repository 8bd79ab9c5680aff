"""The page's files: open to all, and nothing in them or beside them comes from another host."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stg_trt.runtime.server.page_routes import PAGE_PATHS
from stg_trt.runtime.server.served_model import ServedModels
from tests.support.running_server import refused, running


@pytest.mark.parametrize("path", PAGE_PATHS)
def test_the_page_needs_no_key_and_its_requests_do(models: ServedModels, tmp_path: Path, path: str) -> None:
    with running(models, tmp_path, ready=False, api_key=("secret",)) as server:
        answer = server.http.get(path)
        assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
        assert re.search(r"https?://(?!www\.w3\.org/2000/svg)", answer.text) is None
        refused(server.http.get("/v1/models"), 401, "invalid_api_key")
