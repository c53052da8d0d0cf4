"""Faults of the modules that stand alone: cadences, learning-rate schedules, errors, names of tensors."""

from tests.mutations.catalogue.fault import Fault

_CADENCE = "tests/test_cadence.py"

FAULTS = (
    Fault(
        "1-sqrt is 1-square",
        "lr_schedules.py",
        "1.0 - math.sqrt(t)",
        "1.0 - t * t",
        "tests/test_lr_schedules.py tests/coefficients/test_formulas.py",
    ),
    Fault(
        "fires on the remainder only",
        "cadence.py",
        "return now > last and",
        "return not self.is_beyond(after, since=since) and",
        _CADENCE,
    ),
    Fault(
        "fires again at a standstill",
        "cadence.py",
        "return now > last and",
        "return now >= last and",
        _CADENCE,
    ),
    Fault(
        "a share counts from the start of the run",
        "cadence.py",
        "return self.every.index(count - since.count(self.every.unit))",
        "return self.every.index(count)",
        f"{_CADENCE} tests/merging/test_growing_interval.py",
    ),
    Fault(
        "a growing interval does not grow",
        "cadence.py",
        "if count * share <= 1.0:",
        "if True:",
        _CADENCE,
    ),
    Fault(
        "ignores start",
        "cadence.py",
        " and after.count(self.start.unit) >= self.start.amount",
        "",
        _CADENCE,
    ),
    Fault(
        "B means a million",
        "cadence.py",
        '"B": 10**9',
        '"B": 10**6',
        _CADENCE,
    ),
    Fault(
        "an error speaks to the terminal",
        "errors.py",
        'return printable(super().__str__(), keep="\\n")',
        "return super().__str__()",
        "tests/attacks/test_terminal.py",
    ),
    Fault(
        "a part of a name that ends as a wrapper's is cut off",
        "tensor_names.py",
        'return ".".join([*(part for part in path if part not in ADDED), last])',
        'return name.replace("_orig_mod.", "").replace("_forward_module.", "")',
        "tests/test_tensor_names.py",
    ),
    Fault(
        "names keep what compile added",
        "tensor_names.py",
        "if part not in ADDED",
        "if True",
        "tests/test_tensor_names.py",
    ),
)
