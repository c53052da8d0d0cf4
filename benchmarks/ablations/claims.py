"""What the paper says of windows, beside what our runs say: every number and verdict follows from the records."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.ablations.gains import Spread, gain, of_cells
from benchmarks.ablations.records import Result
from benchmarks.ablations.setups import IN_DECAY, INTERVALS

EARLY, LATE = 6, 50  # units: the paper's 204 and 1607 billion tokens
_HOLDS, _FAILS = 0.9, 0.1  # of the runs
_ALIKE = 0.5  # percent of the loss
_ALL = ("sma", "wma", "ema .2", "ema .1")
Test = Callable[[Result], bool]


class Claim(NamedTuple):
    """One sentence of the paper.

    Attributes:
        paper: What it says.
        ours: What is seen here.
        verdict: Whether it holds here.
    """

    paper: str
    ours: str
    verdict: str


def claims(results: Sequence[Result]) -> list[Claim]:
    """All of them; numbers in percent of the raw model's loss, dense and mixture of experts."""

    def seen(units: int, kind: str, part: int, asked: int = 10, *, in_decay: bool = False) -> str:
        """The base's two models."""
        cells = [found for cell in ("dense", "moe") if (found := of_cells(results, cell))]
        spreads = [Spread.of(gain(run, units, kind, part, asked, in_decay=in_decay) for run in runs) for runs in cells]
        return " / ".join(f"{spread.mean:+.1f}" for spread in spreads)

    def alike(run: Result, kinds: Sequence[str], part: int) -> bool:
        found = [gain(run, LATE, kind, part) for kind in kinds]
        return max(found) - min(found) < _ALIKE

    wide = [part for part, tokens in INTERVALS.items() if tokens in ("16B", "32B")]
    decaying = [run for run in results if run.decay]
    return [
        Claim(
            "Merging at constant rate is better than not merging (Figure 1).",
            f"A plain mean of ten, V = 8B: {seen(EARLY, 'sma', 4)}% at 204B, {seen(19, 'sma', 4)}% at 607B, "
            f"{seen(LATE, 'sma', 4)}% at 1607B.",
            f"{_verdict(results, lambda run: gain(run, 19, 'sma', 4) < 0)} from 607B on; at 204B "
            f"{_verdict(results, lambda run: gain(run, EARLY, 'sma', 4) < 0)}",
        ),
        Claim(
            "Early, WMA is better than EMA .2, that better than EMA .1 (Figure 4, 204B).",
            f"V = 8B: WMA {seen(EARLY, 'wma', 4)}%, EMA .2 {seen(EARLY, 'ema .2', 4)}%, EMA .1 "
            f"{seen(EARLY, 'ema .1', 4)}%.",
            _verdict(
                results,
                lambda run: gain(run, EARLY, "wma", 4) < gain(run, EARLY, "ema .2", 4) < gain(run, EARLY, "ema .1", 4),
            ),
        ),
        Claim(
            "And all three are better than the raw model (Figure 4, 204B).",
            "Of the same: EMA .1 keeps .39 on its oldest snapshot.",
            f"WMA: {_verdict(results, lambda run: gain(run, EARLY, 'wma', 4) < 0)}; EMA .1: "
            f"{_verdict(results, lambda run: gain(run, EARLY, 'ema .1', 4) < 0)}",
        ),
        Claim(
            "Late, the kinds are alike, so the plain mean will do (Figure 4, 1607B).",
            f"V = 8B: SMA {seen(LATE, 'sma', 4)}%, WMA {seen(LATE, 'wma', 4)}%, EMA .2 {seen(LATE, 'ema .2', 4)}%, EMA "
            f".1 {seen(LATE, 'ema .1', 4)}%. V = 32B: SMA {seen(LATE, 'sma', 1)}%, EMA .1 {seen(LATE, 'ema .1', 1)}%.",
            f"within {_ALIKE:g}% of each other, V = 8B: {_verdict(results, lambda run: alike(run, _ALL, 4))}; V = 32B "
            f"without EMA .1: {_verdict(results, lambda run: alike(run, _ALL[:3], 1))}, with it: "
            f"{_verdict(results, lambda run: alike(run, _ALL, 1))}",
        ),
        Claim(
            "Early, V = 16B and more is worse than not merging (Figure 5, 204B).",
            f"16B: {seen(EARLY, 'sma', 2)}%, 32B: {seen(EARLY, 'sma', 1)}%.",
            _verdict(results, lambda run: all(gain(run, EARLY, "sma", part) > 0 for part in wide)),
        ),
        Claim(
            "Late, the intervals matter less (Figure 5, 1607B).",
            "; ".join(f"{tokens}: {seen(LATE, 'sma', part)}%" for part, tokens in INTERVALS.items()) + ".",
            _verdict(results, lambda run: _range_of_intervals(run, LATE) < _range_of_intervals(run, EARLY)),
        ),
        Claim(
            "Early, more snapshots hurt (Figure 5).",
            f"V = 8B at 204B: N = 3 {seen(EARLY, 'sma', 4, 3)}%, N = 15 {seen(EARLY, 'sma', 4, 15)}%.",
            _verdict(results, lambda run: gain(run, EARLY, "sma", 4, 3) < gain(run, EARLY, "sma", 4, 15)),
        ),
        Claim(
            "Late, N = 3 falls short of N = 15 (Figure 5).",
            f"V = 8B at 1607B: N = 3 {seen(LATE, 'sma', 4, 3)}%, 10 {seen(LATE, 'sma', 4)}%, 15 "
            f"{seen(LATE, 'sma', 4, 15)}%.",
            _verdict(results, lambda run: gain(run, LATE, "sma", 4, 15) < gain(run, LATE, "sma", 4, 3)),
        ),
        Claim(
            "While the rate decays, merging gains less and less.",
            "A fifth of the run decays linearly to zero: "
            + ", ".join(f"{seen(units, 'sma', 4, in_decay=True)}% after {(units - 40) / 10:.0%}" for units in IN_DECAY)
            + f"; at constant rate {seen(LATE, 'sma', 4)}% at the end.",
            _verdict(decaying, lambda run: _shrinks(run)),
        ),
    ]


def _verdict(results: Sequence[Result], holds: Test) -> str:
    count, total = sum(map(holds, results)), len(results)
    word = "holds" if count >= _HOLDS * total else "does not hold" if count <= _FAILS * total else "holds in part"
    return f"**{word}** ({count} of {total} runs)"


def _range_of_intervals(run: Result, units: int) -> float:
    found = [gain(run, units, "sma", part) for part in INTERVALS]
    return max(found) - min(found)


def _shrinks(run: Result) -> bool:
    """From the first point in the decay to the last."""
    found = [gain(run, units, "sma", 4, in_decay=True) for units in IN_DECAY]
    return found[0] < found[-1]
