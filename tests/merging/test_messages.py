"""What a merger says of views that are not ready, of breaks and of refusals: in whole sentences, once."""

import logging

import pytest
from merging.moved_models import model_at, observe_at, rates

from pretrain_merge import RollingMerger
from pretrain_merge.errors import ConfigError, WindowNotReadyError


def reason(merging, view):
    with pytest.raises(WindowNotReadyError) as caught, merging.merged(model_at(), view):
        pass
    assert merging.why_not(view) == str(caught.value)
    return str(caught.value)


def test_a_view_that_is_not_ready_says_how_many_since_when_when_and_what_is():
    merging = RollingMerger(window=8, every=1000, views=["sma8", "sma4"])
    rates(merging, lambda step: 3e-4 if step < 800 else 2e-4, range(1, 5001))
    assert reason(merging, "sma8") == (
        "view 'sma8' needs 8 snapshots and the window holds 5 (steps 1000 to 5000) since the break at step 800 "
        "(learning rate changed from 0.0003 to 0.0002). It will be ready at step 8000; 'sma4' is ready now."
    )


def test_an_empty_window_has_no_steps_and_no_break_to_name():
    assert reason(RollingMerger(window=4, every=10), "sma") == (
        "view 'sma' needs 2 snapshots and the window holds 0. It will be ready at step 20."
    )


def test_readiness_is_told_in_the_unit_of_the_interval():
    message = reason(RollingMerger(window=4, every="1B tokens", start="5B tokens"), "sma")
    assert message.endswith("It will be ready at 6000000000 tokens.")


@pytest.mark.parametrize("average", ["last", "block"])
@pytest.mark.parametrize("start", [0, 15, 20])
@pytest.mark.parametrize("broken_at", [None, 14, 20, 21])
def test_a_view_is_ready_exactly_when_it_was_said_to_be(average, start, broken_at):
    merging, module = RollingMerger(window=4, every=10, start=start, average=average, views=["sma3"]), model_at()
    said = []
    for step in range(1, 101):
        observe_at(merging, module, step, lr=0.1 if broken_at is None or step < broken_at else 0.2)
        if merging.why_not("sma3") is None:
            break
        if broken_at is None or step >= broken_at:  # nobody foresees a break
            said.append(merging.why_not("sma3"))
    assert said
    assert all(f"It will be ready at step {step}." in message for message in said)


def test_a_view_that_is_not_configured_is_named_with_those_that_are():
    merging = RollingMerger(window=4, every=10, views=["sma", "wma"])
    with pytest.raises(ConfigError) as caught, merging.merged(model_at(), "smaa"):
        pass
    assert "view 'smaa' is not configured; did you mean 'sma'? Configured: sma, wma." in str(caught.value)


def test_every_break_of_a_warm_up_is_said_once_and_only_if_it_cost_something(caplog):
    merging = RollingMerger(window=10, every=2)
    rates(merging, lambda step: 0.1 * min(1.0, step / 25))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == [
        "break at step 3 (learning rate changed from 0.008 to 0.012): 1 snapshot is no longer merged; the window "
        "refills."
    ]


def breaks_said(caplog):
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [int(text.removeprefix("break at step ").partition(" ")[0]) for text in said if "break at" in text]


def test_a_rate_that_is_changed_by_hand_after_a_warm_up_is_said(caplog):
    rates(
        RollingMerger(window=10, every=2), lambda step: 0.1 * min(1.0, step / 5) if step < 20 else 0.05 * (step // 20)
    )
    assert breaks_said(caplog) == [3, 20, 40, 60]


def test_a_schedule_of_many_steps_is_not_said_at_each(caplog):
    rates(RollingMerger(window=10, every=1), lambda step: 0.99 ** (step // 5), range(1, 201))
    assert breaks_said(caplog) == list(range(5, 56, 5))


def test_two_reasons_are_two_notices(caplog):
    merging = RollingMerger(window=10, every=2)
    rates(merging, lambda step: 0.1, range(1, 11))
    merging.mark_phase("a")
    rates(merging, lambda step: 0.1, range(11, 21))
    merging.mark_phase("b")
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.split(":")[0] for text in said] == ["break at step 10 (phase 'a')", "break at step 20 (phase 'b')"]


def test_refused_snapshots_are_said_once(caplog):
    merging = RollingMerger(window=10, every=1)
    module = model_at(float("nan"))
    for step in range(1, 5):
        merging.observe(module, step)
    assert caplog.text.count("holds NaN or infinity and was refused") == 1
    assert merging.num_refused == 4
