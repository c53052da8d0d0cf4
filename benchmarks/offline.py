"""Merging checkpoints on disk: whole processes side by side, and kills at random moments.

    python -m benchmarks.offline [--json FILE] [--quick] [--folder FOLDER] [--mergekit COMMAND] [--rounds N] [--kills N]

Eight checkpoints of a 220M Llama in bfloat16 (440 MB each) are written as Hugging Face folders, Lightning checkpoints
and DCP folders; each candidate merges them in a process of its own, in turns. The yardstick is `cat` of the inputs to
nowhere and a synced copy of one: what any merge must move. Files are in the page cache. `seconds` are wall time of
the whole process, `cpu_seconds` those of all its threads, `peak_mib` its largest resident set, imports included. With
`--mergekit` (the path of its `mergekit-yaml`) that merges the same folders by `linear`.

With `--kills` a merge, and a sweep, is killed (SIGKILL) at random moments and run again until it ends: no folder may
look complete and not be, and the bytes must be those of an undisturbed one. Exits with 1 where that fails. `--rounds 0`
times nothing.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from benchmarks.measure import machine, new_parser, show, write_json
from pretrain_merge import merge_checkpoints, sweep_checkpoints

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["benchmarks.offline", "pretrain_merge.offline.sweep", "pretrain_merge.kernels.cpu"])
ROOT = Path(__file__).resolve().parent.parent
_MERGE = "import sys; sys.argv[0] = 'pretrain-merge'; from pretrain_merge.cli.main import main; main()"
_CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
COLUMNS = {
    "what": "what", "seconds": "seconds", "of yardstick": "of_yardstick", "of torch": "of_import",
    "CPU seconds": "cpu_seconds", "peak MiB": "peak_mib",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What a process took."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table, write JSON; returns the rows."""
    options = _parser().parse_args(arguments)
    about = {"machine": machine(torch.device("cpu")), "torch": torch.__version__}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        elements = _write_checkpoints(folder, quick=options.quick)
        rows: list[dict[str, Any]] = []
        if options.rounds:
            rows += [row | about | {"elements": elements} for row in _timed(folder, options)]
            show(f"8 checkpoints of {elements / 1e6:.0f}M parameters, median of {options.rounds}", rows, COLUMNS)
        if options.kills:
            rows += [row | about | {"elements": elements} for row in _killed(folder, options.kills)]
    write_json(options.json, rows)
    return rows


def _timed(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    places = [str(path) for path in sorted(folder.glob("hf/*"))]
    out = folder / "out"
    candidates: dict[str, list[str]] = {
        "yardstick": ["sh", "-c", f"cat {folder}/hf/*/model.safetensors > /dev/null; dd bs=4M conv=fsync status=none "
                      f"if={places[0]}/model.safetensors of={out}"],
        "import torch": [sys.executable, "-c", "import torch"],
        "safetensors": _merge(*places, "--out", str(out)),
        "ckpt": _merge(str(folder / "ckpt"), "--out", str(out)),
        "dcp": _merge(str(folder / "dcp"), "--out", str(out)),
        "safetensors, 32": _merge(*places * 4, "--out", str(out)),
    }  # fmt: skip
    if options.mergekit:
        models = [{"model": place, "parameters": {"weight": 1.0}} for place in places]
        plan = {"merge_method": "linear", "dtype": "bfloat16", "models": models}
        (folder / "linear.yaml").write_text(json.dumps(plan))
        candidates["mergekit"] = [options.mergekit, str(folder / "linear.yaml"), str(out)]
    costs: dict[str, list[Cost]] = {what: [] for what in candidates}
    for _ in range(options.rounds):
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
            for word, of in (("yardstick", "yardstick"), ("import", "import torch"))
        }
        rows.append({"what": what, **median, **ratios})
    return rows


def _killed(folder: Path, num_kills: int) -> list[dict[str, Any]]:
    """Kills at moments that are spread over a whole merge, in shards of a tenth of it, and over a whole sweep."""
    return [_killed_in(job, folder, num_kills) for job in (_merge_once, _sweep_once)]


