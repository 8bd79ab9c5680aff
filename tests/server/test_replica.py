"""The parts of the application for Ray Serve, without Ray's processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from pydantic import ValidationError

from stg_trt.errors import InvalidRequest, OutOfDeviceMemory
from stg_trt.runtime.server.data_folder import DataFolder
from stg_trt.runtime.server.failures import Failure
from stg_trt.runtime.server.job import Job, Result
from stg_trt.runtime.server.refusal import Refusal
from stg_trt.runtime.server.served_model import ModelSource
from stg_trt.runtime.server.steps_board import StepTaken
from stg_trt.runtime.server.video_maker import JobStopped, MakerLost
from stg_trt.runtime.server.video_request import ResolvedRequest, VideoRequest
from tests.support.pages import snippets, text
from tests.support.running_server import PROMPT

if find_spec("ray") is None:
    pytest.skip("needs Ray Serve: pip install '.[ray]'", allow_module_level=True)

from ray._common.utils import import_attr
from ray.exceptions import ActorDiedError
from ray.serve.schema import ServeDeploySchema

from stg_trt.runtime.server.ray_application import ServedArguments, application
from stg_trt.runtime.server.replica import Begun, Made, Message, VideoReplica
from stg_trt.runtime.server.replica_maker import ReplicaMaker

ID = f"video_{1:032x}"


@pytest.fixture(scope="module")
def replica(sources: list[ModelSource]) -> VideoReplica:
    return VideoReplica([sources[1]])


@pytest.fixture
def decode(replica: VideoReplica) -> Iterator[mock.Mock]:
    components = replica._models.get("small").pipeline.components
    with mock.patch.object(components, "decode", side_effect=components.decode) as patched:
        yield patched


def request(replica: VideoReplica, steps: int) -> ResolvedRequest:
    return replica._models.get("small").resolve(
        VideoRequest(prompt=PROMPT, seed=7, num_inference_steps=steps)
    )


async def collected(messages: AsyncIterator[Message]) -> list[Message]:
    return [message async for message in messages]


def made(replica: VideoReplica, steps: int = 3) -> list[Message]:
    return asyncio.run(collected(replica.make(ID, request(replica, steps), None)))


def test_a_replica_sends_a_video_and_keeps_nothing(replica: VideoReplica) -> None:
    begun, *steps, last = made(replica)
    assert begun == Begun() and isinstance(last, Made)
    assert [step.step for step in steps if isinstance(step, StepTaken)] == [1, 2, 3]
    assert last.files["video"][4:8] == b"ftyp" and last.result.bytes == sum(map(len, last.files.values()))
    assert [*Path(replica._scratch.name).glob("videos/*")] == []
    again = made(replica)[-1]
    assert isinstance(again, Made) and again.files == last.files


def test_a_replica_ends_a_cancelled_video_within_a_step(replica: VideoReplica, decode: mock.Mock) -> None:
    taken: list[Message] = []

    async def follow() -> None:
        async for message in replica.make(ID, request(replica, 200), None):
            taken.append(message)

    async def cancel_after_two_steps() -> None:
        following = asyncio.create_task(follow())
        while len(taken) < 3:
            await asyncio.sleep(0.001)
        following.cancel()
        with pytest.raises(asyncio.CancelledError):
            await following

    asyncio.run(cancel_after_two_steps())
    assert len(taken) < 150 and not decode.called
    assert isinstance(made(replica)[-1], Made)


def test_a_replica_that_ends_leaves_no_folder(sources: list[ModelSource]) -> None:
    replica = VideoReplica([sources[1]])
    scratch = Path(replica._scratch.name)
    assert scratch.exists()
    replica.__del__()
    assert not scratch.exists()


def test_a_video_that_fails(replica: VideoReplica, decode: mock.Mock) -> None:
    decode.side_effect = OutOfDeviceMemory("GPU memory: expected room")
    last = made(replica)[-1]
    assert isinstance(last, Failure) and last.code == "out_of_memory"
    replica.check_health()


def test_a_replica_without_its_gpu_is_replaced(replica: VideoReplica, decode: mock.Mock) -> None:
    """It begins no other video, which would lose an attempt."""
    lost = decode.side_effect = RuntimeError("CUDA error: an illegal memory access was encountered")
    try:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            made(replica)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            replica.check_health()
        decode.side_effect = OutOfDeviceMemory("GPU memory: expected room")
        messages = replica.make(ID, request(replica, 3), None)
        with pytest.raises(RuntimeError) as raised:
            asyncio.run(collected(messages))
        assert raised.value is lost
    finally:
        replica._lost = None


class FakeRun:
    """A job whose worker records what becomes of it; it is stopped after `most` steps."""

    def __init__(self, job: Job, most: int = 99) -> None:
        self.job = job
        self.heard: list[str] = []
        self._most = most

    def begin(self) -> None:
        self.heard.append("begin")

    def step(self, step: StepTaken) -> None:
        self.heard.append("step")
        if len(self.heard) > self._most:
            raise JobStopped

    def check(self) -> None:
        if len(self.heard) > self._most:
            raise JobStopped


def waiting_job(replica: VideoReplica) -> Job:
    return Job(ID, "queued", request(replica, 3), False, 0, None, None, None, None, 0, 0, None)


def maker(folder: DataFolder, messages: Sequence[object]) -> tuple[ReplicaMaker, mock.Mock]:
    """Of a handle whose replica answers with messages, and fails with an error among them."""
    response = mock.MagicMock()
    response.__next__.side_effect = [*messages, StopIteration]
    handle = mock.Mock()
    handle.options.return_value.make.remote.return_value = response
    return ReplicaMaker(handle, folder, asks=False), response


STEP = StepTaken(1, 3, 1.0, 0.1, {}, None)
RESULT = Result(3, "ab", 1.5, None, {"denoise": 1.0})


def test_a_job_begins_with_its_replica(replica: VideoReplica, tmp_path: Path) -> None:
    lost = ActorDiedError()
    with DataFolder(tmp_path) as folder:
        for messages, heard in (
            ([lost], []),
            ([Begun(), STEP, lost], ["begin", "step"]),
            ([Begun()], ["begin"]),
        ):
            making, _ = maker(folder, messages)
            run = FakeRun(waiting_job(replica))
            with pytest.raises(MakerLost):
                making.make(run)
            assert run.heard == heard


def test_messages_of_a_replica(replica: VideoReplica, tmp_path: Path) -> None:
    with DataFolder(tmp_path) as folder:
        made = Made(RESULT, {"video": b"x", "thumbnail": b"y", "spritesheet": b"z"})
        making, response = maker(folder, [Begun(), STEP, made])
        run = FakeRun(waiting_job(replica))
        assert making.make(run) is RESULT and run.heard == ["begin", "step"] and not response.cancel.called
        assert folder.result(ID, "video").read_bytes() == b"x"
        making, response = maker(folder, [Begun(), Failure("not_finite", "got NaN")])
        with pytest.raises(Refusal, match="got NaN") as refusal:
            making.make(FakeRun(waiting_job(replica)))
        assert refusal.value.code == "not_finite"
        # A cancelled job's request ends with an error of Ray's.
        for messages in ([Begun(), STEP, STEP], [Begun(), STEP, ActorDiedError()]):
            making, response = maker(folder, messages)
            with pytest.raises(JobStopped):
                making.make(FakeRun(waiting_job(replica), most=1))
            assert response.cancel.called


def test_arguments_of_the_application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STG_TRT_API_KEYS", "first second")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wan").mkdir()
    # The command line of Ray Serve gives texts alone.
    texts = {"checkpoints": "wan", "engines": "e", "data": "d", "offload": "true", "max_replicas": "4"}
    texts["lora"] = "a.safetensors:0.8"
    (tmp_path / "a.safetensors").touch()
    given = ServedArguments.model_validate(texts)
    (source,) = given.sources
    assert (source.name, source.checkpoint, source.engines) == (
        "wan",
        str(tmp_path / "wan"),
        (tmp_path / "e",),
    )
    assert source.lora == (f"{tmp_path}/a.safetensors:0.8",)
    assert source.offload and given.max_replicas == 4
    assert given.settings.data == tmp_path / "d" and given.settings.api_key == ("first", "second")
    several = ServedArguments.model_validate({**texts, "checkpoints": ["a/b", "c"], "engines": ["e", "f"]})
    assert [(one.name, one.checkpoint) for one in several.sources] == [("b", "a/b"), ("c", "c")]


def test_the_documentation_names_every_argument() -> None:
    page = text("docs/serving.md")
    assert [name for name in ServedArguments.model_fields if f"`{name}`" not in page] == []
    (config,) = snippets("docs/serving.md", "yaml")
    (shown,) = ServeDeploySchema.model_validate(yaml.safe_load(config)).applications
    assert import_attr(shown.import_path) is application
    assert ServedArguments.model_validate(shown.args).max_replicas == 4


@pytest.mark.parametrize(
    ("changes", "error", "pattern"),
    [
        ({"replicas": 2}, ValidationError, "replicas"),
        ({"max_replicas": 0}, ValidationError, "max_replicas"),
        ({"max_queue": 0}, InvalidRequest, "max_queue: expected a number above 0, got 0"),
        ({"checkpoints": ["a", "a"]}, InvalidRequest, "model_name: expected different names"),
    ],
)
def test_arguments_that_make_no_sense(changes: dict[str, Any], error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        application(
            ServedArguments.model_validate({"checkpoints": "a", "engines": "e", "data": "d", **changes})
        )
