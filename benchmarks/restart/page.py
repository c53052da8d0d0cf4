"""The numbers of `docs/what-merging-can-rescue.md`: tables between marks, written from the records.

Knows Markdown and which arms stand beside which control; the verdicts follow from the numbers by rules that stand here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks import pages
from benchmarks.ablations.gains import Spread
from benchmarks.pages import table
from benchmarks.restart.gains import Survival, Value, at, gain, norm, of_question, other_at, tail, unsteadiness
from benchmarks.restart.questions import DECAYS, SHORT
from benchmarks.restart.records import Result
from benchmarks.restart.setups import AFTER

PAGE = Path(__file__).parents[2] / "docs" / "what-merging-can-rescue.md"
# standard errors from which a difference counts as one, by seeds: 95% of Student's t, since seeds are few
_SIGMAS = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
_STATES = ("merge, newest", "merge, average", "merge, fresh, re-warmed", "merge, fresh")
_CONTROLS = ("raw, fresh, re-warmed", "raw, fresh", "raw deeper, newest")
_SAME, _HALF = "same rate", "half rate"


def written(text: str, results: Sequence[Result]) -> str:
    """The page with every table as the records have it."""
    return pages.written(text, TABLES, results)


def _claims(results: Sequence[Result]) -> str:
    collapsed, other = of_question(results, "divergence"), of_question(results, "continued")
    merge, raw = (Survival.of(collapsed, f"{name}, newest, {_SAME}") for name in ("merge", "raw"))
    clipped = Survival.of(collapsed, f"raw, newest, clipped, {_SAME}")
    start, end = (gain(other, "merge, full", "raw, full", at(step)) for step in (0, AFTER))
    short = gain(other, "merge, short", "raw, short", at(SHORT))
    steadier = gain(other, "merge, full", "raw, full", unsteadiness(0, AFTER))
    rows = [
        (
            "A merge of snapshots from before a loss spike gets the run past it.",
            f"At the same rate: merge {_alive(merge)}, newest snapshot {_alive(raw)}, that with clipping "
            f"{_alive(clipped)} alive after {AFTER} steps.",
            _beats(merge, raw, clipped),
        ),
        (
            "Continued training starts lower from a merge.",
            f"{_spread(start)} on the new text.",
            _verdict(start),
        ),
        (
            "And ends at parity.",
            f"{_spread(end)} after {AFTER} steps of a full schedule, {_spread(short)} after {SHORT} at a tenth of the "
            f"rate.",
            f"full schedule: {_parity(end)}; short: {_parity(short)}",
        ),
        (
            "And its gradient norm is steadier.",
            f"Movement of its curve: {_spread(steadier)}.",
            _verdict(steadier),
        ),
    ]
    return table(["the paper", "here", "verdict"], rows)


def _optimizer(results: Sequence[Result]) -> str:
    return _decays(results, [*_STATES, *_CONTROLS], "raw, newest")


def _averaged(results: Sequence[Result]) -> str:
    """The optimizer's states of a merge against one another, since they share all else."""
    return _decays(results, _STATES[1:], "merge, newest")


def _constant(results: Sequence[Result]) -> str:
    arms = [*_STATES, "merge of 3, newest", *_CONTROLS]
    return _against(of_question(results, "constant"), arms, "raw, newest", _over_time(0, 10, 20, 50, 100, 200, AFTER))


def _shock(results: Sequence[Result]) -> str:
    arms = [
        "no restart",
        "rewind",
        "rewind deeper",
        "merge of 3, newest",
        "merge of 10, newest",
        "merge of 10, average",
        "merge of 10, fresh",
        "merge of 10 with the damaged, newest",
    ]
    columns = _over_time(0, 10, 20, 50, 100, 200, AFTER)
    return _against(of_question(results, "shock"), arms, "never shocked", columns)


