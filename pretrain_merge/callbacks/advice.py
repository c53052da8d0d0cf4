"""What a run tells its user about the window that was configured: once, with numbers that would fit better.

This module knows shares of a run and sentences. It knows no tensors and no merges.
"""

import math

from pretrain_merge.cadence import Quantity, Share
from pretrain_merge.config import EXTRAPOLATED, EXTRAPOLATED_SPAN, LONGEST_SPAN, View, WindowSettings
from pretrain_merge.merging.views import ALWAYS_ALLOWED


def why_too_wide(settings: WindowSettings, num_steps: float) -> str | None:
    """The view whose snapshots span a larger share of the run than merges well, and an interval that fits.

    Args:
        settings: Of the window.
        num_steps: Of the whole run.

    Returns:
        What to tell the user; None where every view fits, or where an interval in tokens does not say.
    """
    for view in settings.views:
        share = _share_spanned(settings, view, num_steps)
        # a limit of the user's own below the best span is no reason for a word; what is beyond the best one is
        at_most = max(EXTRAPOLATED_SPAN if view.kind == EXTRAPOLATED else LONGEST_SPAN, view.span or 0.0)
        if share is None or share <= at_most or share * num_steps <= ALWAYS_ALLOWED:
            continue
        reach = _reach(settings, view)
        fixed = math.floor(at_most * num_steps / reach)
        fits = f'"{Share.spanning(at_most, reach).percent:g}%"' + (f", or {fixed} steps" if fixed else "")
        lags = f"A mean lags behind the run beyond about {at_most:.0%} of the steps so far"
        meanwhile = "and so will this one" if view.span is None else "so it takes the newest within these (`span`)"
        return (
            f"view {view.name!r} of {view.last or settings.config.window} snapshots every {settings.cadence.every} "
            f"spans {share:.0%} of this run. {lags}, {meanwhile}. An interval that fits: every: {fits}."
        )
    return None


def _reach(settings: WindowSettings, view: View) -> int:
    """Intervals between the oldest snapshot of a full window and the newest; blocks begin one earlier."""
    return (view.last or settings.config.window) - (settings.config.average == "last")


def _share_spanned(settings: WindowSettings, view: View, num_steps: float) -> float | None:
    every, reach = settings.cadence.every, _reach(settings, view)
    if isinstance(every, Share):
        return reach * every.percent / 100.0
    return reach * every.amount / num_steps if isinstance(every, Quantity) and every.unit == "steps" else None
