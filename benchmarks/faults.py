"""Breaks runs in many ways and compares what they end with, bit for bit, with a run that nothing happened to.

    python -m benchmarks.faults [--json FILE] [--quick] [--kills N] [--terms N] [--full-disks N] [--corruptions N]

A run trains in a child process. It is killed (SIGKILL) at random moments and before or after random calls of a save, a
merge or a checkpoint, and resumed from the newest or an older checkpoint until it ends. The same with SIGTERM, with a
limit on the size of files that stands for a full disk, and with random bytes changed in its files. Exits with 1 where
anything differs or a file cannot be explained.
"""

import argparse
import faulthandler
import hashlib
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.measure import machine, show, write_json
from pretrain_merge import ModelMerging, block_mean
from pretrain_merge.callbacks.durable import RunState
from pretrain_merge.errors import CheckpointError, PretrainMergeError
from pretrain_merge.stores import device, streaming

STEPS = 38  # not a step with a checkpoint: Lightning runs no hook of training where a resumed run has no step left
CALLS = ("replace", "rename", "fsync", "crc32", "link", "weighted_sum_", "torch.save", "save_checkpoint", "write_text")
PATIENCE = 120.0  # seconds that a child may take
FAILED = 3
COLUMNS = {
    "what": "what", "times": "times", "runs": "runs", "differences": "differences",
    "unexplained files": "unexplained", "figures": "figures",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is varied between runs."""

    store: str
    average: str
    accumulate: int

    def __str__(self) -> str:
        return f"{self.store}, {self.average}, accumulate {self.accumulate}"


SETTINGS = [
    Setting(store, average, 1 + index % 2)
    for index, (average, store) in enumerate(product(("last", "block"), ("device", "host", "disk")))
]


class _Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        # by the batches that have gone through the loop, which a resumed run counts on: data of the step only (P26)
        seed = 1000 * self.trainer.global_step + index % self.trainer.accumulate_grad_batches
        inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
        return (self.layers(inputs) - 2 * inputs[:, :4]).pow(2).mean()

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self.layers(batch).pow(2).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class _AtStep(pl.Callback):
    """Does something when a step begins."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self._step, self._action = step, action

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:
            self._action()


def _train(folder: Path, setting: Setting, checkpoint: Path | None, callbacks: Sequence[pl.Callback] = ()) -> None:
    merging = ModelMerging(
        window=4, every=3, merge_every=6, views=["sma", "wma", "sma3"], average=setting.average, store=setting.store,
        save={"every": 12, "keep": 2, "at_end": True}, tokens_per_batch=7,
    )  # fmt: skip
    saving = pl.callbacks.ModelCheckpoint(
        dirpath=folder / "checkpoints", every_n_train_steps=5, save_top_k=2, monitor="step", mode="max",
        filename="{step}", enable_version_counter=False,
    )  # fmt: skip
    trainer = pl.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, default_root_dir=folder,
        callbacks=[*callbacks, merging, saving],
        accumulate_grad_batches=setting.accumulate, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=2, val_check_interval=10**6, check_val_every_n_epoch=None, num_sanity_val_steps=0,
    )  # fmt: skip
    model = _Model()
    data = [torch.zeros(4, 8)] * 1000
    trainer.fit(
        model,
        DataLoader(data, batch_size=None),
        DataLoader([torch.full((4, 8), 0.1)] * 3, batch_size=None),
        ckpt_path=checkpoint,
    )
    if trainer.global_step == STEPS:
        torch.save(model.state_dict(), folder / "final.pt")


def _child(work: Callable[[], None], log: Path) -> int:
    """Fork; returns the process. It ends with 0, or with `FAILED` and the error in `log`."""
    process = os.fork()
    if process:
        return process
    code = FAILED
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        faulthandler.disable()
        work()
        code = 0
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        ours = "ours" if isinstance(error, PretrainMergeError) else "other"
        remedy = "remedy" if isinstance(error, CheckpointError) and str(error).count(".") else ""
        log.write_text(f"{ours} {type(error).__name__} {remedy}\n{error}\n{traceback.format_exc()}")
    finally:
        os._exit(code)


def _wait(process: int, kill_after: float | None = None, by: int = signal.SIGKILL) -> int:
    """The wait status of a child, which gets a signal after so many seconds."""
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, by)
    start = time.monotonic()
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return status
        if time.monotonic() - start > PATIENCE:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise TimeoutError(f"a child took more than {PATIENCE:.0f} seconds")
        time.sleep(0.002)


