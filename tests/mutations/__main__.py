"""Seeded faults: breaks the package in one place at a time and asks whether the named tests notice.

`python -m tests.mutations` runs the unbroken tests first and last, and every fault of `catalogue.py` in between, each
in a copy of the repository. Exits with 1 if a fault was not caught.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutations.catalogue import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
_COPIED = ("pretrain_merge", "tests", "benchmarks", "examples", "pyproject.toml")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the faults whose description contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if arguments.only in fault.what]
    for fault in faults:
        fault.check(ROOT)
    tests = sorted({test for fault in faults for test in fault.tests.split()})
    code, output = run_tests(None, tests)
    if not report("unbroken, first", code == 0, "pass", "FAIL"):
        print(output[-3000:])
        return 1
    with ThreadPoolExecutor(arguments.jobs) as pool:
        caught = list(pool.map(is_caught, faults))
    whole = report("unbroken, last", run_tests(None, tests)[0] == 0, "pass", "FAIL")
    print(f"{sum(caught)} of {len(faults)} faults caught")
    return 0 if whole and all(caught) else 1


def is_caught(fault: Fault) -> bool:
    """Whether a test notices; said at once, since the whole list takes a while."""
    code, _ = run_tests(fault, fault.tests.split())
    # pytest exits with 1 for failed tests; anything else is an error of collection or usage, which proves nothing
    return report(fault.what, code == 1, "caught", f"NOT CAUGHT (pytest exit code {code})")


def run_tests(fault: Fault | None, tests: list[str]) -> tuple[int, str]:
    """Exit code and output of pytest on a copy of the repository with one fault in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in _COPIED:
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, ignore=ignored) if source.is_dir() else shutil.copy(source, copy)
        if fault is not None:
            fault.break_(copy)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr


def report(what: str, good: bool, yes: str, no: str) -> bool:
    print(f"{yes if good else no:>10}  {what}", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
