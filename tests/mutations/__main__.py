"""Seeded faults: breaks the package in one place at a time and asks whether the named tests notice.

`python -m tests.mutations` runs each fault of `catalogue` in a copy of the repository and then, unbroken, every test
that noticed one. Exits with 1 if a fault was not caught.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.mutations.catalogue import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
_COPIED = (
    "pretrain_merge", "tests", "benchmarks", "examples", "docs", "README.md", "CONTRIBUTING.md", "Makefile",
    "constraints.txt", "pyproject.toml",
)  # fmt: skip
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?::.+?)(?: - .*)?$", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the faults whose description contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if arguments.only in fault.what]
    for fault in faults:
        fault.check(ROOT)
    import_what_is_slow()
    noticed: set[str] = set()
    num_caught = 0
    for fault, code, output in run_all(faults, arguments.jobs):
        failed = _FAILED.findall(output)
        # pytest exits with 1 for failed tests, and freed memory ends it by a signal; anything else proves nothing
        is_noticed = (code == 1 and bool(failed)) or code in (-signal.SIGSEGV, -signal.SIGABRT)
        num_caught += report(fault.what, is_noticed, "caught", f"NOT CAUGHT (exit code {code})")
        noticed.update(failed)
    # a full disk fails tests too: what failed for a fault must pass without one
    whole = not noticed or unbroken_passes("unbroken", sorted(noticed))
    print(f"{num_caught} of {len(faults)} faults caught")
    return 0 if whole and num_caught == len(faults) else 1


def import_what_is_slow() -> None:
    """So that the forked tests begin behind it. Nothing of the package, which is another one in each fork."""
    import lightning.pytorch
    import pytest  # noqa: F401
    import scipy.stats
    import torch

    del lightning, scipy
    torch.set_num_threads(1)


def unbroken_passes(what: str, tests: list[str]) -> bool:
    [(_, code, output)] = run_all([None], 1, tests)
    if not report(what, code == 0, "pass", "FAIL"):
        print(output[-3000:])
    return code == 0


def run_all(
    faults: Sequence[Fault | None], jobs: int, tests: Sequence[str] = ()
) -> Iterator[tuple[Fault | None, int, str]]:
    """The exit code and output of pytest for each fault, as they end, `jobs` of them at a time; None breaks nothing."""
    waiting, running = list(faults), {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                fault, copy = waiting.pop(0), Path(tempfile.mkdtemp(dir=folder))
                copy_repository(copy)
                if fault is not None:
                    fault.break_(copy)
                running[fork_tests(copy, tests or fault.tests.split())] = fault, copy
            pid, status = os.wait()
            fault, copy = running.pop(pid)
            output = (copy / "output").read_text(encoding="utf-8", errors="replace")
            shutil.rmtree(copy, ignore_errors=True)  # what a test left running may still write there
            yield fault, os.waitstatus_to_exitcode(status), output


def copy_repository(copy: Path) -> None:
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)


def fork_tests(copy: Path, tests: Sequence[str]) -> int:
    """A process of pytest on a copy; it imports the package of that copy, and so do the processes that it starts."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70  # of no exit of pytest
    try:
        output = os.open(copy / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(copy)
        os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        # what `python -m` put in front, and this package, are of the unbroken repository
        sys.path[0] = str(copy)
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        import pytest

        # what Lightning imports has a plugin for pytest, which comes too late to rewrite it
        options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        code = pytest.main([*options, *tests])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def report(what: str, good: bool, yes: str, no: str) -> bool:
    print(f"{yes if good else no:>10}  {what}", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
