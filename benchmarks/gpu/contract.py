"""(a) The kernel's contract on the device: the tests that every backend must pass, in several processes.

Most of their time is Triton's compiler, which works on one core for each.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.results import Report
from benchmarks.gpu.setting import Setting

_ROOT = Path(__file__).resolve().parents[2]
_FILES = ["tests/kernels/test_contract.py", "tests/kernels/test_spread.py"]
# Not the project's own pytest options: those ask for plugins that the machine may lack.
_OPTIONS = ["-c", os.devnull, "--rootdir", str(_ROOT), "--import-mode=importlib", "-p", "no:cacheprovider", "-q"]
_CHOICE = ["-p", "benchmarks.gpu.share_of_tests", "-k", "cuda"]
# NumPy, which interprets the kernel in a rehearsal, warns of overflow.
_COMMAND = [sys.executable, "-W", "ignore", "-m", "pytest", *_OPTIONS, *_CHOICE]


def measure(setting: Setting, report: Report) -> None:
    if setting.predicts:
        return
    num_processes = setting.sized(max(1, min(8, (os.cpu_count() or 1) // 2)), 1)
    running = [_start(number, num_processes, setting) for number in range(num_processes)]
    counts = {"passed": 0, "failed": 0, "skipped": 0, "error": 0}
    said = ""
    for process in running:
        printed = process.communicate()[0]
        for name in counts:
            found = re.search(rf"(\d+) {name}", printed)
            counts[name] += int(found[1]) if found else 0
        if process.returncode:
            said = said or printed[-4000:]
    report("contract tests passed", "", counts["passed"], at_least=setting.sized(100, 4))
    report("contract tests failed", "", counts["failed"] + counts["error"] + counts["skipped"], at_most=0)
    if said:
        raise RuntimeError(said)


def _start(number: int, num_processes: int, setting: Setting) -> subprocess.Popen[str]:
    # of a rehearsal a thirtieth: the interpreter takes a second for each
    share = f"{number}/{setting.sized(num_processes, 30)}"
    path = os.pathsep.join([str(_ROOT), str(_ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"SHARE_OF_TESTS": share, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*_COMMAND, *_FILES], cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
