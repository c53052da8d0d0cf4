"""A kind of one's own is one decorated function, held to the same promises."""

import math

import pytest

from pretrain_merge.coefficients import KINDS, compute, kind, registry
from pretrain_merge.errors import CoefficientError


@pytest.fixture
def scratch_kinds(monkeypatch):
    monkeypatch.setattr(registry, "KINDS", dict(KINDS))


@pytest.mark.usefixtures("scratch_kinds")
def test_a_new_kind_is_one_decorated_function():
    @kind
    def trimmed(n, *, ends=1, times=None):
        """Every snapshot the same, without the outermost at either end."""
        inner = n - 2 * ends
        return (0.0,) * ends + (1 / inner,) * inner + (0.0,) * ends

    assert compute("trimmed", 4, times=[0, 1, 5, 6]) == (0.0, 0.5, 0.5, 0.0)
    assert compute("trimmed", 6, ends=2) == (0.0, 0.0, 0.5, 0.5, 0.0, 0.0)
    with pytest.raises(CoefficientError, match="Did you mean 'trimmed'"):
        compute("trimed", 4)
    with pytest.raises(CoefficientError, match=r"known: ends\. Did you mean 'ends'"):
        compute("trimmed", 4, end=1)


@pytest.mark.usefixtures("scratch_kinds")
@pytest.mark.parametrize(
    ("returned", "piece"),
    [
        ((0.5, 0.5), "length 2 and must have 3"),
        ((0.5, 0.5, 0.5), "sum to 1.5"),
        ((math.nan,) * 3, "nan"),
        (None, "None"),
    ],
)
def test_a_new_kind_that_breaks_the_promise_is_caught(returned, piece):
    @kind
    def broken(n):
        return returned

    with pytest.raises(CoefficientError) as caught:
        compute("broken", 3)
    assert "the coefficients of kind 'broken'" in str(caught.value)
    assert piece in str(caught.value)


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "3", None])
def test_no_kind_sees_an_impossible_number(n, monkeypatch):
    monkeypatch.setattr(registry, "KINDS", dict(KINDS))

    @kind
    def seen(n):
        raise AssertionError(n)

    with pytest.raises(CoefficientError, match="allowed are integers from 1"):
        seen(n)


def test_a_kind_of_ones_own_sees_times_as_they_may_be_and_must_sum_to_one(monkeypatch):
    monkeypatch.setattr(registry, "KINDS", dict(KINDS))
    asked = []

    @kind
    def newest(n, *, times=()):
        asked.append(times)
        return (0.0,) * (n - 1) + (times[-1],)

    assert newest(2) == (0.0, 1.0)
    assert newest(2, times=[0, 1]) == compute("newest", 2, times=[0, 1]) == (0.0, 1.0)
    assert asked == [(0.0, 1.0)] * 3
    with pytest.raises(CoefficientError, match=r"the coefficients of kind 'newest'.*sum to 2"):
        newest(2, times=[0, 2])
    with pytest.raises(CoefficientError, match="each must be later"):
        newest(2, times=[1, 0])
    with pytest.raises(CoefficientError, match="must have 3"):
        newest(3, times=[0, 1])
