"""The rules of the house: who imports whom, what a name may be, how long things are."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

from stg_trt.models import families
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.published import published

ROOT = Path(__file__).parents[1]
PROGRAMS = ("build_engines", "runtime", "benchmarks")
PRODUCT = ("stg_trt", *PROGRAMS)
# The parts that each part may import. Programs never import each other; benchmarks measure the other two.
LIBRARY = {"errors", "system", "models", "guidance", "engines"}
MAY_IMPORT = {
    "stg_trt/errors.py": set(),
    "stg_trt/system": {"errors"},
    "stg_trt/models": {"errors", "system"},
    "stg_trt/guidance": {"errors", "models"},
    "stg_trt/engines": {"errors", "models", "system"},
    "stg_trt/cli": {*LIBRARY, *PROGRAMS},
    "build_engines": {*LIBRARY, "cli"},
    "runtime": {*LIBRARY, "cli"},
    "benchmarks": {*LIBRARY, "cli", *PROGRAMS},
}
# The lazy names of the package, and the command line that gathers the programs.
LAZY_BORDERS = {"stg_trt/__init__.py", "stg_trt/cli/main.py", "stg_trt/cli/doctor.py"}
TENSORRT_BOUNDARY = "stg_trt/engines/tensorrt_library.py"
MAX_FUNCTION_LINES = 60
MAX_MODULE_LINES = 400
FORBIDDEN_NOUNS = {
    "util",
    "utils",
    "helper",
    "helpers",
    "manager",
    "managers",
    "factory",
    "factories",
    "misc",
}
METHODS = (FunctionType, property, classmethod, staticmethod, cached_property)
DYNAMIC_IMPORTS = ("import_module", "__import__", "find_spec")


def sources(*folders: str) -> list[str]:
    """Paths of Python files, relative to the checkout; a folder may be one of them."""
    found = [path for folder in folders for path in (ROOT / folder, *(ROOT / folder).rglob("*.py"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in found if path.suffix == ".py")


@cache
def text(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


@cache
def imported(path: str, source: str) -> frozenset[str]:
    """Dotted names that a file imports, relative and constant dynamic ones included.

    A program's name inside the wheel, stg_trt.runtime, counts as its own name, runtime.
    """
    package = path.split("/")[:-1]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *(node.module.split(".") if node.module else [])])
            names |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and node.args:
            names |= set(_dynamic(node))
    return frozenset(re.sub(rf"^stg_trt\.({'|'.join(PROGRAMS)})\b", r"\1", name) for name in names)


def _dynamic(call: ast.Call) -> Iterator[str]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    argument = call.args[0]
    if name in DYNAMIC_IMPORTS and isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        yield argument.value


def importers(folder: str, *targets: str) -> set[str]:
    """Files of a folder that import a target or something inside it."""
    return {
        path
        for path in sources(folder)
        if any(
            name == target or name.startswith(f"{target}.")
            for name in imported(path, text(path))
            for target in targets
        )
    }


@pytest.mark.parametrize(
    ("path", "source", "name"),
    [
        ("stg_trt/a.py", "import runtime.command", "runtime.command"),
        ("stg_trt/a.py", "def f():\n    from stg_trt.runtime.command import generate", "runtime.command"),
        ("stg_trt/a.py", "from stg_trt import build_engines", "build_engines"),
        ("stg_trt/a.py", "from . import build_engines", "build_engines"),
        ("stg_trt/engines/a.py", "from ..runtime import command", "runtime.command"),
        ("stg_trt/a.py", "importlib.import_module('stg_trt.benchmarks')", "benchmarks"),
        ("runtime/a.py", "from .command import generate", "runtime.command"),
    ],
)
def test_every_way_to_import_is_seen(path: str, source: str, name: str) -> None:
    assert name in imported(path, source)


def test_parts_import_only_what_they_may() -> None:
    found = {part: parts_imported(part) - MAY_IMPORT[part] for part in MAY_IMPORT}
    assert not {part: names for part, names in found.items() if names}


def parts_imported(part: str) -> set[str]:
    """Programs, folders of the library and lazy names, other than the part itself."""
    own = Path(part).stem
    names = {name for path in sources(part) for name in imported(path, text(path))}
    inside = {name.split(".")[1] for name in names if name.startswith("stg_trt.")}
    return (inside - {"__version__"} | names & set(PROGRAMS)) - {own}


def test_every_part_has_its_walls() -> None:
    folders = {path.parent.as_posix() for path in map(Path, sources(*PRODUCT))}
    tops = {"/".join(folder.split("/")[: 2 if folder.startswith("stg_trt/") else 1]) for folder in folders}
    assert tops - {"stg_trt"} == {part for part in MAY_IMPORT if not part.endswith(".py")}


def test_programs_meet_the_library_in_few_places() -> None:
    assert importers("stg_trt", *PROGRAMS) == LAZY_BORDERS
    for program in PROGRAMS:
        # One process per backend compares engines: the second program of its folder.
        started = {f"{program}/__main__.py", f"{program}/engine_comparison.py"}
        assert importers(program, "stg_trt.cli") == started & {*sources(program)}


def test_one_module_imports_tensorrt() -> None:
    statements = {path for folder in PRODUCT for path in importers(folder, "tensorrt", "tensorrt_rtx")}
    dynamic = {
        path
        for path in sources(*PRODUCT)
        if re.search(r"""import\w*\(\s*f?["']tensorrt""", text(path))
        or ("tensorrt_rtx" in text(path) and any(name in text(path) for name in DYNAMIC_IMPORTS))
    }
    assert statements | dynamic <= {TENSORRT_BOUNDARY}
    assert "tensorrt_rtx" in text(TENSORRT_BOUNDARY)


