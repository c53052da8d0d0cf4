"""How much each checkpoint counts in a merge, and in which order.

This module knows sources by their steps, views as training has them, and coefficients. It knows no tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pretrain_merge import coefficients
from pretrain_merge.config.views import View, parse_view
from pretrain_merge.errors import CoefficientError, ConfigError
from pretrain_merge.offline.tensors import Source
from pretrain_merge.runtime.log import logger

ViewLike = str | Mapping[str, Any] | Sequence[float]


@dataclass(frozen=True)
class Recipe:
    """Which checkpoints are merged, and how.

    Attributes:
        sources: Oldest first.
        coefficients: One for each.
        view: Name of the view.
        kind: Of the coefficients.
        parameters: Of the kind.
        times: Steps that the coefficients were computed from; None: even spacing was assumed.
    """

    sources: tuple[Source, ...]
    coefficients: tuple[float, ...]
    view: str
    kind: str
    parameters: Mapping[str, Any]
    times: tuple[int, ...] | None

    def to_plain(self) -> dict[str, Any]:
        """For provenance: also which learning-rate decay the merge emulates, by interval, oldest first."""
        times = self.times if self.times is not None else None
        return {
            "view": self.view,
            "kind": self.kind,
            "parameters": dict(self.parameters),
            "coefficients": list(self.coefficients),
            "steps": [source.step for source in self.sources],
            "spacing": "steps" if times is not None else "even",
            "emulated_decay": list(coefficients.decay_curve(self.coefficients)),
            "n_eff": coefficients.n_eff(self.coefficients),
            "mean_age": coefficients.mean_age(self.coefficients, times),
        }


def make_recipe(sources: Sequence[Source], view: ViewLike, steps: Sequence[int] | None) -> Recipe:
    """Order the sources and compute their coefficients.

    Args:
        sources: As they were named.
        view: A view as in `views` of the configuration ('sma', 'sma4', a mapping), or the coefficients themselves.
        steps: Of the sources, as they were named; None: what they say themselves.

    Raises:
        ConfigError: The view is not one, or needs more sources than there are.
        CoefficientError: The coefficients cannot be computed.
    """
    if steps is not None:
        if len(steps) != len(sources):
            raise ConfigError(f"steps: {len(steps)} were given for {len(sources)} checkpoints. Give one for each.")
        sources = [replace(source, step=step) for source, step in zip(sources, steps, strict=True)]
    wanted = _view(view)
    ordered, times = _in_order(sources, keep_order=wanted.kind == "custom")
    if wanted.last is not None:
        if wanted.last > len(ordered):
            raise ConfigError(
                f"view: {wanted.name!r} needs {wanted.last} checkpoints and {len(ordered)} were named. Name more, or "
                f"take a smaller view."
            )
        # the newest ones, as a window would hold
        ordered, times = ordered[-wanted.last :], times and times[-wanted.last :]
    if times is None and _needs_times(wanted):
        raise ConfigError(
            f"view: {wanted.name!r} depends on the steps between checkpoints, and "
            f"{', '.join(f'{source.place}: {source.step}' for source in ordered[:5])} do not give one step each. Say "
            f"them with steps."
        )
    # the one place that knows kinds; training has the same numbers from it
    numbers = coefficients.compute(wanted.kind, len(ordered), times=times, **wanted.params)
    unknown = [source.place for source in ordered if source.step is None]
    # whoever spells coefficients out gives the order too; of a plain mean of files without steps it hardly matters
    is_said = wanted.kind == "custom" or len(ordered) == 1
    if unknown and not is_said and (len(unknown) < len(ordered) or len(set(numbers)) > 1):
        logger.warning(
            f"{unknown[0]} does not say its step, so checkpoints count in the order in which they were named, those of "
            f"a folder by name: {ordered[-1].place} is taken for the newest. If it is not, say their steps with steps."
        )
    return Recipe(tuple(ordered), numbers, wanted.name, wanted.kind, wanted.params, times)


def _view(view: ViewLike) -> View:
    if isinstance(view, str | Mapping):
        parsed = parse_view(view, "view")
        if parsed.is_auto:
            raise ConfigError(
                f"view: {parsed.name!r} chooses by what a run measures, and a merge of files measures nothing. "
                f"Allowed: what is spelled out, such as 'sma' or {{kind: extrapolated, step: 0.2}}. Name one of those."
            )
        if "times" in parsed.params:
            raise ConfigError("view.times: the times of a merge are the steps of its checkpoints. Give them as steps.")
        return parsed
    try:
        # a text is a sequence too, and was taken care of above
        weights = [float(weight) for weight in view]
    except (TypeError, ValueError) as error:
        raise CoefficientError(f"view is {view!r}; allowed is a view, or a list of numbers that sum to 1.") from error
    return View("custom", "custom", params={"weights": weights})


def _in_order(sources: Sequence[Source], *, keep_order: bool) -> tuple[list[Source], tuple[int, ...] | None]:
    """By their steps where each has one of its own; else as they were named, which says nothing of their spacing.

    Coefficients that are spelled out belong to the checkpoints in the order in which both were named.
    """
    steps = [source.step for source in sources if source.step is not None]
    # two of one step, or one without, have no order but that of the words
    if len(set(steps)) < len(sources):
        return list(sources), None
    if keep_order:
        return list(sources), tuple(steps) if steps == sorted(steps) else None
    ordered = sorted(sources, key=lambda source: source.step or 0)
    return ordered, tuple(sorted(steps))


def _needs_times(view: View) -> bool:
    return view.kind in ("decay", "qam", "power") or "half_life" in view.params
