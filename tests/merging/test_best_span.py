"""The best span of a plain mean, against parabolas whose minimum is known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_merge.merging.best_span import BestSpan, best_span, followed, nested, stepped


def parabola(best, bend, spans, least=2.0):
    return {span: least + bend * math.log(span / best) ** 2 for span in spans}


@given(st.floats(15.0, 66.0), st.floats(0.001, 2.0), st.floats(0.5, 9.0))
def test_the_minimum_of_a_parabola_in_log_span_is_found_with_its_loss(best, bend, least):
    found = best_span(parabola(best, bend, [10.0, 20.0, 50.0, 90.0], least))
    assert found.span == pytest.approx(best, rel=1e-5)
    assert found.loss == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize(("best", "expected"), [(3.0, 10.0), (400.0, 90.0)])
def test_a_minimum_outside_of_what_was_measured_is_not_guessed(best, expected):
    assert best_span(parabola(best, 0.1, [10.0, 20.0, 50.0, 90.0])).span == pytest.approx(expected)


def test_a_mean_that_diverged_is_left_out_and_nothing_is_said_of_nothing():
    losses = parabola(40.0, 0.1, [10.0, 20.0, 50.0, 90.0])
    assert best_span(losses | {200.0: math.nan, 400.0: math.inf}) == best_span(losses)
    assert best_span({}) is None
    assert best_span({10.0: math.nan}) is None
    assert best_span({10.0: 2.0}) == BestSpan(pytest.approx(10.0), 2.0)
    assert best_span({10.0: 2.0, 20.0: 2.0, 40.0: 2.0}).loss == 2.0


@given(st.lists(st.floats(1.0, 5.0), min_size=1, max_size=6))
def test_the_answer_lies_within_what_was_measured_and_is_no_worse_than_the_best_of_it(values):
    losses = {10.0 * 2**index: loss for index, loss in enumerate(values)}
    found = best_span(losses)
    assert 10.0 * (1 - 1e-9) <= found.span <= max(losses) * (1 + 1e-9)
    assert found.loss <= min(values)


@given(st.floats(18.0, 60.0), st.floats(18.0, 60.0), st.floats(0.5, 9.0))
def test_the_usual_span_counts_a_fifth_of_the_bend_that_losses_have(best, usual, least):
    losses = parabola(best, 0.005 * least, [10.0, 20.0, 50.0, 90.0], least)
    found = best_span(losses, usual=usual)
    leant = math.exp((5 * math.log(best) + math.log(usual)) / 6)
    assert found.span == pytest.approx(leant, rel=1e-2)
    assert found.loss == pytest.approx(least * (1 + 0.005 * math.log(found.span / best) ** 2), rel=1e-4)


def test_beside_a_steep_loss_the_usual_span_says_nothing():
    losses = parabola(20.0, 50.0, [10.0, 20.0, 40.0, 80.0])
    assert best_span(losses, usual=60.0).span == pytest.approx(20.0, rel=1e-3)


def test_means_that_tell_nothing_leave_the_usual_span():
    assert best_span(dict.fromkeys([10.0, 20.0, 40.0, 80.0], 2.0), usual=30.0).span == pytest.approx(30.0)


@pytest.mark.parametrize(
    ("window", "average", "numbers"),
    [(10, "last", [2, 3, 5, 10]), (10, "block", [2, 5, 10]), (2, "last", [2]), (41, "last", [6, 11, 21, 41])],
)
def test_means_halve_the_window_three_times(window, average, numbers):
    assert nested(window, average) == numbers


def test_a_limit_moves_by_the_fourth_root_of_two_and_not_beyond_what_it_may_be():
    assert followed(0.05, 0.05, is_better_longer=True, at_most=0.12) == pytest.approx(0.05 * 2**0.25)
    assert followed(0.05, 0.05, is_better_longer=False, at_most=0.12) == pytest.approx(0.05 / 2**0.25)
    assert followed(0.11, 0.11, is_better_longer=True, at_most=0.12) == 0.12


def test_a_step_goes_a_notch_at_a_time_and_is_off_again_where_two_merge_points_disagree():
    steps = [0.0]
    for is_better in [True, True, True, True, False, False, False, False]:
        steps.append(stepped(steps[-1], is_better_further=is_better))
    assert steps == [0.0, 0.1, 0.2, 0.3, 0.3, 0.2, 0.1, 0.0, 0.0]


def test_a_limit_does_not_run_away_from_what_a_full_window_can_span():
    share = 0.02
    for _ in range(40):
        share = followed(share, 0.02, is_better_longer=True, at_most=1.0)
    assert share <= 0.02 * 1.5 * 2**0.25
    assert followed(share, 0.02, is_better_longer=False, at_most=1.0) < 0.03