def test_importing_the_library_loads_nothing_heavy() -> None:
    heavy = ("tensorrt", "tensorrt_rtx", "onnx", "onnxruntime", "torch", "diffusers", "transformers", "numpy")
    program = f"import sys, stg_trt; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("word", "source", "named"),
    [
        ("wan", "WanPipeline", True),
        ("wan", '"wan2.1-t2v-14b"', True),
        ("wan", "AutoencoderKLWan", True),
        ("wan", "what is wanted", False),
        ("ltx", "ltx_video", True),
        ("ltx", "LTXPipeline", True),
        ("open_sora", "Open-Sora 1.2", True),
        ("open_sora", "class OpenSora(", True),
        ("open_sora", "open source", False),
    ],
)
def test_a_family_is_seen_where_it_is_named(word: str, source: str, named: bool) -> None:
    assert bool(_named(word).search(source)) == named


def _named(word: str) -> re.Pattern[str]:
    """A family's name in any of its spellings, but not inside a longer word such as wanted."""
    words = word.split("_")
    spelt = [words, [one.capitalize() for one in words], [one.upper() for one in words]]
    return re.compile(f"({'|'.join('[-_ ]?'.join(one) for one in spelt)})(?![a-z])")


def test_a_family_is_named_in_its_own_file_and_the_table_only() -> None:
    for module, _ in families._FAMILIES.values():
        word = module.removesuffix("_video")
        pattern = _named(word)
        named = {
            path
            for path in sources("stg_trt", "build_engines", "runtime")
            if pattern.search(path) or pattern.search(text(path))
        }
        folder = "stg_trt/models/families"
        # A later model has the name in its own: ltx2.
        own = re.compile(rf"{module}_|{word}\d")
        named -= {path for path in sources(folder) if own.match(Path(path).stem)}
        assert named == {f"{folder}/{module}.py", f"{folder}/__init__.py"}


def test_every_published_configuration_is_of_a_known_family() -> None:
    for name in published():
        assert Checkpoint.open(name, random_weights=True).family.name


def test_names_are_nouns_of_the_house() -> None:
    words = {path: set(Path(path).stem.split("_")) for path in sources(*PRODUCT, "tests")}
    assert not [path for path, found in words.items() if found & FORBIDDEN_NOUNS]


def test_modules_and_functions_are_short() -> None:
    modules = {path: len(text(path).splitlines()) for path in sources(*PRODUCT, "tests")}
    assert not {path: lines for path, lines in modules.items() if lines > MAX_MODULE_LINES}
    functions = {
        f"{path}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in modules
        for node in ast.walk(ast.parse(text(path)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: lines for name, lines in functions.items() if lines > MAX_FUNCTION_LINES}


def test_nothing_is_left_for_later() -> None:
    marks = re.compile(r"\b(TO[D]O|FIX[M]E)\b")
    assert not [path for path in sources(*PRODUCT, "tests", "examples") if marks.search(text(path))]


def test_modules_have_docstrings() -> None:
    assert not [path for path in sources(*PRODUCT) if not ast.get_docstring(ast.parse(text(path)))]


def test_public_names_have_docstrings() -> None:
    without = [
        f"{path}: {name}"
        for path in sources(*PRODUCT)
        if "__main__" not in path
        for name, docstring in public_docstrings(module_of(path))
        if not docstring
    ]
    assert not without


def module_of(path: str) -> ModuleType:
    dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return importlib.import_module(dotted if dotted.startswith("stg_trt") else f"stg_trt.{dotted}")


def public_docstrings(module: ModuleType) -> Iterator[tuple[str, str | None]]:
    """Of classes, functions, methods and properties that a module defines; overrides inherit theirs."""
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing):
            yield name, inspect.getdoc(thing)
        if inspect.isclass(thing):
            # A dataclass without a docstring is given its signature.
            docstring = thing.__doc__ or ""
            yield name, None if docstring.startswith(f"{name}(") else docstring
            for method, member in vars(thing).items():
                if not method.startswith("_") and isinstance(member, METHODS):
                    yield f"{name}.{method}", inspect.getdoc(getattr(thing, method))
