"""The parts of a short run on a GPU, the most valuable first; on a CPU the same parts with small models.

A rehearsal differs in its `Scale` and in nothing else, so that it tests the path of the real run.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stg_trt.engines.backends import backend_for
from stg_trt.errors import InvalidRequest
from stg_trt.system.files import LIBRARIES

ROOT = Path(__file__).resolve().parents[1]
IN_PLACE = ROOT / "build" / "in_place"
KERNEL_LIBRARY = LIBRARIES / "libstg_kernels.so"
_MODELS = ROOT / "benchmarks" / "models"
_KERNEL_BUILD = "kernel build"


@dataclass(frozen=True)
class Part:
    """One command and the seconds that it may take.

    `output` is the result that it writes as it goes; None if it runs `tests` or builds. A part that
    waits to be `asked` for is left out of a run of all parts.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    output: Path | None = None
    tests: bool = False
    asked: bool = False


Stage = tuple[Part, ...]
"""Parts that run at the same time: of them, at most one may be timed, and not beside others."""


@dataclass(frozen=True)
class Model:
    """A model at one size, perturbed in one block; `blocks` shortens it."""

    checkpoint: str
    width: int
    height: int
    num_frames: int
    stg_mode: str
    stg_block: int
    text_length: int | None = None
    blocks: int | None = None

    def __str__(self) -> str:
        blocks = "" if self.blocks is None else f"-{self.blocks}-blocks"
        return f"{Path(self.checkpoint).name}{blocks}-{self.width}x{self.height}x{self.num_frames}"

    @property
    def size(self) -> tuple[str, ...]:
        """Options that all commands take."""
        text = () if self.text_length is None else (f"--text-length={self.text_length}",)
        blocks = () if self.blocks is None else (f"--blocks={self.blocks}",)
        sizes = (f"--height={self.height}", f"--width={self.width}", f"--num-frames={self.num_frames}")
        return (*sizes, f"--stg-blocks={self.stg_block}", *text, *blocks)


@dataclass(frozen=True)
class Scale:
    """The models that the parts measure: `shortened` is some blocks of `model`, and has all its distinct
    pieces.

    `patience` is how many times as long as on a GPU a part may take.
    """

    device: str
    backend: str
    patience: float
    shortened: Model
    model: Model
    larger: tuple[Model, ...]
    kernel_tests: tuple[str, ...]
    engine_tests: tuple[str, ...]
    step: tuple[str, ...]
    peers: tuple[str, ...]
    sample: tuple[str, ...]
    kernels: tuple[str, ...]


ON_GPU = Scale(
    device="cuda",
    backend="inductor",
    patience=1,
    shortened=Model("ltx-video-2b", 704, 480, 121, "stg-a", 4, blocks=6),
    model=Model("ltx-video-2b", 704, 480, 121, "stg-a", 19),
    larger=(
        Model("ltx-video-2b", 1216, 704, 121, "stg-a", 19),
        Model("cogvideox-2b", 720, 480, 49, "stg-r", 11),
        Model("wan2.1-t2v-1.3b", 832, 480, 81, "stg-r", 8),
    ),
    kernel_tests=("-m", "gpu", "tests/plugins"),
    engine_tests=("-m", "gpu", "tests/engines", "tests/build_engines", "tests/runtime", "tests/benchmarks"),
    step=(),
    peers=("--rounds=10",),
    sample=("--num-inference-steps=20", "--rounds=2"),
    kernels=(),
)

_SMALL = str(_MODELS / "ltx-video-128x2")
REHEARSAL = Scale(
    device="cpu",
    backend="onnxruntime",
    # Alone on two cores no part takes longer; but a machine that tests a change does other work too.
    patience=10,
    # Both of its blocks: as on a GPU, the whole model finds all packages there.
    shortened=Model(_SMALL, 64, 64, 9, "stg-a", 1, text_length=16, blocks=2),
    model=Model(_SMALL, 64, 64, 9, "stg-a", 1, text_length=16),
    larger=(Model(_SMALL, 128, 96, 17, "stg-a", 1, text_length=16),),
    kernel_tests=("-m", "not gpu", "-k", "host and bfloat16 and 4096", "tests/plugins"),
    # Only a sign that tests run from here: the suite runs all of them, and the other parts run engines.
    engine_tests=("-m", "not gpu", "-k", "not every_step", "tests/engines/test_steps_on_devices.py"),
    step=("--rounds=2",),
    # On a CPU torch.compile takes half a minute, and autotuning a minute.
    peers=("--rounds=2", "--peers=eager,torch_tensorrt"),
    sample=("--num-inference-steps=4", "--rounds=1"),
    kernels=("--elements=4096", "--rounds=2"),
)
SCALES = {scale.device: scale for scale in (ON_GPU, REHEARSAL)}


