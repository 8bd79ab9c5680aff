"""One build for several sizes: as builds one by one, checked before the first, weights once on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from stg_trt import VideoPipeline, build
from stg_trt.build_engines import graph_weights
from stg_trt.build_engines.sizes import Size, choose_sizes
from stg_trt.engines import manifest as manifests
from stg_trt.errors import InvalidRequest
from tests.support.family_cases import LTX
from tests.support.whole_pipelines import seeded


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ("704x480x121", [Size(480, 704, 121)]),
        ("704x480x121, 1216x704x121", [Size(480, 704, 121), Size(704, 1216, 121)]),
        (["64x32x9", "64x32x9"], [Size(32, 64, 9)]),
    ],
)
def test_sizes_are_width_height_frames(sizes: Any, expected: list[Size]) -> None:
    assert [*choose_sizes(sizes, None, None, None)] == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None, None, None), "sizes: expected height, width and num_frames, or sizes such as"),
        ((None, 64, None, 9), "got 64, None, 9: give all three, or --sizes"),
        (("64x64x9", 64, None, None), "got both: leave height out"),
        (("64x64", None, None, None), "expected width, height and frames, as 704x480x121, got '64x64'"),
        (("64x-64x9", None, None, None), "got '64x-64x9': correct it"),
    ],
)
def test_other_texts_are_refused(given: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        choose_sizes(*given)


@pytest.mark.slow(reason="exports graphs of its own")
def test_every_size_runs_and_weights_are_kept_once(
    one_block: Path, embeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_weights, "_EMBEDDED_BYTES", 0)  # As of a large model.
    given: dict[str, Any] = {"stg_blocks": [0], "verify_timesteps": 1}
    output = tmp_path / "engines"
    folders = build(
        one_block, output, sizes="64x64x9,160x128x17", text_length=LTX.sizes["text_length"], **given
    )
    assert [manifests.load(folder).workload.width for folder in folders] == [64, 160]
    alone = build(one_block, tmp_path / "alone", **LTX.sizes, **given)
    small, large = ({file.name: file.stat() for file in folder.glob("*.data")} for folder in folders)
    assert small and small.keys() == large.keys()
    assert {name: one.st_ino for name, one in small.items()} == {
        name: one.st_ino for name, one in large.items()
    }
    for record in manifests.load(folders[1]).segments:
        assert record.graph_sha256 == manifests.load(alone[0]).record(record.segment.name).graph_sha256  # type: ignore[union-attr]
    pipe = VideoPipeline.from_pretrained(one_block, output)
    text = {name: tensor[:1] for name, tensor in load_file(embeds).items() if name.startswith("prompt")}
    for width, frames in ((64, 9), (160, 17)):
        made = pipe(
            **text, width=width, num_frames=frames, guidance_scale=1.0, num_inference_steps=2,
            generator=seeded(0), output_type="latent",
        ).frames  # fmt: skip
        assert made.isfinite().all()


def test_nothing_is_built_if_a_size_cannot_be(one_block: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="width"):
        build(one_block, tmp_path / "engines", sizes=["64x64x9", "65x64x9"], stg_blocks=[0])
    assert not (tmp_path / "engines").exists()