def _killed_in(job: Callable[[str, str], object], folder: Path, num_kills: int) -> dict[str, Any]:
    """Processes are forked from one that has imported everything, so that most moments are within the work."""
    drawn, name = random.Random(0), job.__name__.strip("_").partition("_")[0]
    out, reference = folder / f"killed-{name}", folder / f"reference-{name}"
    assert _forked(job, folder, reference, after=None) == 0
    start = time.monotonic()
    assert _forked(job, folder, folder / f"timed-{name}", after=None) == 0
    whole = time.monotonic() - start
    expected, num_wrong, num_done, num_killed = _contents(reference), 0, 0, 0
    while num_killed < num_kills:
        code = _forked(job, folder, out, after=drawn.uniform(0.0, 1.1) * whole)
        num_killed += code == -signal.SIGKILL
        num_wrong += code not in (0, -signal.SIGKILL)
        if out.exists():
            num_done += 1
            num_wrong += _contents(out) != expected
            shutil.rmtree(out)
    print(f"{name}: {num_killed} kills, {num_done} ended between them, {num_wrong} wrong")
    if num_wrong:
        sys.exit(1)
    return {"what": f"kills of {name}", "kills": num_killed, "ended": num_done, "wrong": num_wrong}


def _forked(job: Callable[[str, str], object], folder: Path, out: Path, *, after: float | None) -> int:
    """The exit code of a process that does the job, and is killed after so many seconds unless it has ended."""
    process = _SERVER.Process(target=job, args=(str(folder), str(out)))
    process.start()
    process.join(after)
    if process.exitcode is None:
        process.kill()
    process.join()
    return process.exitcode or 0


def _merge_once(folder: str, out: str) -> None:
    size = sum(path.stat().st_size for path in Path(folder, "hf/checkpoint-100").iterdir()) // 10
    merge_checkpoints([Path(folder, "hf")], out, largest_file=size)


def _sweep_once(folder: str, out: str) -> None:
    sweep_checkpoints([Path(folder, "hf")], out, _norm_of, window=4, views=["sma", "sma2"])


def _norm_of(folder: Path) -> dict[str, float]:
    return {"val_loss": load_file(folder / "model.safetensors")["model.norm.weight"].double().square().sum().item()}


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _merge(*arguments: str) -> list[str]:
    return [sys.executable, "-c", _MERGE, "merge", *arguments]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def _cost(command: Sequence[str]) -> Cost:
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_environment())
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed: {said.decode()[-2000:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def _write_checkpoints(folder: Path, *, quick: bool) -> int:
    """Eight neighbours of one model in three formats; returns their number of parameters."""
    base = {name: torch.randn(shape) * 0.02 for name, shape in _shapes(16 if quick else 1)}
    writers: dict[str, Callable[[dict[str, torch.Tensor], Path], None]] = {
        "hf/checkpoint-{}": _hugging_face,
        "ckpt/step={}.ckpt": _lightning,
        "dcp/step-{}": _dcp,
    }
    for step in range(100, 900, 100):
        state = {name: (value + torch.randn_like(value) * 0.002).bfloat16() for name, value in base.items()}
        for pattern, write in writers.items():
            path = folder / pattern.format(step)
            path.parent.mkdir(parents=True, exist_ok=True)
            write(state, path)
    return sum(value.numel() for value in base.values())


def _hugging_face(state: dict[str, torch.Tensor], path: Path) -> None:
    path.mkdir()
    save_file(state, path / "model.safetensors", {"format": "pt"})
    sizes = {"hidden_size": state["model.norm.weight"].numel(), "num_hidden_layers": 12, "vocab_size": 32000}
    (path / "config.json").write_text(json.dumps(_CONFIG | sizes))


def _lightning(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({"state_dict": state, "global_step": int(path.stem[5:]), "pytorch-lightning_version": "2.6.0"}, path)


def _dcp(state: dict[str, torch.Tensor], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(state), checkpoint_id=str(path))


def _shapes(shrink: int) -> list[tuple[str, tuple[int, ...]]]:
    width, inner, words = 1024 // shrink, 2816 // shrink, 32000 // shrink
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (words, width))]
    for layer in range(12):
        names = {f"self_attn.{part}_proj": (width, width) for part in "qkvo"}
        names |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
        shapes += [(f"model.layers.{layer}.{name}.weight", shape) for name, shape in names.items()]
        shapes += [
            (f"model.layers.{layer}.{name}.weight", (width,))
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
    return [*shapes, ("model.norm.weight", (width,)), ("lm_head.weight", (words, width))]


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("offline", __doc__)
    parser.add_argument("--quick", action="store_true", help="a model of 1M parameters, once")
    parser.add_argument("--folder", help="where 11 GB go for a while (default: the system's temporary folder)")
    parser.add_argument("--mergekit", metavar="COMMAND", help="path of mergekit-yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
