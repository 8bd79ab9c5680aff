"""Requests: fields in every spelling, pictures, and refusals that name the field."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from collections.abc import Iterator

import pytest

from stg_trt.runtime.server.served_model import ServedModels
from stg_trt.runtime.server.video_request import fields_of_form, read_fields
from tests.support.running_server import PROMPT, STEPS, Running, png, refused, running

PLAIN = {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": 7}
BOUNDARY = {"content-type": "multipart/form-data; boundary=cut"}


@pytest.mark.parametrize(
    "form",
    [
        [("stg_blocks[]", "0"), ("stg_blocks[]", "1"), ("stg_scale[a]", "1.5"), ("guidance_scale", "3,1")],
        [("stg_blocks", "0,1"), ("stg_scale", '{"a": 1.5}'), ("guidance_scale", "[3, 1]")],
        [("extra_params", '{"stg_blocks": [0, 1], "stg_scale": {"a": 1.5}, "guidance_scale": [3, 1]}')],
    ],
    ids=["brackets", "texts", "extra_params"],
)
def test_every_spelling_is_the_same_request(form: list[tuple[str, str]]) -> None:
    as_json = {"prompt": "a", "stg_blocks": [0, 1], "stg_scale": {"a": 1.5}, "guidance_scale": [3, 1]}
    got = read_fields(fields_of_form([("prompt", "a"), ("seed", "7"), *form]))
    assert got == read_fields({**as_json, "seed": 7})
    assert got.stg_blocks == [0, 1] and got.stg_scale == {"a": 1.5} and got.guidance_scale == [3.0, 1.0]


def test_fields_of_other_clients_that_change_nothing() -> None:
    sent = {"n": "1", "vae_use_slicing": "True", "vae_use_tiling": "False"}
    assert read_fields({"prompt": "a", **sent}) == read_fields({"prompt": "a"})


REFUSED: dict[str, tuple[dict[str, object], str, str]] = {
    "no prompt": ({"prompt": ""}, "prompt", "expected a text, got none"),
    "two videos": ({"n": 2}, "n", "expected 1, got 2: leave it out"),
    "tiles": ({"vae_use_tiling": True}, "vae_use_tiling", "expected false, got True: leave it out"),
    "misspelt": ({"promt": "a"}, "promt", "expected one of prompt, .*got an unknown name"),
    "path of a picture": ({"image": "/etc/passwd"}, "image", "got an unknown name"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1, got 0"),
    "too many steps": ({"num_inference_steps": 10**6}, "num_inference_steps", "less than or equal to 250"),
    "no number": ({"guidance_scale": "high"}, "guidance_scale", "a valid number, .*got 'high'"),
    "not finite": ({"stg_scale": "nan"}, "stg_scale", "expected a finite number"),
    "no JSON": ({"stg_scale": "{1"}, "stg_scale", "expected JSON, got"),
    "negative": ({"stg_scale": -1}, "stg_scale", "expected a number from 0"),
    "scales": ({"stg_scale": [0, 1]}, "stg_scale", "expected 3 entries, .*got 2"),
    "mode": ({"stg_mode": "stg-z"}, "stg_mode", "expected one of stg-a, stg-r, got 'stg-z'"),
    "preset": ({"preset": "../../secret"}, "preset", "expected one of ltx"),
    "block": ({"stg_blocks": [9]}, "stg_blocks", "expected block numbers from 0 to"),
    "size": ({"size": "64x"}, "size", "got '64x'"),
    "size not built": ({"size": "64x64"}, "size", "built for wide: 160x128, got 64x64"),
    "width": ({"size": "160x128", "width": 64}, "width", "expected that of size 160x128, got 64"),
    "height": ({"height": 64}, "height", "built for wide: 160x128, got anyx64"),
    "frames": ({"num_frames": 9}, "num_frames", "built for 160x128: 17, got 9"),
    "two lengths": ({"num_frames": 17, "seconds": 1}, "seconds", "expected seconds or num_frames, got both"),
    "seconds": ({"seconds": "0"}, "seconds", "greater than 0"),
    "seed": ({"seed": -1}, "seed", "greater than or equal to 0"),
    "steps of two kinds": (
        {"timesteps": [1000], "sigmas": [1]},
        "timesteps",
        "timesteps or sigmas, got both",
    ),
    "of another model": ({"motion_bucket_id": 1}, "arguments", "got motion_bucket_id: check the spelling"),
    "twice": ({"extra_params": {"seed": 1}}, "seed", "got it in extra_params too"),
    "extra": ({"extra_params": "[]"}, "extra_params", r"expected a JSON object, got \[\]"),
    "http": (
        {"input_reference": "http://127.0.0.1/a.png"},
        "input_reference",
        r"http\(s\) addresses are not",
    ),
    "file": (
        {"input_reference": {"file_id": "f"}},
        "input_reference",
        "expected image_url alone, got file_id",
    ),
    "base64": ({"input_reference": "data:image/png;base64,%%"}, "input_reference", "expected base64"),
    "no picture": ({"input_reference": "data:a/b;base64,YWJj"}, "input_reference", "got 3 bytes of none"),
    "number": ({"input_reference": 3}, "input_reference", "got int: send one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_field(server: Running, case: str) -> None:
    changed, param, pattern = REFUSED[case]
    answer = server.http.post("/v1/videos", json={"model": "wide", **PLAIN, **changed})
    code = "missing" if case == "no prompt" else "invalid_value"
    message = refused(answer, 400, code, param)
    assert message.startswith(f"{param}: ") and re.search(pattern, message), message


@pytest.mark.parametrize(
    ("content", "kind", "code"),
    [
        ("{", "application/json", "invalid_json"),
        ("[" * 100_000, "application/json", "invalid_json"),
        ("[1]", "application/json", "invalid_json"),
        (b"\xff", "application/json", "invalid_json"),
        ("nonsense", "multipart/form-data; boundary=cut", "invalid_form"),
        ("--cut\r\n\r\n", "multipart/form-data", "invalid_form"),
    ],
)
def test_broken_bodies(server: Running, content: str | bytes, kind: str, code: str) -> None:
    answer = server.http.post("/v1/videos", content=content, headers={"content-type": kind})
    assert refused(answer, 400, code).startswith("body: expected")


def test_half_a_character(server: Running) -> None:
    """JSON can hold it, but no answer."""
    json_type = {"content-type": "application/json"}
    name = server.http.post("/v1/videos", content=r'{"prompt": "a", "\ud800": 1}', headers=json_type)
    refused(name, 400, "invalid_value", "body")
    text = server.http.post("/v1/videos", content=r'{"prompt": "\ud800"}', headers=json_type)
    refused(text, 400, "invalid_value", "prompt")
    model = server.http.post(
        "/v1/videos", content=r'{"prompt": "a", "stg_scale": {"\ud800": 1}}', headers=json_type
    )
    refused(model, 400, "invalid_value", "stg_scale")


def test_broken_forms(server: Running) -> None:
    twice = server.http.post("/v1/videos", data={"prompt": [PROMPT, "two"]})
    assert "expected it once, got it twice" in refused(twice, 400, "invalid_value", "prompt")
    picture = {"picture": ("a.png", png(8, 8))}
    other = server.http.post("/v1/videos", data=PLAIN, files=picture)
    assert "expected no file but input_reference" in refused(other, 400, "invalid_value", "picture")


def bomb() -> bytes:
    """A PNG of few bytes whose header says 9000x9000, which Pillow would decode."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("picture", "pattern"),
    [
        (b"", "got 0 bytes of none: check the file"),
        (png(64, 64)[:60], "got 60 bytes of none"),
        (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "expected a PNG, JPEG or WebP picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "expected a PNG, JPEG or WebP picture"),
        (bomb(), "expected at most 64000000 pixels, got more"),
    ],
    ids=["empty", "cut short", "GIF", "PostScript", "bomb"],
)
def test_pictures_that_are_none(server: Running, picture: bytes, pattern: str) -> None:
    files = {"input_reference": ("../../a.png", picture, "image/png")}
    answer = server.http.post("/v1/videos", data={**PLAIN, "model": "wide"}, files=files)
    assert pattern in refused(answer, 400, "invalid_value", "input_reference")


