"""How far the times that `pretrain-merge plan` predicts are from those measured, with the rates measured here.

    python -m benchmarks.plan [--json FILE] [--quick] [--snapshots 10] [--folder FOLDER] [--device cuda]

In every round one `copy_` of the model is timed and gives the bandwidth. On a CPU a finite check and a rounding copy of
tensors that stay in the cache give the rates of their arithmetic: what they take beyond a plain copy of as many bytes
there. For the disk store one thread also copies as many bytes, which another writes into a new file; the system holds
some writes up, so the rate is that of the lower quartile. The plan of a one-rank run with these rates predicts a
snapshot, a sample of a block, and a merge of the whole window with raw put back; the same is then done by
`RollingMerger`. For an evaluation, the measured step of a small transformer predicts a forward pass. `ratio` is
measured / predicted, the median of rounds. The last line gives the rates to `pretrain-merge plan`.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import rates
from benchmarks.measure import Action, Timing, chosen_device, interleave, machine, new_parser, show, write_json
from benchmarks.parameters import llama_tensors
from pretrain_merge import RollingMerger
from pretrain_merge.cadence import Quantity
from pretrain_merge.demo.corpus import VOCAB_SIZE
from pretrain_merge.plan import HARDWARE, Layout, Measured, Merging, Model, Question, Training, make_plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = {
    "what": "what",
    "dtype": "dtype",
    "configuration": "configuration",
    "predicted": "predicted_seconds",
    "seconds": "seconds",
    "ratio": "ratio_to_predicted",
    "lowest": "ratio_lowest",
    "highest": "ratio_highest",
}
_EVALUATED = 2048  # tokens of the small transformer's batch
_RATES = ("memory_rate", "file_rate", "check_rate", "rounding_rate")


@dataclass(frozen=True)
class Case:
    """One configuration of the callback."""

    dtype: str
    store: str
    average: str = "last"
    slot_dtype: str | None = None

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of what a snapshot is taken from, and of a slot."""
        live = DTYPES[self.dtype]
        slot = DTYPES[self.slot_dtype] if self.slot_dtype else live
        return torch.float32 if self.average == "block" else live, slot

    def __str__(self) -> str:
        return ", ".join([self.store, self.average, *([self.slot_dtype] if self.slot_dtype else [])])


CASES = (
    Case("float32", "device"),
    Case("bfloat16", "device"),
    Case("float32", "device", slot_dtype="bfloat16"),
    Case("float32", "device", average="block"),
    Case("bfloat16", "device", average="block"),
    Case("float32", "disk"),
    Case("bfloat16", "disk"),
)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print a table, write JSON; returns the rows."""
    options = _parser().parse_args(arguments)
    device = chosen_device(options)
    print(f"{machine(device)}; torch {torch.__version__}")
    rows = []
    for case in CASES:
        if case.store == "disk" and device.type != "cpu":
            continue  # that takes a link, and a disk past the page cache, whose rates are not measured here
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows += _rows_of(case, device, Path(folder), options)
    rows.append(_evaluation(device, options))
    show(f"window of {options.snapshots}, {rows[0]['elements'] / 2**20:.1f} Mi elements", rows, COLUMNS)
    of_float32 = [row for row in rows if row["dtype"] == "float32"]
    print("pretrain-merge plan", *(f"--measured.{name} {rate:.3g}" for name, rate in _medians(of_float32).items()))
    write_json(options.json, rows)
    return rows


class Parameters(nn.Module):
    """A model that is nothing but its parameters."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(tensors.values())


