"""Faults of coefficients."""

from tests.mutations.catalogue.fault import Fault

_FORMULAS = "tests/coefficients/test_formulas.py"
_LAWS = "tests/coefficients/test_laws.py"

FAULTS = (
    Fault(
        "wma is one snapshot late",
        "coefficients/means.py",
        "for i in range(1, n + 1))",
        "for i in range(n))",
        _FORMULAS,
    ),
    Fault(
        "ema takes the share of the older side",
        "coefficients/means.py",
        "coefficients.append(left * share)\n        left *= 1.0 - share",
        "coefficients.append(left * (1.0 - share))\n        left *= share",
        _FORMULAS,
    ),
    Fault(
        "an extrapolation goes back",
        "coefficients/means.py",
        "(1.0 + step) / (n - num_older), -step / num_older",
        "(1.0 - step) / (n - num_older), step / num_older",
        _FORMULAS,
    ),
    Fault(
        "half-life in e-foldings",
        "coefficients/means.py",
        "-math.log(2.0) * ((after",
        "-1.0 * ((after",
        _FORMULAS,
    ),
    Fault(
        "decay is reversed",
        "coefficients/replays.py",
        "pairwise((1.0, *rates, 0.0))",
        "pairwise((1.0, *rates[::-1], 0.0))",
        _FORMULAS,
    ),
    Fault(
        "decay ends on the newest snapshot",
        "coefficients/replays.py",
        "* n / (n - 1)) for time",
        "or 1.0) for time",
        _FORMULAS,
    ),
    Fault(
        "qam mixes the wrong way",
        "coefficients/replays.py",
        "more[1:] += rate * chances",
        "more[:-1] += rate * chances",
        _FORMULAS,
    ),
    Fault(
        "qam is computed again at each merge",
        "coefficients/replays.py",
        "@lru_cache(maxsize=8)  #",
        "@lru_cache(maxsize=0)  #",
        "tests/coefficients/test_costs.py",
    ),
    Fault(
        "a kind sees times that do not ascend",
        "coefficients/registry.py",
        '        if takes_times:\n            parameters["times"] = ascending(',
        '        if takes_times:\n            parameters["times"] = (lambda times, n: times or range(n))(',
        "tests/coefficients/test_new_kinds.py",
    ),
    Fault(
        "rounding is not made up for",
        "coefficients/numbers.py",
        "+= 1.0 - math.fsum(coefficients)",
        "+= 0.0",
        _LAWS,
    ),
    Fault(
        "the inverse is off by one",
        "coefficients/readings.py",
        "math.fsum(checked[i:]) for i in range(1,",
        "math.fsum(checked[i - 1 :]) for i in range(1,",
        _LAWS,
    ),
    Fault(
        "n_eff forgets to square",
        "coefficients/readings.py",
        "1.0 / math.fsum(c * c for c",
        "1.0 / math.fsum(c for c",
        _LAWS,
    ),
    Fault(
        "mean age counts from the oldest",
        "coefficients/readings.py",
        "c * (taken[-1] - time)",
        "c * (time - taken[0])",
        _LAWS,
    ),
)
