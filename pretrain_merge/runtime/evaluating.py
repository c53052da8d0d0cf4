"""Whether a merge is being evaluated now, for hooks that do what cannot be put back: write files, call services.

This module knows one fact. It imports nothing, so a user's module may ask without loading any of ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager

# a depth, since a view's evaluation lies inside that of the merge point
_depth = 0


def is_evaluating_merge() -> bool:
    """Whether validation hooks run for a merge: on raw or merged weights, between two training batches.

    False in the run's own validation, whose weights are raw and whose hooks count. What a hook changes in objects is
    put back after an evaluation of a merge; what it does outside of them is not, so that is what to ask for.

    >>> is_evaluating_merge()
    False
    """
    return _depth > 0


@contextmanager
def evaluating_merge() -> Iterator[None]:
    """Say so inside."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
