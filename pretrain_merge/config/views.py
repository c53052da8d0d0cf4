"""Named merges: from the short forms of YAML to kinds of coefficients with their parameters."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pretrain_merge import coefficients
from pretrain_merge.cadence import Share, parse_interval
from pretrain_merge.config.reading import did_you_mean
from pretrain_merge.config.schema import AUTO, EXTRAPOLATED, EXTRAPOLATED_SPAN, SPAN, WindowConfig
from pretrain_merge.errors import CoefficientError, ConfigError
from pretrain_merge.records import FORECAST, RAW

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,99}")  # names of folders, to which more is added
_SHORTHANDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ema": ("ema", {"alpha": 0.2}),  # the better of PMA's two values, early and late
    "power": ("power", {"relative_width": 0.05}),  # about the width of a plain mean over a sixth of the run
    "wsm": ("decay", {"shape": "1-sqrt"}),  # the shape that WSM (arXiv 2507.17634) found best
}
_RESERVED = (RAW, FORECAST)
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,12})?)\s*%", re.ASCII)
_LEAST_ON_A_LINE = 4  # a mean of one snapshot is raw, whose noise an extrapolation would enlarge
_ROUNDING = 1e-9  # 20% in steps of 1% are twenty
_MOST_DIGITS = 9  # of a view's number; Python refuses to read thousands


@dataclass(frozen=True)
class View:
    """A named merge: which kind of coefficients, over how many of the newest valid snapshots.

    Attributes:
        name: Name in metrics and folders.
        kind: A kind of `pretrain_merge.coefficients`.
        last: Exactly this many of the newest valid snapshots; None: all that are valid, from 2 up.
        params: Parameters of the kind.
        span: Of these, the newest that span at most this share of the steps since the last break; None: all of them.
        follows: Whether that share follows what merge points measure, beginning with `span`.
        is_auto: Whether the share is chosen anew at each merge point, beginning with `span`; or the step, of kind
            `extrapolated`, beginning with that of `params`.
        metric: By which it is chosen; None: the loss that the run measures.
    """

    name: str
    kind: str
    last: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    span: float | None = None
    follows: bool = False
    is_auto: bool = False
    metric: str | None = None


class Limit(NamedTuple):
    """How much of a run a view may span.

    Attributes:
        share: Of the steps since the last break; None: any.
        follows: Whether it follows what merge points measure, beginning with `share`.
    """

    share: float | None = None
    follows: bool = False


_ANY = Limit()


def parse_views(config: WindowConfig) -> tuple[View, ...]:
    """The views of a configuration, with shorthands spelled out.

    Raises:
        ConfigError: An unknown kind or parameter, two views of one name, or more snapshots than the window holds.
    """
    span = parse_span(config.span, "span")
    views = tuple(parse_view(value, f"views[{index}]", span) for index, value in enumerate(config.views))
    names = [view.name for view in views]
    if not views or len(set(names)) < len(names):
        raise ConfigError(f"views: {names} must be at least one view, each with a name of its own; set `name`.")
    for index, view in enumerate(views):
        # at the start of a run, not at its first merge hours later
        _try_coefficients(view, config.window, f"views[{index}]")
        if view.kind == EXTRAPOLATED:
            _try_reach(view, config, f"views[{index}]")
    return views


def parse_view(value: object, key: str, span: Limit = _ANY) -> View:
    """One view in any of its forms.

    Args:
        value: Text or a mapping.
        key: Its path, for messages.
        span: What it may span where it names neither a share nor a number of snapshots.

    Raises:
        ConfigError: It is not one.
    """
    if isinstance(value, str):
        return _parse_shorthand(value, key, span)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not NAME.fullmatch(value["name"]):
        raise ConfigError(
            f"{key}: {value!r} is not a view. Allowed: a kind ('sma'), a kind and a number of snapshots ('sma4'), or a "
            f"mapping with a `name` of at most 100 letters, digits, '_', '.', '-', a `kind`, and optionally `last` or "
            f"`span`, and parameters."
        )
    params = {str(name): item for name, item in value.items() if name not in ("name", "kind", "last", "span")}
    kind, last = value.get("kind", value["name"]), value.get("last")
    # the weights say of how many snapshots; a second number could only contradict them
    if last is None and kind == "custom" and isinstance(params.get("weights"), list):
        last = len(params["weights"])
    own = parse_span(value["span"], f"{key}.span") if "span" in value else None
    span = own or span
    if kind == AUTO:
        return _auto(View(value["name"], "sma", last, params), key, span)
    if kind == EXTRAPOLATED and last is None:
        span = own or Limit(EXTRAPOLATED_SPAN)
        if span.follows:
            raise ConfigError(
                f"{key}.span: 'auto' is a limit of means, and {value['name']!r} goes beyond one. Allowed: a share of "
                f'the run, for both of its means together, or null. Set span: "{EXTRAPOLATED_SPAN:.0%}".'
            )
    if last is not None and own is not None and own.share is not None:
        raise ConfigError(
            f"{key}.span: {value['span']!r}, and the view is of exactly {last} snapshots. Allowed: a number of "
            f"snapshots or a share of the run. Remove one of the two."
        )
    view = View(value["name"], str(kind), last, params, *(span if last is None else ()))
    return _extrapolated(view, key) if kind == EXTRAPOLATED and "step" not in params else view


def parse_span(value: object, key: str) -> Limit:
    """The share of a run that a view may span, from what people write: 0.06, "6%", "auto"; None: any.

    Raises:
        ConfigError: It is not above 0 and up to 1.
    """
    if value is None:
        return _ANY
    if value == AUTO:
        return Limit(SPAN, follows=True)
    match = _PERCENT.fullmatch(value.strip()) if isinstance(value, str) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    share: Any = float(match[1]) / 100.0 if match else value if is_number else 0.0
    if not 0.0 < share <= 1.0:
        raise ConfigError(
            f"{key}: {value!r} is not a share of the run. Allowed: above 0 and up to 1, 'auto' for one that follows "
            f"what the run measures, or null for no limit. Write it as 0.06 or '6%'."
        )
    return Limit(float(share))


def _auto(view: View, key: str, span: Limit) -> View:
    metric = view.params.get("metric")
    if view.last is not None or view.params.keys() - {"metric"} or not isinstance(metric, str | None):
        raise ConfigError(
            f"{key}: view {view.name!r} chooses its span by itself. Allowed: `metric`, the name of the loss that it "
            f"chooses by, and `span`, the share that it begins with. Remove what is given besides."
        )
    return replace(view, params={}, span=span.share or SPAN, is_auto=True, metric=metric)


def _extrapolated(view: View, key: str) -> View:
    """A view that was given no step chooses it by itself, and begins with none."""
    metric = view.params.get("metric")
    if view.params.keys() - {"metric"} or not isinstance(metric, str | None):
        raise ConfigError(
            f"{key}: view {view.name!r} was given {sorted(view.params)}. Allowed: `step`, or `metric`, the name of the "
            f"loss that it chooses its step by, and `span` or `last`. Remove what is given besides."
        )
    return replace(view, params={"step": 0.0}, follows=False, is_auto=True, metric=metric)


def num_in_full_window(view: View, config: WindowConfig) -> int | None:
    """How many snapshots a view merges of a full window; None where that depends on the age of the run."""
    every = parse_interval(config.every)
    reach = config.window - (config.average == "last")  # intervals
    if view.span is None:
        return view.last or config.window
    fits = isinstance(every, Share) and reach * every.percent / 100.0 <= view.span
    return config.window if fits and not (view.follows or view.is_auto) else None


def _parse_shorthand(text: str, key: str, span: Limit) -> View:
    letters = text.rstrip("0123456789")
    digits = text[len(letters) :]
    if text == AUTO:
        return _auto(View(text, "sma"), key, span)
    if len(digits) > _MOST_DIGITS:
        raise ConfigError(f"{key}: {text!r} is not a view; no window holds so many snapshots.")
    last = int(digits) if digits else None
    kind, params = _SHORTHANDS.get(letters, (letters, {}))
    known = list(dict.fromkeys([*coefficients.KINDS, *_SHORTHANDS, AUTO]))
    if kind not in coefficients.KINDS:
        raise ConfigError(
            f"{key}: {text!r} is not a view{did_you_mean(letters, known)} Known kinds: {', '.join(known)}."
        )
    if kind == EXTRAPOLATED:
        return _extrapolated(View(text, kind, last, span=EXTRAPOLATED_SPAN if last is None else None), key)
    return View(text, kind, last, params, *(span if last is None else ()))


def _try_reach(view: View, config: WindowConfig, key: str) -> None:
    """Refuse a line through two means where a full window never reaches over both."""
    every, more = parse_interval(config.every), int(config.average == "last")
    if (view.last or config.window) < _LEAST_ON_A_LINE:
        raise ConfigError(
            f"{key}: view {view.name!r} goes on along the line through two means, and has "
            f"{view.last or config.window} snapshots for both. Allowed: {_LEAST_ON_A_LINE} and more; raise `window`."
        )
    # a fixed interval reaches over any share while the run is young enough
    if view.span is None or not isinstance(every, Share):
        return
    needed = math.ceil(100.0 * view.span / every.percent - _ROUNDING) + more
    if config.window < needed:
        wider = Share.spanning(view.span, config.window - more, every.unit)
        raise ConfigError(
            f"{key}: view {view.name!r} goes on along the line through two means over {view.span:.3g} of the run "
            f'together, and window {config.window} at every: "{every.percent:g}%" spans less. Set window: {needed}, '
            f'every: "{wider.percent:g}%", or a smaller `span` of this view.'
        )


def _try_coefficients(view: View, window: int, key: str) -> None:
    if view.name in _RESERVED:
        raise ConfigError(f"{key}: the name {view.name!r} is taken by other metrics; choose another.")
    if view.last is not None and (isinstance(view.last, bool) or not isinstance(view.last, int)):
        raise ConfigError(f"{key}.last: {view.last!r} is not a number of snapshots. Allowed: 2 to {window}.")
    if view.last is not None and not 2 <= view.last <= window:
        raise ConfigError(
            f"{key}: view {view.name!r} needs {view.last} snapshots and the window holds {window}. "
            f"Allowed: 2 to {window}; raise `window` or lower the view's number."
        )
    if "times" in view.params:
        raise ConfigError(f"{key}.times: the times of a view are those of its snapshots. Remove the key.")
    try:
        for num_snapshots in {view.last or 2, view.last or window}:  # a shape may fail at some sizes only
            coefficients.compute(view.kind, num_snapshots, times=range(num_snapshots), **view.params)
    except CoefficientError as error:
        raise ConfigError(f"{key}: {error}") from error
