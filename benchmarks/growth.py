"""What must not cost more the longer a run is: time, files and bytes at growing sizes, beside what they may be.

    python -m benchmarks.growth [--json FILE] [--quick]

Models are tiny, so that what is left is the book-keeping: of windows, files, records and forecasts. "Before" is what
the version of the first release took at that size, on an idle two-core machine. A step on which nothing is due is in
`benchmarks.overhead` ("µs idle").
"""

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.measure import chosen_device, machine, new_parser, show, write_json
from pretrain_merge import RollingMerger, coefficients
from pretrain_merge.cli.report import report
from pretrain_merge.forecast import RunHistory, forecast_of
from pretrain_merge.records import MergeRecord, Recipe, append_record, keep_records_until
from pretrain_merge.resume.sidecar import WindowFolder

COLUMNS = {
    "what": "what",
    "at": "size",
    "of": "of",
    "measured": "measured",
    "unit": "unit",
    "before": "before",
    "at most": "at_most",
}
SPANS = (3, 5, 10)  # snapshots in the means that a forecast reads
EVERY = 1000


class Figure(NamedTuple):
    """One number, and what it was and may be."""

    what: str
    size: int
    of: str
    measured: float
    unit: str
    before: str
    at_most: str


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table, write JSON; returns the rows."""
    parser = new_parser("growth", __doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes only: the figures mean nothing")
    options = parser.parse_args(arguments)
    device = chosen_device(options)
    common = {"machine": machine(device), "torch": torch.__version__, "elements": _numel(_model())}
    print(f"{common['machine']}; torch {common['torch']}")
    rows = [common | figure._asdict() for part in _PARTS for figure in part(options.quick)]
    show("Cost of book-keeping at growing sizes", rows, COLUMNS)
    write_json(options.json, rows)
    return rows


def _captures(quick: bool) -> Iterator[Figure]:
    sizes = {10: "0.6", 100: "8"} if quick else {10: "0.6", 1000: "83", 10_000: "24,000"}
    for size, before in sizes.items():
        with tempfile.TemporaryDirectory() as folder:
            model = _model()
            merger = _full_window(model, size)
            start = time.perf_counter()
            merger.manifest(model, Path(folder))
            saving = time.perf_counter() - start
            seconds = _each(100, lambda step, m=merger, model=model, n=size: m.observe(model, n + 1 + step))
        yield Figure("capture after a checkpoint", size, "snapshots", 1e3 * seconds, "ms", before, "flat")
        if size <= 1000:
            most = "3" if size == 1000 else ""
            yield Figure("first durable window", size, "snapshots", saving, "s", "25" if size == 1000 else "", most)


def _open_files(quick: bool) -> Iterator[Figure]:
    for size in (10, 50) if quick else (10, 1000):
        with tempfile.TemporaryDirectory() as folder:
            before = len(os.listdir("/proc/self/fd"))
            merger = _full_window(_model(), size, store="disk", store_folder=folder)
            num_open = len(os.listdir("/proc/self/fd")) - before
            merger.close()
        yield Figure("disk store: open files", size, "snapshots", num_open, "files", str(size + 7), "64")


def _forecasts(quick: bool) -> Iterator[Figure]:
    sizes = {100: "", 300: ""} if quick else {1000: "60", 20_000: "2,000", 100_000: "> 100,000"}
    for size, before in sizes.items():
        history = RunHistory("val_loss")
        for record in _records(size):
            history.append(record)

        def merge_point(step: int, history: RunHistory = history, size: int = size) -> None:
            history.append(next(_records(size + step + 1, first=size + step + 1)))
            _forecast(history, size)

        seconds = _each(20, merge_point)
        yield Figure("one forecast at a merge", size, "merges", 1e3 * seconds, "ms", before, "5")


def _forecast(history: RunHistory, size: int) -> None:
    forecast_of(
        history.now(),
        steps=max(3, size // 20) * EVERY,
        shape="linear",
        kind="forecast",
        metric="val_loss",
        coverage=0.9,
        calibration=None,
    )


def _resumes(quick: bool) -> Iterator[Figure]:
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.growth"])
    for size in (100, 1000) if quick else (10_000, 100_000):
        is_last = size == 100_000
        with tempfile.TemporaryDirectory() as folder:
            path = _written(Path(folder), size)
            with context.Pool(1) as pool:  # a process of its own: what it takes is seen from outside
                seconds, megabytes = pool.apply(_resumed, (path, size))
        yield Figure("resume: read and cut records", size, "records", seconds, "CPU s", "56" if is_last else "", "5")
        yield Figure("resume: memory", size, "records", megabytes, "MB", "540" if is_last else "", "100")


def _resumed(path: Path, size: int) -> tuple[float, float]:
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports, which would hide this one
    before = _peak_megabytes()
    history = RunHistory("val_loss")
    start = time.process_time()  # of computing: nothing waits for the disk here
    keep_records_until(path, (size - 1) * EVERY, read=history.append)
    seconds = time.process_time() - start
    return seconds, _peak_megabytes() - before


def _peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def _reports(quick: bool) -> Iterator[Figure]:
    for size in (100, 200) if quick else (1000, 20_000):
        is_last = size == 20_000
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()) as printed:
            _written(Path(folder), size)
            start = time.perf_counter()
            report([Path(folder)])
            seconds = time.perf_counter() - start
        num_lines = printed.getvalue().count("\n")
        yield Figure("report", size, "merges", seconds, "s", "217" if is_last else "", "5")
        yield Figure("report: lines", size, "merges", num_lines, "lines", "20,004" if is_last else "", "a screen")


def _coefficients(quick: bool) -> Iterator[Figure]:
    for size in (100, 300) if quick else (300, 3000):
        for kind, parameters in (("ema", {"alpha": 0.2}), ("qam", {"shape": "cosine"})):

            def merge(step: int, kind: str = kind, size: int = size, parameters: Any = parameters) -> None:
                coefficients.compute(kind, size, times=range(10 * step, 10 * (step + size), 10), **parameters)

            merge(0)  # of a window that has changed
            seconds = _each(10, merge)
            before = "400" if size == 3000 else ""
            yield Figure(f"coefficients of {kind}", size, "snapshots", 1e3 * seconds, "ms", before, "once per change")


def _checkpoints(quick: bool) -> Iterator[Figure]:
    for size in (10, 100) if quick else (100, 3000):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            window = WindowFolder(folder)

            def save(step: int, window: WindowFolder = window, folder: Path = folder) -> None:
                held = [f"snapshot-{step - back:08d}-0123abcd.safetensors" for back in range(10)]
                checkpoint = f"../step={step}.ckpt"
                window.register(checkpoint, held)
                window.prune(held, lambda path: "there", thoroughly=False)

            for step in range(10, size):
                save(step)
            written = _bytes_written(folder)
            seconds = _each(20, lambda step, save=save, size=size: save(size + step))
            kilobytes = (_bytes_written(folder) - written) / 20 / 1e3
            window.close()
        is_last = size == 3000
        yield Figure("checkpoint kept", size, "checkpoints", 1e3 * seconds, "ms", "155" if is_last else "", "flat")
        yield Figure(
            "checkpoint kept: written", size, "checkpoints", kilobytes, "kB", "1,400" if is_last else "", "flat"
        )


_PARTS: tuple[Callable[[bool], Iterator[Figure]], ...] = (
    _captures,
    _open_files,
    _forecasts,
    _resumes,
    _reports,
    _coefficients,
    _checkpoints,
)


def _each(number: int, action: Callable[[int], object]) -> float:
    """Seconds of one of a number of calls."""
    start = time.perf_counter()
    for index in range(number):
        action(index)
    return (time.perf_counter() - start) / number


def _model() -> nn.Module:
    return nn.Linear(4, 1)


def _numel(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _full_window(model: nn.Module, size: int, **options: Any) -> RollingMerger:
    merger = RollingMerger(window=size, every=1, **options)
    for step in range(1, size + 1):
        merger.observe(model, step)
    return merger


def _records(last: int, *, first: int = 1) -> Iterator[MergeRecord]:
    """A run whose loss falls, with the means that forecasts read."""
    for index in range(first, last + 1):
        step = index * EVERY
        counts = [number for number in SPANS if number <= index]
        yield MergeRecord(
            name="merge",
            step=step,
            samples=0,
            tokens=0,
            window=min(index, max(SPANS)),
            spread=0.01,
            raw={"val_loss": 2.1 + 3.0 / index**0.5},
            views={f"sma{number}": {"val_loss": 2.0 + 3.0 / index**0.5 + 0.05 / number} for number in counts},
            recipes={f"sma{number}": _plain_mean(step, number) for number in counts},
            lr=(1e-3,),
        )


def _plain_mean(step: int, number: int) -> Recipe:
    return Recipe(tuple(step - EVERY * back for back in reversed(range(number))), (1 / number,) * number)


def _written(folder: Path, size: int) -> Path:
    path = folder / "merges.jsonl"
    path.write_text("".join(record.to_json() + "\n" for record in _records(size - 1)))
    append_record(path, next(_records(size, first=size)))
    return path


def _bytes_written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("checkpoints.*"))


if __name__ == "__main__":
    main()