def _rows_of(case: Case, device: torch.device, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    module = Parameters(llama_tensors(DTYPES[case.dtype], device, shrink=32 if options.quick else 1))
    tensors = list(module.parameters())
    operations, close = _operations(case, module, folder, options.snapshots)
    label = f"{case.dtype}, {case}"
    rounds = 3 if options.quick else options.rounds
    if device.type == "cpu":
        operations |= rates.in_cache(*case.dtypes)
    timed = interleave(operations, rates.copy_all(tensors), rounds=rounds, device=device, label=label)
    close()
    measured = rates.rates_of_rounds(timed, _num_bytes(module), *(dtype.itemsize for dtype in case.dtypes))
    about = {"elements": sum(tensor.numel() for tensor in tensors), "rounds": rounds} | _medians(
        list(map(asdict, measured))
    )
    return [
        _row(case, what, timing, _predictions(case, what, tensors, measured, options.snapshots), device, about)
        for what, timing in timed.items()
        if what in ("capture", "sample", "merge")
    ]


def _operations(case: Case, module: nn.Module, folder: Path, num_snapshots: int) -> tuple[dict[str, Action], Action]:
    """What is timed, each on a merger whose window is full, and what frees them."""
    common: dict[str, Any] = {
        "window": num_snapshots,
        "store": case.store,
        "slot_dtype": case.slot_dtype,
        "average": case.average,
    }
    merger = RollingMerger(every=1, store_folder=str(folder / "window"), **common)
    steps = itertools.count(1)
    for _ in range(num_snapshots):
        merger.observe(module, next(steps))

    def capture() -> None:
        merger.observe(module, next(steps))

    def merge() -> None:
        with merger.merged(module, "sma"):
            pass

    if case.store == "disk":

        def settle() -> None:  # not part of what a run waits for
            merger._stored._store._finish()  # type: ignore[union-attr]

        written = rates.into_file(_num_bytes(module), folder / "written")
        return written | {"capture": capture, "settle": settle, "merge": merge}, merger.close
    if case.average == "last":
        return {"capture": capture, "merge": merge}, merger.close
    # within an interval that does not end, every step is a sample
    sampler = RollingMerger(every=10**9, store_folder=str(folder / "samples"), **common)
    sampled = itertools.count(1)
    sampler.observe(module, next(sampled))

    def sample() -> None:
        sampler.observe(module, next(sampled))

    return {"sample": sample, "merge": merge}, lambda: (merger.close(), sampler.close())


def _predictions(
    case: Case, what: str, tensors: Sequence[Tensor], measured: Sequence[Measured], num_snapshots: int
) -> list[float]:
    """Seconds that the plan gives, round by round, with the rates of that round."""
    merging = Merging(
        every=Quantity(1),
        window=num_snapshots,
        views=(num_snapshots,),
        average=case.average,
        store=case.store,
        itemsize=tensors[0].element_size(),
        slot_itemsize=case.dtypes[1].itemsize,
    )
    model = Model("measured", tuple(tuple(tensor.shape) for tensor in tensors), sum(t.numel() for t in tensors))
    predictions = []
    for figures in measured:
        hardware = figures.over(HARDWARE["cpu"])
        question = Question(model, Layout(), hardware, merging, Training(1, 1, step_seconds=1.0))
        # of a capture to the disk only what the run waits for: here there is no training that it could go on beside
        predictions.append(sum(move.seconds for move in make_plan(question).costs[what].moves))
    return predictions


def _medians(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The rates, each over the rows (or rounds) that have it."""
    found = {name: [row[name] for row in rows if row.get(name) is not None] for name in _RATES}
    return {name: statistics.median(values) for name, values in found.items() if values}


def _row(
    case: Case,
    what: str,
    timing: Timing,
    predictions: Sequence[float],
    device: torch.device,
    about: dict[str, Any],
) -> dict[str, Any]:
    ratios = [own / predicted for own, predicted in zip(timing.seconds, predictions, strict=True)]
    return {
        "what": what,
        "dtype": case.dtype,
        "configuration": str(case),
        "predicted_seconds": statistics.median(predictions),
        "seconds": timing.median,
        "ratio_to_predicted": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "machine": machine(device),
        "torch": torch.__version__,
    } | about


def _evaluation(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """A forward pass of a small Llama beside a training step on as many tokens: the plan says a third."""
    import transformers

    width, layers, length = (64, 1, 64) if options.quick else (256, 4, 256)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        use_cache=False,
    )
    model: Any = transformers.LlamaForCausalLM(config).to(device)
    tokens = torch.randint(VOCAB_SIZE, (_EVALUATED // length, length), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate() -> None:
        for _ in range(2):  # raw and one view
            model(input_ids=tokens, labels=tokens)

    rounds = 3 if options.quick else options.rounds
    timing = interleave({"evaluation": evaluate}, step, rounds=rounds, device=device, label="evaluation")["evaluation"]
    elements = sum(parameter.numel() for parameter in model.parameters())
    shapes = Model("measured", ((elements, 1),), elements)
    predictions = []
    for seconds in timing.yardstick:
        training = Training(_EVALUATED, _EVALUATED, step_seconds=seconds)
        question = Question(shapes, Layout(), HARDWARE["cpu"], Merging(Quantity(1)), training)
        predictions.append(make_plan(question).costs["evaluation"].seconds)
    about = {"elements": elements, "rounds": rounds}
    return _row(Case("float32", "device"), "evaluation", timing, predictions, device, about)


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("plan", __doc__)
    parser.add_argument("--quick", action="store_true", help="a thousandth of the model, three rounds")
    parser.add_argument("--snapshots", type=int, default=10, metavar="N")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    return parser


if __name__ == "__main__":
    main()