def test_a_model_that_takes_no_picture(server: Running) -> None:
    files = {"input_reference": png(64, 48)}
    answer = server.http.post("/v1/videos", data={**PLAIN, "model": "small"}, files=files)
    assert "expected none, for which this" in refused(answer, 400, "invalid_value", "input_reference")


def test_a_picture_is_the_same_however_it_is_sent(server: Running) -> None:
    picture = png(160, 128)
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    form = {name: str(value) for name, value in PLAIN.items()}
    answers = [
        server.http.post("/v1/videos", data=form, files={"input_reference": picture}),
        server.http.post("/v1/videos", json={**PLAIN, "input_reference": url}),
        server.http.post("/v1/videos", data={**form, "input_reference[image_url]": url}),
        server.http.post("/v1/videos", data=form),
    ]
    *with_picture, without = [server.content(answer.json()["id"]) for answer in answers]
    assert len({*with_picture}) == 1 and without != with_picture[0]
    references = server.service.folder.result("video_" + "0" * 32, "video").parents[1] / "references"
    assert not [*references.iterdir()]


@pytest.fixture(scope="module")
def narrow(
    models: ServedModels, tmp_path_factory: pytest.TempPathFactory, server: Running
) -> Iterator[Running]:
    """A server that takes small uploads; its worker waits for nothing."""
    with running(
        models, tmp_path_factory.mktemp("narrow"), ready=False, max_upload_mib=10_000 / (1 << 20)
    ) as started:
        yield started