def _places(name: str) -> list[tuple[Any, str]]:
    """Where a call is looked up."""
    if name == "weighted_sum_":
        return [(module, name) for module in (block_mean, device, streaming)]
    place = {
        "replace": (os, "replace"),
        "rename": (os, "rename"),
        "fsync": (os, "fsync"),
        "crc32": (zlib, "crc32"),
        "link": (os, "link"),
        "torch.save": (torch, "save"),
        "save_checkpoint": (pl.strategies.Strategy, "save_checkpoint"),
        "write_text": (Path, "write_text"),
    }[name]
    return [place]


def _signal_in_call(name: str, count: int, before: bool, signum: int) -> None:
    """In the child: the count-th call of something sends a signal to this process, before or after it is made."""
    places, left = _places(name), [count]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            mine = left[0] == 0  # a call may make others
            if mine and before:
                os.kill(os.getpid(), signum)
            result = original(*arguments, **options)
            if mine and not before:
                os.kill(os.getpid(), signum)
            return result

        return call

    for owner, attribute in places:
        setattr(owner, attribute, counted(getattr(owner, attribute)))


@dataclass
class _Bench:
    """A folder for runs, a source of chance, and what nothing happened to, by setting."""

    folder: Path
    chance: random.Random
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.reference: dict[Setting, Path] = {}
        self.outcome: dict[Setting, dict[str, Any]] = {}
        self.details: list[str] = []

    def learn(self, setting: Setting) -> None:
        folder = self.folder / f"reference-{setting.store}-{setting.average}"
        start = time.monotonic()
        status = _wait(_child(lambda: _train(folder, setting, None), self.folder / "error.txt"))
        if status:
            raise RuntimeError((self.folder / "error.txt").read_text())
        self.seconds = max(self.seconds, time.monotonic() - start)
        self.reference[setting] = folder
        self.outcome[setting] = self._end_of(folder)

    def attempt(self, folder: Path, setting: Setting, rng: random.Random, signum: int | None, old: bool = True) -> int:
        """Go on with a run, with a signal at a random moment where there is one; returns the wait status."""
        checkpoint = self.checkpoint(folder, rng if old else None)
        by_call = signum is not None and rng.random() < 0.5
        name, count, before = rng.choice(CALLS), 1 + int(rng.expovariate(0.25)), rng.random() < 0.5

        def work() -> None:
            if by_call and signum is not None:
                _signal_in_call(name, count, before, signum)
            _train(folder, setting, checkpoint)

        process = _child(work, self.folder / "error.txt")
        after = None if by_call or signum is None else rng.uniform(0, self.seconds)
        return _wait(process, after, signum or 0)

    @staticmethod
    def checkpoint(folder: Path, rng: random.Random | None = None) -> Path | None:
        """The newest whole checkpoint, sometimes an older one; Lightning writes them under their final name."""
        paths = sorted((folder / "checkpoints").glob("*.ckpt"), key=_step)
        whole = [path for path in paths if zipfile.is_zipfile(path)]
        if rng is not None and len(whole) > 1 and rng.random() < 0.2:
            return rng.choice(whole[:-1])
        return whole[-1] if whole else None

    def compare(self, folder: Path, setting: Setting) -> list[str]:
        """What of a run's end is not as that of the uninterrupted one."""
        expected, found = self.outcome[setting], self._end_of(folder)
        return [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]

    def unexplained(self, folder: Path, setting: Setting) -> list[str]:
        """Files of an ended run that nothing needs."""
        reference = self.reference[setting]
        known = {str(path.relative_to(reference)) for path in _files(reference)}
        needs_path = folder / "window" / "checkpoints.json"
        needs = json.loads(needs_path.read_text()) if needs_path.exists() else {}
        known |= {f"window/{name}" for all_needs in needs.values() for names in all_needs for name in names}
        earlier = re.compile(
            r"merges\.\d+\.jsonl|merged\.\d+/.*|checkpoints/step=\d+\.ckpt|window/(lock|checkpoints\.json)"
        )
        names = [str(path.relative_to(folder)) for path in _files(folder)]
        gone = [path for path in needs if not Path(path).exists()]
        return [
            name for name in names if (name not in known and not earlier.fullmatch(name)) or name.endswith(".tmp")
        ] + gone

    def _end_of(self, folder: Path) -> dict[str, Any]:
        """In a child, for the parent runs no torch: everything that is compared, as plain values."""
        out = self.folder / "end.json"
        out.unlink(missing_ok=True)
        status = _wait(_child(lambda: out.write_text(json.dumps(_summary(folder))), self.folder / "error.txt"))
        if status:
            raise RuntimeError((self.folder / "error.txt").read_text())
        return dict(json.loads(out.read_text()))


