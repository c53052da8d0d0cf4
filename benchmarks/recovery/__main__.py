"""The command line.

    python -m benchmarks.recovery [--only NAME ...] [--report] [--every STEPS] [--folder FOLDER]

Trains what has no record yet, one after another, and prints how the recovered runs ended. A run that was interrupted
goes on with the next one that is missing.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import show
from benchmarks.recovery.divergences import ALL, measured

_RECORDS = Path(__file__).with_name("records")
_WITHIN = 0.01
_WANTED = ("rate", "shock")
_COLUMNS = {
    "what": "what", "runs": "runs", "diverged": "diverged", "within 1%": "within", "attempts": "attempts",
    "data to blame": "blamed", "worst": "worst", "beyond its twin": "beyond_twin",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of runs, as rate-dense-0")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--every", type=int, help="of SpikeRecovery, with a folder of its own (default: its default)")
    parser.add_argument("--folder", type=Path, default=_RECORDS, help="of records (default: those of the repository)")
    options = parser.parse_args(arguments)
    keys = {} if options.every is None else {"every": options.every}
    if keys and options.folder == _RECORDS:
        parser.error("records of other keys need a folder of their own: --folder")
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    for divergence in ALL:
        path = options.folder / f"{divergence.name}.json"
        if options.report or path.exists() or (options.only and divergence.name not in options.only):
            continue
        started = time.process_time()
        found = measured(divergence, **keys)
        path.write_text(json.dumps(found | {"seconds": round(time.process_time() - started, 1)}) + "\n")
        print(f"{divergence.name}: {_summary(found)}", flush=True)
    found = [json.loads(path.read_text()) for path in sorted(options.folder.glob("*.json"))]
    show("recovered runs and controls at the lower rate", rows(found), _COLUMNS)


def rows(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each mechanism and model, and the sum of the two mechanisms of which 90% are wanted within 1%."""
    kinds = sorted({f"{item['mechanism']}, {item['family']}" for item in found})
    of_kind = {kind: [item for item in found if f"{item['mechanism']}, {item['family']}" == kind] for kind in kinds}
    of_kind["rate and shock"] = [item for item in found if item["mechanism"] in _WANTED]
    return [_row(kind, items) for kind, items in of_kind.items() if items]


def _row(kind: str, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    diverged = [item for item in items if item["recoveries"]]
    gaps = [_gap(item) for item in diverged]
    return {
        "what": kind,
        "runs": len(items),
        "diverged": len(diverged),
        "within": sum(gap is not None and gap <= _WITHIN for gap in gaps),
        "attempts": sum(len(item["recoveries"]) for item in diverged),
        "blamed": sum(done.get("cause") == "data" for item in diverged for done in item["recoveries"]),
        "beyond_twin": _range([item["loss"] / item["twin"] - 1 for item in diverged if item.get("twin")]),
        "worst": "lost" if None in gaps else f"{max(gap for gap in gaps if gap is not None):+.1%}" if gaps else "",
    }


def _range(gaps: Sequence[float]) -> str:
    return f"{min(gaps):+.1%} to {max(gaps):+.1%}".replace("% to", " to") if gaps else ""


def _gap(item: dict[str, Any]) -> float | None:
    """How far the recovered run ended above its control; None where it did not get there."""
    return None if item["loss"] is None else item["loss"] / item["control"] - 1


def _summary(item: dict[str, Any]) -> str:
    gap, steps = _gap(item), [(done["onset"], done["back_to"]) for done in item["recoveries"]]
    ended = "" if gap is None else f"{item['loss']:.4f}, control {item['control']:.4f}, {gap:+.2%}"
    ended += f", twin {item['twin']:.4f}, {item['loss'] / item['twin'] - 1:+.2%}" if item.get("twin") else ""
    return f"{steps} {item['error'][:80]} {ended}"


if __name__ == "__main__":
    main()