def test_bodies_are_bounded(narrow: Running) -> None:
    limit = 10_000 * 4 // 3 + (1 << 20)
    files = {"input_reference": b"x" * 10_001}
    answer = narrow.http.post("/v1/videos", data=PLAIN, files=files)
    assert "at most 10000 bytes, got 10001" in refused(answer, 413, "request_too_large", "input_reference")
    said = narrow.http.post("/v1/videos", content=b"{}", headers={"content-length": str(limit + 1)})
    assert f"expected at most {limit} bytes" in refused(said, 413, "request_too_large")
    # Without a length, by what arrives.

    def endless() -> Iterator[bytes]:
        yield b'--cut\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield b"x" * 100_000

    refused(narrow.http.post("/v1/videos", content=endless(), headers=BOUNDARY), 413, "request_too_large")


def test_no_name_of_a_request_reaches_the_disk(narrow: Running) -> None:
    for id in ("..%2f..%2fetc%2fpasswd", "video_../../x", "video_" + "g" * 32, "%00"):
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", ""), ("POST", "/cancel")):
            answer = narrow.http.request(method, f"/v1/videos/{id}{path}")
            assert answer.status_code in (404, 405), (id, method, path)
            assert answer.json().keys() == {"error"}


def test_seconds_and_sizes_are_told_back(server: Running) -> None:
    small = server.video(server.create(size="64x48", seconds="4"))
    assert (small["model"], small["seconds"], small["num_frames"]) == ("small", "0.56", 9)
    default = server.video(server.create(model="sora-2-pro", fps=8))
    assert (default["model"], default["size"], default["seconds"]) == ("wide", "160x128", "2.12")
    drawn = [server.video(server.create(seed=None))["seed"] for _ in range(2)]
    assert drawn[0] != drawn[1]
    for video in json.loads(server.http.get("/v1/videos").content)["data"]:
        assert server.finished(video["id"])["status"] == "completed"
