"""The choices of `--backend auto` with and without a GPU, and its reasons against the other backends."""

from __future__ import annotations

from pathlib import Path

import pytest

from stg_trt.engines import inductor_chain, tensorrt_library
from stg_trt.engines.auto_backend import choose_backend, why_not
from stg_trt.errors import BackendUnavailable
from stg_trt.system.gpu import Gpu, find_gpu
from tests.support.cli import SMALL, invoke


def gpu(sm: str) -> Gpu:
    return Gpu(f"a GPU of {sm}", sm, 80 << 30, 132, "580.65")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Backends whose library is there; a test changes the set."""
    libraries = {"tensorrt", "tensorrt-rtx", "inductor"}

    def load(backend: str) -> None:
        if backend not in libraries:
            raise BackendUnavailable(f"{backend}: expected the library, got none: pip install it")

    monkeypatch.setattr(tensorrt_library, "load_library", load)
    monkeypatch.setattr(inductor_chain, "check_compiler", lambda device: load("inductor"))
    return libraries


@pytest.mark.parametrize(
    ("sm", "missing", "chosen"),
    [
        ("sm_90", set(), ("tensorrt", "this-gpu")),
        ("sm_90", {"tensorrt"}, ("inductor", "this-gpu")),
        ("sm_80", {"tensorrt"}, ("inductor", "this-gpu")),
        ("sm_120", {"tensorrt"}, ("tensorrt-rtx", "sm_120")),
        ("sm_89", {"tensorrt"}, ("tensorrt-rtx", "sm_89")),
        ("sm_89", {"tensorrt", "tensorrt-rtx"}, ("inductor", "this-gpu")),
        ("sm_70", set(), ("inductor", "this-gpu")),
        ("sm_90", {"tensorrt", "inductor"}, ("onnxruntime", "cpu")),
    ],
)
def test_choice(sm: str, missing: set[str], chosen: tuple[str, str], installed: set[str]) -> None:
    installed -= missing
    choice = choose_backend(gpu(sm))
    assert (choice.backend, choice.target) == chosen
    assert str(choice).startswith(f"backend: {chosen[0]} for {chosen[1]}")
    for name in missing & {"tensorrt"}:
        assert f"{name}: expected the library, got none" in str(choice)


def test_reasons_name_the_gpu(installed: set[str]) -> None:
    installed.discard("tensorrt")
    assert "tensorrt-rtx: expected an RTX card (sm_75, " in str(choose_backend(gpu("sm_90")))
    assert "got a GPU of sm_90 (sm_90): use tensorrt or inductor" in str(
        why_not("tensorrt-rtx", gpu("sm_90"))
    )
    assert why_not("inductor", gpu("sm_90")) is None
    assert why_not("tensorrt", None) == "tensorrt: expected an NVIDIA GPU, got none: use onnxruntime"


def test_without_a_gpu() -> None:
    assert str(choose_backend(None)) == "backend: onnxruntime for cpu (there is no NVIDIA GPU)"


def test_a_build_says_what_it_chose(tmp_path: Path, one_block: Path) -> None:
    if find_gpu() is not None:
        pytest.skip("needs a machine without a GPU")
    result = invoke(
        "build", one_block, "--output", tmp_path, *SMALL, "--verify-timesteps=0", "--backend=auto"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("backend: onnxruntime for cpu (there is no NVIDIA GPU)\n")