def _continued(results: Sequence[Result]) -> str:
    found = of_question(results, "continued")

    def arm(schedule: str) -> Callable[[str], str]:
        return lambda name: f"{name}, {schedule}"

    columns: dict[str, tuple[Callable[[str], str], Value]] = {
        "start": (arm("full"), at(0)),
        "full: after 50": (arm("full"), at(50)),
        f"after {AFTER}": (arm("full"), at(AFTER)),
        "old text": (arm("full"), other_at(AFTER)),
        f"short: after {SHORT}": (arm("short"), at(SHORT)),
        "its old text": (arm("short"), other_at(SHORT)),
        "gradient norm, first 50": (arm("full"), norm(0, 50)),
        "the rest": (arm("full"), norm(50, AFTER)),
        "its movement": (arm("full"), unsteadiness(0, AFTER)),
    }
    return _against(found, ["merge", "raw deeper", "annealed"], "raw", columns)


def _divergence(results: Sequence[Result]) -> str:
    return _collapses(of_question(results, "divergence"))


def _creeping(results: Sequence[Result]) -> str:
    return _collapses(of_question(results, "creeping"))


TABLES: Mapping[str, Callable[[Sequence[Result]], str]] = {
    "claims": _claims,
    "optimizer": _optimizer,
    "averaged": _averaged,
    "constant": _constant,
    "shock": _shock,
    "continued": _continued,
    "divergence": _divergence,
    "creeping": _creeping,
}


def _over_time(*steps: int) -> dict[str, tuple[Callable[[str], str], Value]]:
    columns: dict[str, tuple[Callable[[str], str], Value]] = {
        f"{step} steps" if step else "at once": (str, at(step)) for step in steps
    }
    return columns | {"mean of the last 100": (str, tail)}


def _decays(results: Sequence[Result], arms: Sequence[str], control: str) -> str:
    columns = {
        f"{steps} steps to zero": (lambda name, steps=steps: f"{name}, {steps} steps", at(steps)) for steps in DECAYS
    }
    return _against(of_question(results, "optimizer"), arms, control, columns)


def _against(
    results: Sequence[Result],
    arms: Sequence[str],
    control: str,
    columns: Mapping[str, tuple[Callable[[str], str], Value]],
) -> str:
    rows = []
    for name in arms:
        found = [gain(results, arm(name), arm(control), value) for arm, value in columns.values()]
        numbers = {spread.num for spread in found if spread is not None}
        if numbers:
            rows.append([name, str(max(numbers)), *map(_spread, found)])
    return table([f"against {control}", "seeds", *columns], rows)


def _collapses(results: Sequence[Result]) -> str:
    names = list(dict.fromkeys(name.rsplit(", ", 1)[0] for result in results for name in result.arms))
    rows = []
    for name in names:
        row = [name]
        for rate in (_SAME, _HALF):
            survival = Survival.of(results, f"{name}, {rate}")
            change = gain(results, f"{name}, {rate}", f"raw, newest, {_HALF}", tail)
            if survival.num:
                row += [_alive(survival), f"{median(survival.died):.0f}" if survival.died else "–", _spread(change)]
            else:
                row += ["", "", ""]
        rows.append(row)
    heads = ["restart", "same rate: alive", "steps to the second collapse", "loss"]
    return table([*heads, "half rate: alive", "steps to it", "loss of these"], rows)


def _alive(survival: Survival) -> str:
    return f"{survival.alive} of {survival.num}"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{spread.mean:+.2f}%" if math.isnan(spread.error) else f"{spread.mean:+.2f} ± {spread.error:.2f}%"


def _verdict(spread: Spread | None) -> str:
    return _judged(spread, "**does not show**", "**holds**", "**does not hold**")


def _parity(spread: Spread | None) -> str:
    return _judged(spread, "not told apart", "**ends lower**", "**ends higher**")


def _judged(spread: Spread | None, unclear: str, lower: str, higher: str) -> str:
    if spread is None or spread.num not in _SIGMAS:
        return "not measured"
    if not _is_clear(spread):
        return unclear
    return lower if spread.mean < 0 else higher


def _is_clear(spread: Spread) -> bool:
    return abs(spread.mean) > _SIGMAS[spread.num] * spread.error


def _beats(merge: Survival, raw: Survival, clipped: Survival) -> str:
    if merge.num not in _SIGMAS:
        return "not measured"
    if merge.alive > raw.alive:
        return "**holds**" if merge.alive >= clipped.alive else "**holds in part**: clipping does more"
    return "**does not show** beside its control"
