"""Whole processes, in turns: wall time, CPU time of all threads, and the largest resident set."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
_COMMAND = "import sys; sys.argv[0] = 'pretrain-merge'; from pretrain_merge.cli.main import main; main()"

# a process of its own, since the largest resident set of a process begins with that of the one that started it
_STARTER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]), flush=True)
os._exit(min(1, status))
"""


@dataclass(frozen=True)
class Cost:
    """What a process took."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


def timed(folder: Path, rounds: int, mergekit: str | None) -> list[dict[str, Any]]:
    """A row for each candidate: medians, and medians of ratios within a round."""
    places = [str(path) for path in sorted(folder.glob("hf/*"))]
    out = folder / "out"
    candidates: dict[str, list[str]] = {
        "yardstick": ["sh", "-c", f"cat {folder}/hf/*/model.safetensors > /dev/null; dd bs=4M conv=fsync status=none "
                      f"if={places[0]}/model.safetensors of={out}"],
        "import torch": [sys.executable, "-c", "import torch"],
        "safetensors": _command("merge", *places, "--out", str(out)),
        "ckpt": _command("merge", str(folder / "ckpt"), "--out", str(out)),
        "dcp": _command("merge", str(folder / "dcp"), "--out", str(out)),
        "safetensors, 32": _command("merge", *places * 4, "--out", str(out)),
        "export to safetensors": _command("export", places[0], "--to", "safetensors", "--out", str(out)),
        "export to ckpt": _command("export", places[0], "--to", "ckpt", "--base", str(folder / "ckpt/step=100.ckpt"),
                                   "--out", str(out)),
    }  # fmt: skip
    if mergekit:
        models = [{"model": place, "parameters": {"weight": 1.0}} for place in places]
        plan = {"merge_method": "linear", "dtype": "bfloat16", "models": models}
        (folder / "linear.yaml").write_text(json.dumps(plan))
        candidates["mergekit"] = [mergekit, str(folder / "linear.yaml"), str(out), "--no-copy-tokenizer"]
    costs: dict[str, list[Cost]] = {what: [] for what in candidates}
    for _ in range(rounds):
        for what, command in candidates.items():
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True) if not out.is_dir() else None
            costs[what].append(_cost(command))
    rows = []
    for what, of_rounds in costs.items():
        median = {key: statistics.median(asdict(cost)[key] for cost in of_rounds) for key in asdict(of_rounds[0])}
        ratios = {
            f"of_{word}": statistics.median(
                own.seconds / unit.seconds for own, unit in zip(of_rounds, costs[of], strict=True)
            )
            for word, of in (("yardstick", "yardstick"), ("import", "import torch"), ("safetensors", "safetensors"))
        }
        rows.append({"what": what, **median, **ratios})
    return rows


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", _COMMAND, *arguments]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def _cost(command: Sequence[str]) -> Cost:
    done = subprocess.run([sys.executable, "-I", "-c", _STARTER, *command], capture_output=True, env=_environment())
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.decode()[-2000:]}")
    return Cost(*json.loads(done.stdout))