def _summary(folder: Path) -> dict[str, Any]:
    def digest(tensors: dict[str, Tensor]) -> str:
        parts = [
            f"{name} {t.dtype} {tuple(t.shape)}".encode() + t.numpy().tobytes() for name, t in sorted(tensors.items())
        ]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    found: dict[str, Any] = {"weights": digest(torch.load(folder / "final.pt"))}
    for path in sorted((folder / "merged").glob("*/model.safetensors")):
        found[str(path.relative_to(folder))] = digest(load_file(path))
    for line in (folder / "merges.jsonl").read_text().splitlines():
        record = json.loads(line)
        record.pop("timing")
        key = f"record {record['step']}"
        found[key] = [*found.get(key, []), record]  # a step that appears twice differs
    newest = max((folder / "checkpoints").glob("*.ckpt"), key=_step)
    state = torch.load(newest)["callbacks"]
    ours = next(value for key, value in state.items() if key.startswith("ModelMerging"))
    found["manifest"] = RunState.from_plain(ours).window
    return found


def _step(path: Path) -> int:
    return int(path.stem.partition("=")[2])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _break_often(bench: _Bench, signum: int, times: int) -> Iterator[dict[str, Any]]:
    what = signal.Signals(signum).name
    done: Counter[Setting] = Counter()
    for setting in SETTINGS:
        counts: Counter[str] = Counter()
        wanted = times // len(SETTINGS) + (SETTINGS.index(setting) < times % len(SETTINGS))
        while done[setting] < wanted:
            folder = bench.folder / "run"
            shutil.rmtree(folder, ignore_errors=True)
            for _ in range(12):  # then it may end
                status = bench.attempt(folder, setting, bench.chance, signum if done[setting] < wanted else None)
                if _was_broken(status, signum, bench.folder / "error.txt"):
                    done[setting] += 1
                elif status:
                    counts["differences"] += 1
                    bench.details.append(f"{what}, {setting}: {(bench.folder / 'error.txt').read_text()}")
                    break
                else:
                    break
            else:
                if bench.attempt(folder, setting, bench.chance, None, old=False):
                    counts["differences"] += 1
                    bench.details.append(f"{what}, {setting}: {(bench.folder / 'error.txt').read_text()}")
            counts["runs"] += 1
            if (folder / "final.pt").exists():
                _judge(bench, folder, setting, counts, f"{what}, {setting}", gap=signum == signal.SIGTERM)
        yield _row(f"{what}: {setting}", done[setting], counts)


def _was_broken(status: int, signum: int, log: Path) -> bool:
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == signum
    return signum == signal.SIGTERM and bool(status) and log.read_text().startswith("other SIGTERMException")


def _judge(bench: _Bench, folder: Path, setting: Setting, counts: Counter[str], what: str, gap: bool = False) -> None:
    differences = bench.compare(folder, setting)
    found = bench._end_of(folder)
    absent = [key for key in differences if gap and key.startswith("record ") and key not in found]
    counts["merge not repeated"] += len(absent)
    wrong = [key for key in differences if key not in absent]
    files = bench.unexplained(folder, setting)
    counts["differences"] += bool(wrong)
    counts["unexplained"] += len(files)
    if wrong or files:
        bench.details.append(f"{what}: differs in {sorted(wrong)}, unexplained {files}")


def _fill_disk(bench: _Bench, times: int) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for index in range(times):
        setting, folder = SETTINGS[index % len(SETTINGS)], bench.folder / "run"
        shutil.rmtree(folder, ignore_errors=True)
        step, size = bench.chance.randrange(STEPS - 5), bench.chance.randrange(1, 1200)

        def fill(size: int = size) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        log = bench.folder / "error.txt"
        status = _wait(_child(lambda: _train(folder, setting, None, [_AtStep(step, fill)]), log))  # noqa: B023
        head = log.read_text() if status else ""
        if "in _atomic_save" in head:  # Lightning's own checkpoint was the first file too large
            counts["Lightning's own file"] += 1
        else:
            counts["our error" if head.startswith("ours CheckpointError remedy") else "no error of ours"] += 1
        if "in _atomic_save" not in head and not head.startswith("ours CheckpointError remedy"):
            counts["differences"] += 1
            bench.details.append(f"full disk at step {step}, {size} bytes, {setting}: {head or 'no error'}")
        for path in folder.glob("merged/step-*"):
            whole = {str(p.relative_to(path)) for p in _files(path)} >= {"model.safetensors", "provenance.json"}
            counts["differences"] += not whole
        counts["runs"] += 1
        if bench.attempt(folder, setting, bench.chance, None, old=False):
            counts["differences"] += 1
            bench.details.append(f"after a full disk, {setting}: {log.read_text()}")
        else:
            _judge(bench, folder, setting, counts, f"full disk at step {step}, {size} bytes, {setting}")
    return _row("full disk", times, counts)


