"""Faults of merges and swaps."""

from tests.mutations.catalogue.fault import Fault

_VIEWS = "tests/merging/test_views.py"
_SWAP = "tests/merging/test_swap.py"

FAULTS = (
    Fault(
        "a view takes the oldest snapshots",
        "merging/views.py",
        "self._within(view, valid[-(view.last or window.size) :]",
        "self._within(view, valid[: (view.last or window.size)]",
        "tests/merging/test_weighted_sums.py",
    ),
    Fault(
        "a view spans a share of the whole run, breaks or not",
        "merging/views.py",
        "age = steps[-1] - since.step",
        "age = steps[-1]",
        _VIEWS,
    ),
    Fault(
        "a limited view merges one snapshot",
        "merging/views.py",
        "range(len(steps) - _SMALLEST)",
        "range(len(steps) - 1)",
        _VIEWS,
    ),
    Fault(
        "a limit runs ahead of what the window can span",
        "merging/best_span.py",
        "near = min(max(share, used / _ROUNDED), used * _ROUNDED)",
        "near = share",
        "tests/merging/test_best_span.py",
    ),
    Fault(
        "the best span lies on the other side of the best mean",
        "merging/best_span.py",
        "- down / (2.0 * bend)",
        "+ down / (2.0 * bend)",
        "tests/merging/test_best_span.py",
    ),
    Fault(
        "the noise of one evaluation chooses a span",
        "merging/best_span.py",
        "known_bend = 0.0 if usual is None else _KNOWN_BEND",
        "known_bend = 0.0 if usual is None else 0.0",
        "tests/merging/test_best_span.py",
    ),
    Fault(
        "a view is resolved at each question",
        "merging/views.py",
        "if state != self._state:",
        "if True:",
        _VIEWS,
    ),
    Fault(
        "a view that was resolved does not see a new snapshot",
        "merging/views.py",
        "if state != self._state:",
        "if not self._state:",
        f"{_VIEWS} tests/merging/test_messages.py",
    ),
    Fault(
        "every pass over the whole window measures the spread",
        "merging/swap.py",
        "is_new = merge.snapshots == valid != self._snapshots",
        "is_new = merge.snapshots == valid",
        _VIEWS,
    ),
    Fault(
        "the spread of a window that no view read is not measured",
        "merging/swap.py",
        "        if valid != self._snapshots:\n",
        "        if False:\n",
        _VIEWS,
    ),
    Fault(
        "raw is not restored",
        "merging/swap.py",
        "                    self._restore()\n",
        "                    pass\n",
        "tests/merging/test_raw_comes_back.py tests/callbacks/test_raw_is_back.py",
    ),
    Fault(
        "memory that an evaluator exchanged stays",
        "merging/swap.py",
        "                    self._places.put_back()\n",
        "                    pass\n",
        _SWAP,
    ),
    Fault(
        "merges are written into memory that an evaluator exchanged",
        "merging/swap.py",
        "        self._places.put_back()\n        measured",
        "        measured",
        _SWAP,
    ),
    Fault(
        "a merge raises version counters",
        "merging/swap.py",
        "with signals.deferred(), self._places.versions_kept():",
        "with signals.deferred():",
        f"{_SWAP} tests/callbacks/test_which_parameters.py",
    ),
    Fault(
        "a pruned layer loses its zeros when pruning is made permanent",
        "merging/swap.py",
        "tensor.masked_fill_(zeros, 0)",
        "pass",
        f"{_SWAP} tests/callbacks/test_which_parameters.py",
    ),
    Fault(
        "a model of other parameters gets the merge",
        "merging/swap.py",
        "if others := stored.why_others(self._live):",
        "if others := None:",
        _SWAP,
    ),
    Fault(
        "merges are due without regard to merge_every",
        "merging/rolling_merger.py",
        "self._merge_cadence.crossed(",
        "self._views._cadence.crossed(",
        "tests/merging/test_observing.py",
    ),
    Fault(
        "merged draws other random numbers than raw",
        "merging/swap.py",
        "        set_back()\n",
        "",
        "tests/merging/test_states.py",
    ),
)
