"""Runs whose river, noise and memory are known, as records; written from the definitions, in plain NumPy."""

import numpy as np

from pretrain_merge.records import MergeRecord, Recipe

NOISE, MEMORY = 0.1, 8.0


def river(step):
    return 2.0 + 3.0 / np.sqrt(step)


def left(steps):
    """Variance of the mean of samples at some steps of a process that forgets as exp(-time / MEMORY)."""
    steps = np.asarray(steps, dtype=np.float64)
    return np.exp(-np.abs(steps[:, None] - steps[None, :]) / MEMORY).mean()


def mean_loss(steps, noise=NOISE):
    """The river at the middle of the steps, and the noise that is left."""
    return river(np.mean(steps)) + noise * left(steps)


def record(step, *, every=50, spans=(2, 4, 8), noise=NOISE, scale=1.0, stretch=1, metric="val_loss", **changes):
    """A merge point at `step`, with means over the newest `spans` snapshots; `stretch` renames the steps."""
    snapshots = {number: [step - every * back for back in reversed(range(number))] for number in spans}
    snapshots = {number: steps for number, steps in snapshots.items() if steps[0] >= every}
    values = {f"sma{number}": scale * mean_loss(steps, noise) for number, steps in snapshots.items()}
    fields = {
        "name": "merge",
        "step": step * stretch,
        "samples": 0,
        "tokens": 0,
        "window": max(snapshots, default=0),
        "spread": 0.1,
        "raw": {metric: scale * (river(step) + noise)},
        "views": {view: {metric: value} for view, value in values.items()},
        "recipes": {
            f"sma{number}": Recipe(tuple(step * stretch for step in steps), (1 / number,) * number)
            for number, steps in snapshots.items()
        },
        "lr": (1e-3,),
    }
    return MergeRecord(**fields | changes)


def run(last=2000, *, merge_every=100, **options):
    return [record(step, **options) for step in range(merge_every, last + 1, merge_every)]