def plan_stages(scale: Scale, output: Path, engines: Path, backend: str) -> list[Stage]:
    """Kernels' tests beside the first compilation, a short step, kernels, the whole model; then the rest.

    The engines of the whole model are made of the same packages as those of the shortened one.
    """
    plan = _Planner(scale, output, engines, backend)
    kernels = (f"--device={scale.device}", *scale.kernels)
    segmented = "--layouts=segmented"
    larger = [
        (part,)
        for model in scale.larger
        for part in (
            plan.measure("step", model, 240, segmented, "--rounds=5", asked=True),
            plan.measure("peers", model, 240, *scale.peers, asked=True),
        )
    ]
    return [
        *_kernel_build(scale),
        (plan.test("kernel tests", 60, scale.kernel_tests), plan.compile(scale.shortened, 120)),
        (plan.measure("step", scale.shortened, 150, segmented, *scale.step),),
        (plan.bench("kernels", "kernels", 45, kernels),),
        (plan.measure("step", scale.model, 200, segmented, *scale.step),),
        (plan.measure("peers", scale.model, 200, *scale.peers),),
        (plan.measure("sample", scale.model, 90, *scale.sample),),
        (plan.test("engine tests", 120, scale.engine_tests),),
        (plan.measure("step", scale.model, 200, "--layouts=segmented,twin", *scale.step, name="twin"),),
        *larger,
        (plan.bench("foreign engine", "foreign-engine", 90, (), asked=True),),
    ]


@dataclass(frozen=True)
class _Planner:
    """Makes the parts of a run, with their folder and common options."""

    scale: Scale
    output: Path
    engines: Path
    backend: str

    def measure(
        self, workload: str, model: Model, limit_s: float, *options: str, name: str = "", asked: bool = False
    ) -> Part:
        """step, peers or sample of a model."""
        given = (f"--checkpoint={model.checkpoint}", f"--stg-mode={model.stg_mode}", *model.size)
        arguments = (*given, *self._place, *options)
        return self.bench(f"{name or workload} {model}", workload, limit_s, arguments, asked=asked)

    def compile(self, model: Model, limit_s: float) -> Part:
        """Compiles the engines of a model; the cost is a result too."""
        modes = (f"--stg-modes={model.stg_mode}", "--layouts=segmented", "--verify-timesteps=0")
        arguments = (model.checkpoint, *model.size, *modes, *self._place)
        return self.bench(f"compile {model}", "build", limit_s, arguments)

    def bench(
        self, name: str, command: str, limit_s: float, arguments: tuple[str, ...], *, asked: bool = False
    ) -> Part:
        """A command of this program, with its result in the run's folder until it is done."""
        output = self.output / f"unfinished-{re.sub('[^a-z0-9.]+', '-', name)}.json"
        program = (sys.executable, "-m", "stg_trt.benchmarks", command)
        command_line = (*program, *arguments, f"--output={output}")
        return Part(name, command_line, limit_s * self.scale.patience, output, asked=asked)

    def test(self, name: str, limit_s: float, chosen: tuple[str, ...]) -> Part:
        """Some of the tests, with the package as a wheel has it."""
        program = (sys.executable, "-m", "pytest", "-q", f"--override-ini=pythonpath={IN_PLACE}")
        return Part(name, (*program, *chosen), limit_s * self.scale.patience, tests=True)

    @property
    def _place(self) -> tuple[str, ...]:
        target = _target(self.backend, self.scale.device)
        return (f"--backend={self.backend}", f"--target={target}", f"--engines={self.engines}")


def _target(backend: str, device: str) -> str:
    """The first target of a backend that runs on the device; raises InvalidRequest if it has none."""
    targets = [target.name for target in backend_for(backend).targets if target.device == device]
    if not targets:
        raise InvalidRequest(
            f"backend: expected one that runs on {device}, got {backend}: leave it out or choose another"
        )
    return targets[0]


def _kernel_build(scale: Scale) -> list[Stage]:
    """Builds the CUDA kernels, for this GPU alone, if they are missing and there is a compiler."""
    tools = shutil.which("cmake") and shutil.which("nvcc")
    if scale.device == "cpu" or KERNEL_LIBRARY.exists() or not tools:
        return []
    folder = "build/kernels-native"
    configure = f"cmake -S . -B {folder} -DCMAKE_CUDA_ARCHITECTURES=native -DBUILD_TESTING=OFF"
    steps = (configure, f"cmake --build {folder} --parallel", f"cmake --install {folder} --prefix .")
    return [(Part(_KERNEL_BUILD, ("sh", "-c", " && ".join(steps)), 90),)]


def choose_parts(stages: Sequence[Stage], only: str | None) -> list[Stage]:
    """Those whose names have one of the comma-separated words of `only` in them.

    None is all of them, except those that wait to be asked for. The build of the kernels, if it is planned,
    is always one of them: the others run with them. Raises InvalidRequest for a word that no name has.
    """
    parts = [part for stage in stages for part in stage]
    words = [] if only is None else [word.strip() for word in only.split(",")]
    unknown = [word for word in words if not word or not any(word in part.name for part in parts)]
    if unknown:
        names = ", ".join(part.name for part in parts)
        raise InvalidRequest(
            f"only: expected words of the parts {names}, got {unknown[0]!r}: correct it or leave it out"
        )

    def is_chosen(part: Part) -> bool:
        named = any(word in part.name for word in words)
        return part.name == _KERNEL_BUILD or (not part.asked if only is None else named)

    chosen = [tuple(part for part in stage if is_chosen(part)) for stage in stages]
    return [stage for stage in chosen if stage]
