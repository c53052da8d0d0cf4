"""Named merges: from the short forms of YAML to kinds of coefficients with their parameters."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain_merge import coefficients
from pretrain_merge.config.reading import did_you_mean
from pretrain_merge.config.schema import WindowConfig
from pretrain_merge.errors import CoefficientError, ConfigError
from pretrain_merge.records import FORECAST, RAW

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,99}")  # names of folders, to which more is added
_SHORTHANDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ema": ("ema", {"alpha": 0.2}),  # the better of PMA's two values, early and late
    "wsm": ("decay", {"shape": "1-sqrt"}),  # the shape that WSM (arXiv 2507.17634) found best
}
_RESERVED = (RAW, FORECAST)
_MOST_DIGITS = 9  # of a view's number; Python refuses to read thousands


@dataclass(frozen=True)
class View:
    """A named merge: which kind of coefficients, over how many of the newest valid snapshots.

    Attributes:
        name: Name in metrics and folders.
        kind: A kind of `pretrain_merge.coefficients`.
        last: Exactly this many of the newest valid snapshots; None: all that are valid, from 2 up.
        params: Parameters of the kind.
    """

    name: str
    kind: str
    last: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict)


def parse_views(config: WindowConfig) -> tuple[View, ...]:
    """The views of a configuration, with shorthands spelled out.

    Raises:
        ConfigError: An unknown kind or parameter, two views of one name, or more snapshots than the window holds.
    """
    views = tuple(parse_view(value, f"views[{index}]") for index, value in enumerate(config.views))
    names = [view.name for view in views]
    if not views or len(set(names)) < len(names):
        raise ConfigError(f"views: {names} must be at least one view, each with a name of its own; set `name`.")
    for index, view in enumerate(views):
        _try_coefficients(view, config.window, f"views[{index}]")
    return views


def parse_view(value: object, key: str) -> View:
    """One view in any of its forms.

    Raises:
        ConfigError: It is not one.
    """
    if isinstance(value, str):
        return _parse_shorthand(value, key)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not NAME.fullmatch(value["name"]):
        raise ConfigError(
            f"{key}: {value!r} is not a view. Allowed: a kind ('sma'), a kind and a number of snapshots ('sma4'), or a "
            f"mapping with a `name` of at most 100 letters, digits, '_', '.', '-', a `kind`, and optionally `last` and "
            f"parameters."
        )
    params = {str(name): item for name, item in value.items() if name not in ("name", "kind", "last")}
    kind, last = value.get("kind", value["name"]), value.get("last")
    if last is None and kind == "custom" and isinstance(params.get("weights"), list):
        last = len(params["weights"])
    return View(value["name"], str(kind), last, params)


def _parse_shorthand(text: str, key: str) -> View:
    letters = text.rstrip("0123456789")
    digits = text[len(letters) :]
    if len(digits) > _MOST_DIGITS:
        raise ConfigError(f"{key}: {text!r} is not a view; no window holds so many snapshots.")
    last = int(digits) if digits else None
    kind, params = _SHORTHANDS.get(letters, (letters, {}))
    known = list(dict.fromkeys([*coefficients.KINDS, *_SHORTHANDS]))
    if kind not in coefficients.KINDS:
        raise ConfigError(
            f"{key}: {text!r} is not a view{did_you_mean(letters, known)} Known kinds: {', '.join(known)}."
        )
    return View(text, kind, last, params)


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
