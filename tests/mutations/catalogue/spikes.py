"""Faults of spikes and the way back from them."""

from tests.mutations.catalogue.fault import Fault

_SPIKE_RECOVERY = "tests/callbacks/test_spike_recovery.py"
_WHAT_GOES_BACK = "tests/callbacks/test_what_goes_back.py"

FAULTS = (
    Fault(
        "the point that did not help drives out the one before it",
        "spikes/restart_points.py",
        "([point for point in old if not point.is_used] or old)[-self._keep :]",
        "old[-self._keep :]",
        "tests/spikes/test_restart_points.py",
    ),
    Fault(
        "the next step writes over a loss that was not read yet",
        "spikes/detector.py",
        "float(value.item()) if value.is_cpu else value.detach().clone()",
        "value.detach()",
        "tests/spikes/test_detector.py",
    ),
    Fault(
        "a run goes back to its newest restart point, damaged or not",
        "spikes/restart_points.py",
        "if point.step <= onset - self._distrust]\n        good",
        "if point.step <= onset]\n        good",
        _SPIKE_RECOVERY,
    ),
    Fault(
        "the optimizer keeps the state that diverged",
        "spikes/live_state.py",
        "optimizer.state.clear()",
        "pass",
        _WHAT_GOES_BACK,
    ),
    Fault(
        "gradients stay scaled as NaN has left them",
        "spikes/live_state.py",
        "self._scaler.load_state_dict(self._scaler.state_dict() | scaling)",
        "pass",
        _WHAT_GOES_BACK,
    ),
    Fault(
        "frozen weights that somebody writes into stay as they are",
        "spikes/live_state.py",
        "self._moved |= dict(self._sums().items() - self._sums_at_first.items()).keys()",
        "pass",
        _WHAT_GOES_BACK,
    ),
    Fault(
        "the scaled rate stays after the step",
        "spikes/changed_steps.py",
        '            group["lr"] = rate\n',
        "            pass\n",
        _SPIKE_RECOVERY,
    ),
    Fault(
        "one bad batch is a spike",
        "spikes/detector.py",
        "sustained: int = 3,",
        "sustained: int = 1,",
        "tests/spikes/test_detector.py",
    ),
    Fault(
        "a spike is judged by itself",
        "spikes/detector.py",
        "known[len(known) - self._lag] if self._lag else row, known[self._within - 1]",
        "row, known[self._within - 1]",
        "tests/spikes/test_detector.py",
    ),
    Fault(
        "each rank judges its own losses",
        "spikes/detector.py",
        "_means(self._unread, self._is_changed, ranks.sum_of_floats)",
        "_means(self._unread, self._is_changed, lambda sums: sums)",
        "tests/merging/test_spikes_on_ranks.py",
    ),
    Fault(
        "a loss that stood still is judged by nothing",
        "spikes/running_z.py",
        "if self._is_still(median, _RESOLUTION * unit):",
        "if False:",
        "tests/spikes/test_detector.py",
    ),
    Fault(
        "noise that has just begun is judged by its smallest half",
        "spikes/running_z.py",
        "return (value - median) / max(upper / _UPPER_QUARTILE_OF_NORMAL, least) > self._threshold",
        "return True",
        "tests/spikes/test_detector.py",
    ),
    Fault(
        "a median distance is one too near",
        "spikes/running_z.py",
        "return max(nearest_below, nearest_above)",
        "return min(nearest_below, nearest_above)",
        "tests/spikes/test_detector.py",
    ),
    Fault(
        "what one rank is told of a change stays with it",
        "spikes/detector.py",
        "list(zip(means[_LOSS::2], map(_log, means[_NORM::2]), strict=True)), num_changed > 0",
        "list(zip(means[_LOSS::2], map(_log, means[_NORM::2]), strict=True)), is_changed",
        "tests/merging/test_spikes_on_ranks.py",
    ),
)
