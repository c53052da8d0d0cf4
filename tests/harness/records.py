"""A record as a run writes it, and runs made of such."""

import dataclasses

from pretrain_merge.records import Expected, MergeRecord, Recipe

RECORD = MergeRecord(
    name="merge",
    step=400,
    samples=3200,
    tokens=409_600,
    window=4,
    spread=0.25,
    raw={"val_loss": 2.0},
    views={"sma": {"val_loss": 1.5}, "sma2": {"val_loss": 1.75}},
    recipes={"sma": Recipe((100, 200, 300, 400), (0.25, 0.25, 0.25, 0.25))},
    skipped={"sma8": "needs 8"},
    lr=(3e-4,),
    phase="long context",
    timing={"merge": 0.01},
)


def at(step, **changes):
    return dataclasses.replace(RECORD, step=step, tokens=1024 * step, **changes)


def falling_run(number, every=100):
    """Losses that fall, a view that comes late, and a forecast whose anneal ends two merges later."""
    records = []
    for step in range(every, every * number + 1, every):
        raw = 2.0 + 40.0 / step
        views = {"sma": {"val_loss": 0.95 * raw}}
        views |= {"sma2": {"val_loss": 0.97 * raw}} if step > 3 * every else {}
        expected = Expected(0.9 * raw, 0.88 * raw, 0.92 * raw, step + 2 * every)
        forecasts = {"soon": {"val_loss": expected}} if step > 2 * every else {}
        records.append(at(step, raw={"val_loss": raw}, views=views, forecasts=forecasts))
    return records


def plain(value):
    """A record as nested plain values in which NaN equals NaN."""
    return repr(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value)
