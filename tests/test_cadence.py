"""When something is due: quantities as people write them, and firing on crossing whatever the counters do."""

import math
from itertools import pairwise

import pytest
from harness import strategies
from hypothesis import given
from hypothesis import strategies as st

from pretrain_merge.cadence import UNITS, Cadence, Progress, Quantity, Share, Upcoming, parse_interval
from pretrain_merge.errors import ConfigError, ProgressError


def fires(cadence, run):
    """At which observations of a run the cadence is due."""
    return [after for before, after in zip([Progress(), *run], run, strict=False) if cadence.crossed(before, after)]


def due_by_hand(cadence, run):
    """The same from the definition alone: look at every single count between two observations."""
    due, before = [], Progress()
    for after in run:
        counts = range(before.count(cadence.every.unit) + 1, after.count(cadence.every.unit) + 1)
        multiples = [count for count in counts if count % cadence.every.amount == 0]
        if cadence.start.unit == cadence.every.unit:
            multiples = [count for count in multiples if count >= cadence.start.amount]
        elif after.count(cadence.start.unit) < cadence.start.amount:
            multiples = []
        if multiples:
            due.append(after)
        before = after
    return due


def steps(*counts):
    return [Progress(step) for step in counts]


@given(strategies.cadences, strategies.runs())
def test_it_fires_once_where_a_multiple_is_crossed_however_the_counters_jump(cadence, run):
    assert fires(cadence, run) == due_by_hand(cadence, run)


@given(strategies.amounts, st.integers(0, 60), strategies.runs())
def test_a_jump_fires_if_and_only_if_one_of_its_single_steps_would_have(every, start, run):
    cadence = Cadence(Quantity(every), Quantity(start))
    single = {progress.step for progress in fires(cadence, steps(*range(1, run[-1].step + 1)))}
    expected = [
        after
        for before, after in zip([Progress(), *run], run, strict=False)
        if single & set(range(before.step + 1, after.step + 1))
    ]
    assert fires(cadence, run) == expected


def test_testing_the_remainder_instead_would_miss_what_jumps_over():
    run = steps(8, 11, 19, 21)
    assert [progress for progress in run if progress.step % 10 == 0] == []
    assert fires(Cadence(Quantity(10)), run) == steps(11, 21)


def test_a_jump_over_several_multiples_fires_once():
    assert fires(Cadence(Quantity(10)), steps(9, 45, 46, 50)) == steps(45, 50)


def test_nothing_is_due_before_start_and_the_multiples_stay_where_they_are():
    assert fires(Cadence(Quantity(10), Quantity(25)), steps(*range(1, 51))) == steps(30, 40, 50)


def test_start_itself_is_due_if_it_is_a_multiple():
    assert fires(Cadence(Quantity(10), Quantity(20)), steps(*range(1, 31))) == steps(20, 30)


def test_a_multiple_before_start_is_not_due_late():
    assert fires(Cadence(Quantity(10), Quantity(15)), steps(8, 16, 20)) == steps(20)


def test_start_may_count_in_another_unit_than_every():
    cadence = Cadence(Quantity(10, "tokens"), Quantity(3, "steps"))
    run = [Progress(step, tokens=10 * step) for step in range(1, 6)]
    assert [progress.step for progress in fires(cadence, run)] == [3, 4, 5]


def test_tokens_that_stand_still_fire_nothing():
    cadence = Cadence(Quantity(10, "tokens"))
    run = [Progress(1, tokens=10), Progress(2, tokens=10), Progress(3, tokens=19), Progress(4, tokens=20)]
    assert [progress.step for progress in fires(cadence, run)] == [1, 4]