def _corrupt(bench: _Bench, times: int) -> Iterator[dict[str, Any]]:
    for setting in SETTINGS:
        wanted = times // len(SETTINGS) + (SETTINGS.index(setting) < times % len(SETTINGS))
        folder, backup = bench.folder / "run", bench.folder / "backup"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(backup, ignore_errors=True)

        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        _wait(_child(lambda: _train(folder, setting, None, [_AtStep(28, die)]), bench.folder / "error.txt"))  # noqa: B023
        folder.rename(backup)
        counts: Counter[str] = Counter()
        for _ in range(wanted):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(backup, folder)
            _corrupt_once(bench, folder, setting, counts)
        yield _row(f"corruption: {setting}", wanted, counts)


def _corrupt_once(bench: _Bench, folder: Path, setting: Setting, counts: Counter[str]) -> None:
    checkpoint = bench.checkpoint(folder)
    assert checkpoint is not None
    files = [*sorted((folder / "window").glob("*-*-*.*")), folder / "window" / "checkpoints.json", checkpoint]
    path = bench.chance.choice([*files, checkpoint])
    content = bytearray(path.read_bytes())
    if bench.chance.random() < 0.2:
        del content[bench.chance.randrange(len(content)) :]
    else:
        for _ in range(bench.chance.randint(1, 4)):
            content[bench.chance.randrange(len(content))] ^= bench.chance.randint(1, 255)
    path.write_bytes(content)
    counts["runs"] += 1
    log = bench.folder / "error.txt"
    status = _wait(_child(lambda: _train(folder, setting, checkpoint), log))
    if status:
        head = log.read_text()
        ours = head.startswith("ours")
        counts["detected by us" if ours else "detected by torch or Lightning"] += 1
        if not ours and path != checkpoint:
            counts["differences"] += 1
            bench.details.append(f"corruption of {path.name}, {setting}: {head}")
        return
    differences = bench.compare(folder, setting)
    if not differences:
        counts["harmless"] += 1
    elif path == checkpoint and _checksum_fails(bytes(content), bench.folder):
        counts["torch ignores the zip's checksum"] += 1  # its own tensors and counters
    else:
        counts["differences"] += 1
        bench.details.append(f"corruption of {path.name}, {setting}: differs in {sorted(differences)}")


def _checksum_fails(content: bytes, folder: Path) -> bool:
    path = folder / "corrupted.zip"
    path.write_bytes(content)
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is not None
    except Exception:
        return True


def _row(what: str, times: int, counts: Counter[str]) -> dict[str, Any]:
    figures = {key: n for key, n in sorted(counts.items()) if key not in ("runs", "differences", "unexplained") and n}
    return {
        "what": what,
        "times": times,
        "runs": counts["runs"],
        "differences": counts["differences"],
        "unexplained": counts["unexplained"],
        "figures": ", ".join(f"{n} {key}" for key, n in figures.items()),
        **{key.replace(" ", "_"): n for key, n in figures.items()},
    }


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Break runs, print the counts, write JSON; returns the rows."""
    options = _parser().parse_args(arguments)
    few = {"kills": 6, "terms": 6, "full_disks": 3, "corruptions": 6}
    many = {"kills": 200, "terms": 50, "full_disks": 24, "corruptions": 200}
    for name, default in (few if options.quick else many).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    torch.set_num_threads(1)  # before any fork: threads do not live on in a child
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "pretrain_merge"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = _Bench(Path(folder), random.Random(options.seed))
        for setting in SETTINGS:
            bench.learn(setting)
        rows = [
            *_break_often(bench, signal.SIGKILL, options.kills),
            *_break_often(bench, signal.SIGTERM, options.terms),
        ]
        rows += [_fill_disk(bench, options.full_disks), *_corrupt(bench, options.corruptions)]
    extra = {"machine": machine(torch.device("cpu")), "torch": torch.__version__, "seed": options.seed}
    rows = [row | extra for row in rows]
    show(f"{time.monotonic() - start:.0f} s, seed {options.seed}", rows, COLUMNS)
    for detail in bench.details:
        print(detail)
    write_json(options.json, rows)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows as one JSON list")
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--kills", type=int, help="SIGKILLs, over all settings (default: 200)")
    parser.add_argument("--terms", type=int, help="SIGTERMs (default: 50)")
    parser.add_argument("--full-disks", type=int, help="times that the disk fills up (default: 24)")
    parser.add_argument("--corruptions", type=int, help="files that are damaged (default: 200)")
    parser.add_argument("--folder", type=Path, help="where runs go (default: the system's temporary folder)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(any(row["differences"] or row["unexplained"] for row in main()))
