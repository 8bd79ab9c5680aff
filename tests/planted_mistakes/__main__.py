"""`make mistakes`: plants every mistake in a copy of the checkout, and says which ones no test noticed."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.planted_mistakes import MISTAKES
from tests.planted_mistakes.checkout import Checkout
from tests.planted_mistakes.mistake import Mistake

# How pytest ends when a test has failed, and when none has.
_FAILED, _PASSED = 1, 0


def main() -> None:
    """Exit status 1 where a mistake was not caught, or a test fails without one."""
    options = parse_options()
    chosen = [mistake for mistake in MISTAKES if options.only in f"{mistake.file}: {mistake.name}"]
    with tempfile.TemporaryDirectory() as folder:
        copies: SimpleQueue[Checkout] = SimpleQueue()
        for number in range(options.processes):
            copies.put(Checkout(Path(folder) / str(number)))
        check_tests(copies, chosen)
        with ThreadPoolExecutor(options.processes) as threads:
            caught = list(threads.map(lambda mistake: is_caught(mistake, copies), chosen))
        for _ in range(options.processes):
            copies.get().close()
    print(f"{sum(caught)} of {len(chosen)} mistakes caught")
    sys.exit(0 if chosen and all(caught) else 1)


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Plant mistakes and run the tests that must notice them.")
    parser.add_argument("--only", default="", help="those with this text in their file or name")
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args()


def check_tests(copies: SimpleQueue[Checkout], mistakes: Sequence[Mistake]) -> None:
    """Ends the program unless all tests pass where nothing is planted: else a failure would mean nothing."""
    copy = copies.get()
    tests = sorted({test for mistake in mistakes for test in mistake.tests})
    status, printed = copy.run_tests(*tests)
    copies.put(copy)
    if status != _PASSED:
        sys.exit(f"{printed}\nexpected these tests to pass without a mistake, got exit status {status}")


def is_caught(mistake: Mistake, copies: SimpleQueue[Checkout]) -> bool:
    """Whether a test fails with the mistake."""
    copy, start = copies.get(), time.monotonic()
    with mistake.planted(copy.root):
        status, printed = copy.run_tests(*mistake.tests)
    copies.put(copy)
    answer = {_FAILED: "caught", _PASSED: "NOT CAUGHT"}.get(status, f"NO ANSWER ({status})\n{printed}")
    print(f"{mistake.file}: {mistake.name}: {answer}, {time.monotonic() - start:.0f} s", flush=True)
    return status == _FAILED


if __name__ == "__main__":
    main()