@given(strategies.cadences, st.integers(0, 100), st.integers(1, 5))
def test_the_next_due_counts_are_those_where_it_fires(cadence, done, times):
    unit = cadence.every.unit
    if cadence.start.unit != unit:
        cadence = Cadence(cadence.every, Quantity(cadence.start.amount, unit))
    field = {"steps": "step"}.get(unit, unit)
    run = [Progress(**{field: count}) for count in range(1, 400)]
    later = [progress.count(unit) for progress in fires(cadence, run) if progress.count(unit) > done]
    promised = cadence.due_after(Progress(**{field: done}), times=times)
    assert (promised.amount, promised.unit) == (later[times - 1], unit)


@pytest.mark.parametrize(
    ("written", "amount", "unit"),
    [
        (1000, 1000, "steps"),
        (1e3, 1000, "steps"),
        ("1000", 1000, "steps"),
        ("1000 steps", 1000, "steps"),
        ("1 step", 1, "steps"),
        ("8B tokens", 8 * 10**9, "tokens"),
        ("8 b Tokens", 8 * 10**9, "tokens"),
        ("2e6 samples", 2 * 10**6, "samples"),
        ("0.5T tokens", 5 * 10**11, "tokens"),
        ("1.5K", 1500, "steps"),
        ("1_000_000", 10**6, "steps"),
        (" 7 ", 7, "steps"),
    ],
)
def test_quantities_are_read_as_people_write_them(written, amount, unit):
    assert Quantity.parse(written) == Quantity(amount, unit)


@given(strategies.written_quantities())
def test_a_written_quantity_is_read_exactly(case):
    written, expected = case
    assert Quantity.parse(written) == expected


@given(strategies.quantities)
def test_a_quantity_reads_back_from_its_text(quantity):
    assert Quantity.parse(str(quantity)) == quantity


@pytest.mark.parametrize(
    "written",
    [
        *("", "steps", "0", 0, "-5", -5, "+5", "1.5", 1.5, "1e-2", "0x10", "1..2", "five", "5 parsecs", "1000 step s"),
        *(True, None, [1000], {"steps": 5}, b"5", float("nan"), float("inf"), "1e999T", "9" * 5000, 10**19),
        "1." + "0" * 30 + "1",  # a float or a Decimal of 28 digits takes it for 1
        "5\N{KELVIN SIGN}",  # a K, if letters are compared without case in Unicode
        "5 \N{LATIN SMALL LETTER LONG S}teps",
    ],
)
def test_what_is_no_quantity_is_refused_with_what_is_one(written):
    with pytest.raises(ConfigError) as caught:
        Quantity.parse(written, key="save.every")
    message = str(caught.value)
    assert message.startswith(f"save.every: {written!r} ")
    assert "whole number of at least 1 steps, samples or tokens" in message
    assert "'8B tokens'" in message


@given(st.text(max_size=30))
def test_no_text_raises_an_error_that_is_not_ours(text):
    try:
        quantity = Quantity.parse(text)
    except ConfigError:
        return
    assert quantity.amount >= 1
    assert quantity.unit in UNITS


def test_a_start_may_be_zero_and_an_interval_may_not():
    assert Quantity.parse(0, key="start", minimum=0) == Quantity(0)
    with pytest.raises(ConfigError, match="at least 1"):
        Quantity.parse(0)


@pytest.mark.parametrize("count", [-1, 1.0, True, "3", None])
def test_counters_that_are_no_counts_are_refused(count):
    with pytest.raises(ProgressError, match="integers of at least 0"):
        Progress(tokens=count)


shares = st.builds(Share, st.floats(0.001, 50.0))


@given(shares, st.integers(1, 10**12))
def test_the_count_of_a_point_is_the_first_at_which_it_lies_behind(share, near):
    index = share.index(near)
    count = share.reached(index)
    assert share.index(count) == index
    assert share.index(count - 1) == index - 1


@given(shares, st.integers(1, 10**9))
def test_points_of_a_share_lie_the_share_of_the_count_apart_and_at_least_one(share, count):
    before, after = (share.reached(share.index(count) + number) for number in (0, 1))
    # (1 + ln(p t)) / p grows by one where t grows by a factor of e^p, and both ends are rounded up
    assert 1 <= after - before <= max(1.0, before * math.expm1(share.percent / 100.0) + 2.0)


