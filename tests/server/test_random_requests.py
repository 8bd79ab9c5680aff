"""200 requests that nobody would write: each gets an answer, and the worker goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stg_trt.runtime.server.served_model import ServedModels
from stg_trt.runtime.server.video_request import VideoRequest
from tests.support.running_server import PROMPT, Running, png, running

NAMES = [*VideoRequest.model_fields, "input_reference", "extra_params", "n", "stg_blocks[]", "stg_scale[a]"]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([PROMPT, "160x128", "wide", "small", "sora-2", "stg-r", "1,2", "[1", "{}", "data:,x"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
FIELDS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5)
IDS = st.text(max_size=40) | st.just("video_" + "0" * 32)
ASKED = st.dictionaries(st.sampled_from(["after", "limit", "order", "variant"]), st.text(max_size=8))
REQUESTS = st.one_of(
    st.tuples(st.just("json"), FIELDS),
    st.tuples(st.just("form"), FIELDS),
    st.tuples(st.just("body"), st.binary(max_size=200)),
    st.tuples(st.just("list"), ASKED),
    st.tuples(st.just("one"), st.tuples(IDS, st.sampled_from(["", "/content", "/events", "/cancel"]), ASKED)),
)


@pytest.fixture(scope="module")
def patient(models: ServedModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(models, tmp_path_factory.mktemp("random"), max_queue=4) as started:
        yield started


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(request=REQUESTS, with_prompt=st.booleans())
def test_no_request_breaks_the_server(patient: Running, request: Any, with_prompt: bool) -> None:
    kind, what = request
    answer = ask(patient, kind, what, with_prompt)
    assert answer.status_code < 500, (request, answer.text)
    if answer.status_code >= 400:
        (error,) = answer.json().values()
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    elif answer.request.method == "POST" and "id" in answer.json():
        assert patient.http.delete(f"/v1/videos/{answer.json()['id']}").status_code == 200


def ask(server: Running, kind: str, what: Any, with_prompt: bool) -> Any:
    if kind == "list":
        return server.http.get("/v1/videos", params=what)
    if kind == "one":
        id, action, asked = what
        path = f"/v1/videos/{quoted(id)}{action}"
        return server.http.post(path) if action == "/cancel" else server.http.get(path, params=asked)
    if kind == "body":
        return server.http.post("/v1/videos", content=what, headers={"content-type": "application/json"})
    fields = {"prompt": PROMPT, **what} if with_prompt else what
    if kind == "json":
        body = json.dumps(fields)
        return server.http.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    return server.http.post("/v1/videos", data=texts, files={"input_reference": png(8, 8)})


def quoted(id: str) -> str:
    return "".join(f"%{byte:02x}" for byte in id.encode(errors="surrogatepass")) or "none"


def test_the_worker_still_works(patient: Running) -> None:
    assert patient.finished(patient.create(model="small"))["status"] == "completed"
