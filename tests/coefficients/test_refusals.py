"""What no kind accepts, and the message that says what to do."""

import math

import numpy as np
import pytest
from coefficients.strategies import assert_close, counts, law
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pretrain_merge.coefficients import KINDS, compute, custom, decay, decay_curve, ema, mean_age, n_eff, qam, sma
from pretrain_merge.errors import CoefficientError

NOT_NUMBERS = [math.nan, math.inf, -math.inf, True, "1", None, 1j, 10**400, [1.0]]


@pytest.mark.parametrize("n", [0, -1, 2.0, math.nan, math.inf, True, False, "3", None, np.True_, np.float64(3)])
@pytest.mark.parametrize("name", KINDS)
def test_n_must_be_a_positive_integer(name, n):
    given = {"ema": {"alpha": 0.2}, "custom": {"weights": [1.0]}, "extrapolated": {"step": 0.2}}
    parameters = given.get(name, {})
    for call in (KINDS[name], lambda n, **parameters: compute(name, n, **parameters)):
        with pytest.raises(CoefficientError) as caught:
            call(n, **parameters)
        assert f"n is {n!r}; allowed are integers from 1" in str(caught.value)


def test_n_may_be_an_integer_of_numpy():
    assert sma(np.int64(4)) == sma(4)
    assert decay(np.uint8(200)) == decay(200)


@pytest.mark.parametrize("bad", NOT_NUMBERS)
def test_every_number_must_be_finite_and_a_number(bad):
    calls = {
        "alpha": lambda: ema(3, alpha=[bad] if bad is None else bad),
        "half_life": lambda: ema(3, half_life=[bad] if bad is None else bad),
        "times[1]": lambda: decay(3, times=[0, bad, 2]),
        "weights[1]": lambda: custom(3, weights=[0.5, bad, 0.5]),
        "coefficients[1]": lambda: decay_curve([0.5, bad]),
    }
    for name, call in calls.items():
        with pytest.raises(CoefficientError, match="allowed are finite numbers") as caught:
            call()
        assert str(caught.value).startswith(f"{name} is ")
    for measure in (n_eff, mean_age):
        with pytest.raises(CoefficientError, match="allowed are finite numbers"):
            measure([0.5, bad])
    with pytest.raises(CoefficientError, match="allowed are finite numbers"):
        mean_age([0.5, 0.5], times=[0, bad])


