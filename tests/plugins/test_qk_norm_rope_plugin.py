"""The TensorRT plugin around the kernel: compiled against public headers, and built into an engine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from stg_trt.engines import manifest
from tests.support.compiled_kernels import PLUGINS, ROOT, compile_on_host, run
from tests.support.family_cases import WITH_PLUGIN, FamilyCase

HEADERS = Path(os.environ.get("TENSORRT_ROOT", ""), "include", "NvInfer.h")
PROGRAM = Path(__file__).parents[1] / "support" / "build_plugin_engine.py"

pytestmark = [
    pytest.mark.skipif(
        "TENSORRT_ROOT" not in os.environ or not HEADERS.is_file(),
        reason="needs TENSORRT_ROOT=<folder with include/NvInfer.h>: a TensorRT or TensorRT-RTX package, "
        "or a checkout of github.com/NVIDIA/TensorRT",
    ),
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("nvcc") is None, reason="needs nvcc"),
]

Build = Callable[..., str]


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin library for one architecture."""
    folder = tmp_path_factory.mktemp("tensorrt_plugins")
    switches = ("STG_TRT_BUILD_TENSORRT_PLUGINS=ON", "STG_TRT_BUILD_KERNELS=OFF", "BUILD_TESTING=OFF")
    settings = (*switches, f"TENSORRT_ROOT={HEADERS.parents[1]}", "CMAKE_CUDA_ARCHITECTURES=89")
    run("cmake", "-S", ROOT, "-B", folder, *(f"-D{setting}" for setting in settings))
    run("cmake", "--build", folder)
    return folder / "libstg_tensorrt_plugins.so"


def test_plugin_runs_what_it_was_given(tmp_path: Path) -> None:
    folder = PLUGINS / "qk_norm_rope"
    sources = [
        folder / "qk_norm_rope.cu",
        folder / "qk_norm_rope_plugin.cpp",
        PROGRAM.with_name("plugin_on_host.cpp"),
    ]
    compile_on_host("-I", HEADERS.parent, "-o", tmp_path / "plugin", sources=sources)
    assert " 0 failed" in run(tmp_path / "plugin")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """In which TensorRT-RTX finds itself."""
    libraries = find_spec("tensorrt_rtx_libs")
    if libraries is None or not libraries.submodule_search_locations:
        pytest.skip("needs the wheel of TensorRT-RTX")
    # For plugins the parser opens the library by its unversioned name, and aborts if it is missing.
    folder = tmp_path_factory.mktemp("unversioned")
    versioned = next(Path(libraries.submodule_search_locations[0]).glob("libtensorrt_rtx.so.*"))
    (folder / "libtensorrt_rtx.so").symlink_to(versioned)

    return os.environ | {"LD_LIBRARY_PATH": str(folder)}


@pytest.fixture(scope="module")
def build(plugins: Path, environment: dict[str, str]) -> Build:
    """Runs the build in a process of its own, which a mistake in a plugin may end."""

    def build_engine(*options: str) -> str:
        return run(sys.executable, PROGRAM, plugins, *options, env=environment)

    return build_engine


@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16", "BFLOAT16"])
@pytest.mark.parametrize("group", [0, 32])
def test_a_graph_with_the_node_becomes_an_engine(build: Build, dtype: str, group: int) -> None:
    assert "engine with QKNormRope" in build("--dtype", dtype, "--group", str(group))


@pytest.mark.parametrize(
    "options",
    [("--group", "48"), ("--group", "32", "--weight", "64"), ("--pairs", "24"), ("--no-eps",)],
    ids="".join,
)
def test_sizes_that_do_not_fit_are_no_engine(build: Build, options: tuple[str, ...]) -> None:
    assert "no engine" in build(*options)


# The command line, with the library where the test built it.
BUILD = """
import sys
from pathlib import Path
from stg_trt.engines import tensorrt_library
from stg_trt.cli.main import main
tensorrt_library.PLUGINS = Path(sys.argv.pop(1))
main()
"""


@pytest.mark.parametrize("case", WITH_PLUGIN, ids=str)
def test_a_build_puts_the_plugin_into_its_engines(
    case: FamilyCase, plugins: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    sizes = [f"--{name.replace('_', '-')}={size}" for name, size in case.sizes.items()]
    options = ("--stg-blocks=2", "--backend=tensorrt-rtx", "--target=sm_89", "--plugins=qk_norm_rope")
    command = (sys.executable, "-c", BUILD, plugins, "build", case.goldens, f"--output={tmp_path}")
    run(*command, *sizes, *options, env=environment)
    (folder,) = (path.parent for path in tmp_path.glob("*/manifest.json"))
    found = manifest.load(folder)
    assert found.complete
    for record in found.segments:
        plan = (folder / record.files[0].name).read_bytes()
        assert (b"QKNormRope" in plan) == bool(record.segment.blocks)
        assert "plugin=qk_norm_rope/2" in record.facts["flags"]
