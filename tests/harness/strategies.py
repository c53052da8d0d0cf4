"""Hypothesis strategies: runs, quantities, configurations and tensors as users produce them."""

import dataclasses
import string
from datetime import date
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st

from pretrain_merge.cadence import UNITS, Cadence, Progress, Quantity
from pretrain_merge.config import MergeConfig
from pretrain_merge.records import MergeRecord, Recipe

amounts = st.integers(1, 30)
units = st.sampled_from(UNITS)
quantities = st.builds(Quantity, amounts, units)
cadences = st.builds(Cadence, quantities, st.builds(Quantity, st.integers(0, 60), units))


@st.composite
def runs(draw, *, slowest=0):
    """The counters of a run after each observation: any of them may jump; with `slowest` 0, all but steps may stand."""
    progress, seen = Progress(), []
    for _ in range(draw(st.integers(1, 40))):
        progress = Progress(
            progress.step + draw(st.sampled_from([1, 1, 1, 1, 1, 1, 2, 4])),
            progress.samples + draw(st.integers(slowest, 70)),
            progress.tokens + draw(st.integers(slowest, 70)),
        )
        seen.append(progress)
    return seen


@st.composite
def written_quantities(draw):
    """A quantity as people write it, and the number of units it stands for."""
    multiplier, factor = draw(st.sampled_from([("", 1), ("K", 10**3), ("M", 10**6), ("b", 10**9), ("T", 10**12)]))
    hundredths = draw(st.integers(1, 99_999)) * (1 if factor > 1 else 100)
    number = f"{hundredths // 100}.{hundredths % 100:02d}" if hundredths % 100 else f"{hundredths // 100}"
    number = draw(st.sampled_from([number, f"{hundredths}e-2"]))
    unit = draw(st.sampled_from(["", "step", "steps", "Samples", "tokens"]))
    space = draw(st.sampled_from(["", " "]))
    expected = Quantity(hundredths * factor // 100, f"{unit.lower().removesuffix('s') or 'step'}s")
    return f"{number}{space}{multiplier}{space}{unit}", expected


hashable = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats()
    | st.text(max_size=12)
    | st.binary(max_size=4)
    | st.sampled_from(["sma", "sma4", "ema", "block", "1000 steps", "8B tokens", "???", "${", "${window}", "off"])
)
leaves = (
    hashable
    | st.sampled_from(
        ["1e400 tokens", "inf steps", "9" * 5000, "sma" + "9" * 5000, "\ud800", "\x00", "${oc.env:NOWHERE}"]
    )
    | st.sampled_from(
        [10**400, 1j, {1, 2}, b"x", range(3), object(), len, int, ..., Path("x"), np.int64(3), np.ones(2)]
    )
    | st.sampled_from([torch.tensor(3), torch.ones(2), Decimal("NaN"), Fraction(1, 3), date(2020, 1, 1)])
    | st.fixed_dictionaries({"name": st.just("x"), "kind": st.sampled_from(["custom", "decay", "ema", ["sma"]])})
)
nested_keys = st.sampled_from(
    ["name", "kind", "last", "alpha", "half_life", "weights", "shape", "lr", "every", "keep", "best", "mode", "at_end"]
)
anything = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(nested_keys | hashable, inner, max_size=3)
    ),
    max_leaves=6,
)
config_keys = st.sampled_from([item.name for item in dataclasses.fields(MergeConfig)])
configs = st.dictionaries(config_keys | st.text(string.ascii_lowercase, max_size=8), anything, max_size=4)

names = st.text(string.ascii_letters + string.digits + "_.-/", min_size=1, max_size=10)
metrics = st.dictionaries(names, st.floats(), max_size=3)
recipes = st.builds(Recipe, st.tuples(amounts, amounts), st.tuples(st.floats(0, 1), st.floats(0, 1)))
records = st.builds(
    MergeRecord,
    name=names,
    step=st.integers(1, 10**9),
    samples=st.integers(0, 10**12),
    tokens=st.integers(0, 10**15),
    window=st.integers(2, 64),
    spread=st.floats(),
    raw=metrics,
    views=st.dictionaries(names, metrics, max_size=3),
    recipes=st.dictionaries(names, recipes, max_size=2),
    skipped=st.dictionaries(names, st.text(max_size=20), max_size=2),
    lr=st.lists(st.floats(), max_size=3).map(tuple),
    phase=st.text(max_size=10),
    refused=st.integers(0, 9),
    timing=st.dictionaries(names, st.floats(0, 1e6), max_size=2),
)

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
