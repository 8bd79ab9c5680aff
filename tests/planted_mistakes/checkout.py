"""A copy of the checkout in which mistakes are planted, and a process that runs its tests again and again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("build_engines", "runtime", "benchmarks")
_COMMAND = """#!{python}
import sys
from stg_trt.cli.main import main
sys.exit(main())
"""


class Checkout:
    """The files that git knows, and new ones that it does not ignore."""

    def __init__(self, root: Path) -> None:
        self.root = root
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).exists():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        # The package as a wheel has it: the programs lie inside.
        for program in PROGRAMS:
            (root / "stg_trt" / program).symlink_to(root / program)
        # A file may change twice in a second, which compiled files would not show.
        settings = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        self._runs = subprocess.Popen(
            [_make_environment(root), Path(__file__).with_name("forked_runs.py")],
            cwd=root,
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run_tests(self, *tests: str) -> tuple[int, str]:
        """pytest's exit status, and what it printed; the first failure ends it."""
        assert self._runs.stdin is not None and self._runs.stdout is not None
        print("\0".join(tests), file=self._runs.stdin, flush=True)
        status = int(self._runs.stdout.readline())
        return status, (self.root / "printed").read_text()

    def close(self) -> None:
        """Ends the process."""
        self._runs.communicate()


def _make_environment(root: Path) -> Path:
    """Its Python: the packages of the environment that runs this, but not the checkout installed there."""
    folder = root / ".venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    installed = [place for place in sys.path if Path(place).name == "site-packages"]
    # Files of these places that end in .pth are not read: what is installed there to be edited is not found.
    (site / "checkout.pth").write_text("\n".join([str(root), *installed]))
    command = folder / "bin" / "stg-trt"
    command.write_text(_COMMAND.format(python=python))
    command.chmod(0o755)
    return python
