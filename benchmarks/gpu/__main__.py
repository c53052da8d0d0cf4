"""All that needs a CUDA device, in one command: `python -m benchmarks.gpu --json FILE`, under six minutes.

    python -m benchmarks.gpu --rehearse        on the CPU: Triton's interpreter, small sizes, meaningless figures
    python -m benchmarks.gpu --predict h100    what the plan expects, before anything is measured

Parts run one after another, each in a process of its own with a time limit, and are reported whatever happens to the
others. FILE is written anew after each, so what was measured survives the machine.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import results, wheels
from benchmarks.gpu.processes import run_part

# In order of what is to be known first.
PARTS = {
    "contract": 100,
    "merging": 75,
    "capturing": 60,
    "training": 150,
    "host_merging": 30,
    "graphs": 30,
    "nccl": 60,
}
OPTIONAL = {"forecast": 400}
_BUDGET = 350.0  # seconds of all parts together: what one takes longer, the last ones lack
_ABOUT = ("torch", "triton", "lightning", "transformers", "numpy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print each as it ends, write the file; 1 if a part failed or a target was missed."""
    options = _parser().parse_args(arguments)
    name = "h100" if options.predict or options.rehearse else _device_name()
    wheels.use(options.wheels)
    from benchmarks.gpu import estimates  # imports the package, which may need the wheels

    hardware = options.predict or estimates.hardware_of(name)
    if hardware not in estimates.HARDWARE:
        sys.exit(f"--predict {hardware}: the plan does not know it. Allowed: {', '.join(estimates.HARDWARE)}.")
    setting = {
        "rehearses": options.rehearse,
        "predicts": options.predict is not None,
        "hardware": hardware,
        "folder": options.folder,
    }
    report: dict[str, Any] = {"about": _about(name, options) | {"plan_of": hardware}, "parts": {}, "rows": []}
    limits = {part: seconds for part, seconds in (PARTS | OPTIONAL).items() if part in (options.only or PARTS)}
    if options.forecast:
        limits |= OPTIONAL
    started = time.monotonic()
    for part, limit in limits.items():
        left = _BUDGET - (time.monotonic() - started)
        if part in PARTS and not options.rehearse:
            limit = min(limit, left)
        _run(part, limit, setting, report)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.predict is None:
        print(f"\n{time.monotonic() - started:.0f} s in all")
    missed = [row for row in report["rows"] if row["met"] is False]
    return 1 if missed or any(part["error"] for part in report["parts"].values()) else 0


def _run(part: str, limit: float, setting: dict[str, Any], report: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(dir=setting["folder"]) as folder:
        rows = Path(folder) / "rows"
        seconds, error = 0.0, "no time was left for it"
        if limit > 5:
            seconds, error = run_part(part, setting | {"folder": Path(folder)}, rows, limit)
        found = results.read_rows(rows)
    report["rows"] += found
    report["parts"][part] = {"seconds": round(seconds, 1), "error": error}
    if not setting["predicts"]:
        print(f"\n{part}: {seconds:.0f} s{', FAILED: ' + error if error else ''}")
    if found:
        print(results.table(found), flush=True)


def _device_name() -> str:
    """Asked of the driver's own tool: a process that touched the device could not fork."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        sys.exit("There is no NVIDIA device here. Try --rehearse, or --predict h100.")


def _about(name: str, options: argparse.Namespace) -> dict[str, Any]:
    installed = {item.metadata["Name"].lower(): item.version for item in importlib.metadata.distributions()}
    return {
        "device": "CPU, rehearsal" if options.rehearse else name,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        **{package: installed.get(package) for package in _ABOUT},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rows, written after every part")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small")
    parser.add_argument("--predict", metavar="HARDWARE", help="print what the plan says for h100, h200, a100 ...")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *OPTIONAL], metavar="PART", help="these parts alone")
    parser.add_argument("--forecast", action="store_true", help="also the forecast's test of scale, 6 more minutes")
    parser.add_argument("--wheels", type=Path, default=Path("wheels"), help="folder of wheels for what is missing here")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