@given(st.integers(300, 10**9))
def test_ten_snapshots_at_one_percent_span_a_twelfth_to_an_eleventh_of_the_run_whenever(step):
    share = Share(1.0)
    newest = share.index(step)
    span = share.reached(newest) - share.reached(newest - 9)
    assert 1 / 12 < span / share.reached(newest) < 1 / 11


@given(shares, strategies.runs(), st.integers(0, 50))
def test_a_share_fires_once_where_a_point_after_its_origin_is_crossed(share, run, origin):
    cadence, since = Cadence(share), Progress(origin)
    points = {origin + share.reached(index) for index in range(1, share.index(run[-1].step) + 1)}
    fired = [b for a, b in zip([Progress(), *run], run, strict=False) if cadence.crossed(a, b, since=since)]
    expected = [b for a, b in zip([Progress(), *run], run, strict=False) if points & set(range(a.step + 1, b.step + 1))]
    assert fired == expected


@given(strategies.runs(), st.sets(st.integers(0, 30)), shares | st.integers(1, 40).map(Quantity), st.integers(0, 60))
def test_what_remembers_where_it_is_due_next_says_what_the_cadence_says_also_across_breaks(run, breaks, every, start):
    cadence, since = Cadence(every, Quantity(start)), Progress()
    upcoming = Upcoming(cadence)
    for number, (before, after) in enumerate(pairwise([Progress(), *run])):
        is_quiet = after.step in upcoming.quiet and since is upcoming.since
        is_due = cadence.crossed(before, after, since=since)
        assert not (is_quiet and is_due)
        assert is_quiet or upcoming.crossed(before, after, since=since) == is_due
        if number in breaks:
            since = after


def test_where_it_is_due_next_is_worked_out_once_an_interval():
    upcoming, asked = Upcoming(Cadence(Quantity(100))), 0
    for step in range(1, 1001):
        if step not in upcoming.quiet:
            upcoming.crossed(Progress(step - 1), Progress(step), since=upcoming.since)
            asked += 1
    assert asked == 11  # at the first step, and where it is due


def test_a_share_of_tokens_counts_tokens_from_its_origin():
    cadence, since = Cadence(Share(10.0, "tokens")), Progress(5, tokens=1000)
    assert cadence.due_after(Progress(6, tokens=1300), since=since).unit == "tokens"
    counts = [Progress(5 + step, tokens=1000 + 100 * step) for step in range(60)]
    due = [b.step for a, b in pairwise(counts) if cadence.crossed(a, b, since=since)]
    assert due[:10] == list(range(6, 16))  # a tenth of the tokens is less than a step
    assert max(b - a for a, b in pairwise(due)) == 5  # a tenth of some 54


def test_nothing_is_due_before_the_start_of_a_share_either():
    cadence = Cadence(Share(10.0), start=Quantity(100))
    due = [step for step in range(1, 200) if cadence.crossed(Progress(step - 1), Progress(step))]
    assert min(due) >= 100
    assert cadence.due_after(Progress(3)) == Quantity(due[0])
    assert cadence.due_after(Progress(3), times=3) == Quantity(due[2])


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("1%", Share(1.0)),
        (" 0.5 % ", Share(0.5)),
        ("2% of steps", Share(2.0)),
        ("1% tokens", Share(1.0, "tokens")),
        ("10% of Samples", Share(10.0, "samples")),
    ],
)
def test_a_share_is_read_as_people_write_it(text, share):
    assert parse_interval(text) == share == parse_interval(str(share))


@pytest.mark.parametrize("text", ["0%", "51%", "-1%", "1%%", "%", "1e400%", "nan%", "1% of epochs", "1 % 2", "0.0001%"])
def test_what_is_not_a_share_is_refused_with_the_key_and_a_form_that_is(text):
    with pytest.raises(ConfigError, match=r"^every: .*Allowed: 0\.001% to 50%.*'1%'"):
        parse_interval(text)