@pytest.mark.parametrize(
    ("call", "pieces"),
    [
        (lambda: ema(3), ["alpha=None and half_life=None", "exactly one", "Set alpha=0.2"]),
        (lambda: ema(3, alpha=0.2, half_life=2.0), ["alpha=0.2 and half_life=2.0", "exactly one"]),
        (lambda: ema(3, alpha=0.0), ["alpha is 0.0", "(0, 1]"]),
        (lambda: ema(3, alpha=1.5), ["alpha is 1.5", "(0, 1]"]),
        (lambda: ema(3, half_life=0), ["half_life is 0.0", "above 0", "unit of the times"]),
        (lambda: ema(3, half_life=-1.0), ["half_life is -1.0"]),
        (lambda: decay(3, times=[0, 1]), ["times has length 2", "must have 3"]),
        (lambda: decay(3, times=[0, 2, 2]), ["2.0 after 2.0", "later", "oldest to newest"]),
        (lambda: decay(3, times=[2, 1, 0]), ["1.0 after 2.0"]),
        (lambda: ema(2, alpha=0.5, times=[1, 0]), ["0.0 after 1.0"]),
        (lambda: qam(2, times=[1, 0]), ["0.0 after 1.0"]),
        (lambda: decay(3, times=7), ["times is 7", "list of numbers"]),
        (lambda: decay(3, shape=[1.0, 0.2, 0.4]), ["0.4 after 0.2", "never increase"]),
        (lambda: decay(9, shape=lambda t: 1 - t + t**2), ["rises", "never increases", "'linear'"]),
        (lambda: qam(9, shape=lambda t: 1 - t + t**2), ["rises"]),
        (lambda: custom(3, weights=[0.5, 0.5]), ["weights has length 2", "must have 3", "one number per snapshot"]),
        (lambda: custom(3, weights=[]), ["weights has length 0", "must have 3"]),
        (lambda: custom(3, weights=1.0), ["weights is 1.0", "list of numbers"]),
        (lambda: custom(3, weights="001"), ["weights is '001'", "list of numbers"]),
        (lambda: custom(2, weights=[1, 3]), ["[1.0, 3.0] sum to 4.0", "must be 1", "Normalised: [0.25, 0.75]"]),
        (lambda: custom(2, weights=[1.0, 1e-11]), ["sum to 1.00000000001"]),
        (lambda: custom(2, weights=[1, -1]), ["sum to 0.0", "positive sum"]),
        (lambda: custom(2, weights=[1e300, 1e300]), ["sum to 2e+300"]),
        (lambda: custom(2, weights=[1.5e308, 1.5e308]), ["weights[0] is 1.5e+308", "finite numbers"]),
        (lambda: decay(2, times=[-1.5e308, 1.5e308]), ["times[0] is -1.5e+308"]),
        (lambda: decay_curve([]), ["coefficients has length 0", "at least 1"]),
        (lambda: n_eff([0.5, 0.6]), ["sum to 1.1"]),
        (lambda: mean_age([0.5, 0.5], times=[0, 1, 2]), ["times has length 3", "must have 2"]),
        (
            lambda: compute("smaa", 3),
            ["kind: 'smaa'", "sma, wma, ema, power, extrapolated, custom", "Did you mean 'sma'?"],
        ),
        (lambda: compute("DECAY", 3), ["Did you mean 'decay'?"]),
        (lambda: compute("zzz", 3), ["'zzz'", "sma, wma", "Use one of those"]),
        (lambda: compute("1-sqrt", 3), ["'1-sqrt' is a shape", "use kind 'decay' with shape='1-sqrt'"]),
        (lambda: compute(None, 3), ["None"]),
        (lambda: compute("decay", 3, shpae="linear"), ["'shpae'", "known: shape", "Did you mean 'shape'?"]),
        (lambda: compute("ema", 3, halflife=2), ["known: alpha, half_life", "Did you mean 'half_life'?"]),
        (lambda: compute("sma", 3, alpha=0.2), ["parameter of 'sma': 'alpha'", "known: none"]),
        (lambda: compute("sma", 3, n=3), ["parameter of 'sma': 'n'"]),
        (lambda: compute("custom", 3), ["'custom' was given []", "without 'weights'", "Set 'weights'"]),
    ],
)
def test_a_refusal_says_what_was_given_what_is_allowed_and_what_to_do(call, pieces):
    with pytest.raises(CoefficientError) as caught:
        call()
    assert [piece for piece in pieces if piece not in str(caught.value)] == []


@law
@given(n=counts, data=st.data())
def test_the_normalised_list_of_the_message_can_be_pasted(n, data):
    weights = data.draw(st.lists(st.floats(0.0, 1e3), min_size=n, max_size=n))
    assume(math.fsum(weights) > 1e-3 and abs(math.fsum(weights) - 1.0) > 1e-12)
    with pytest.raises(CoefficientError) as caught:
        custom(n, weights=weights)
    pasted = str(caught.value).partition("Normalised: [")[2].removesuffix("].").split(", ")
    assert_close(custom(n, weights=[float(text) for text in pasted]), np.array(weights) / sum(weights), n)


def test_lists_of_a_yaml_file_are_taken():
    config = OmegaConf.create({"weights": [0.25, 0.75], "shape": [1.0, 0.5, 0.0], "times": [10, 20]})
    assert compute("custom", 2, weights=config.weights) == (0.25, 0.75)
    assert compute("decay", 2, shape=config.shape, times=config.times) == (0.5, 0.5)
