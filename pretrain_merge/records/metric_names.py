"""Names of metrics as people write them: found where they are spelt another way, refused with the nearest one.

This module knows text. Which metrics there are is told by whoever measured them.
"""

import re
from collections.abc import Iterable

from pretrain_merge.errors import ConfigError, nearest

_BETWEEN_WORDS = re.compile(r"[^a-z0-9]+")
_USUAL_LOSS = ("val_loss", "valid_loss", "validation_loss", "eval_loss")  # in this order, where a run measures several
_FORKS = ("_epoch", "_step")  # Lightning logs a metric under these too, where it is logged by step and by epoch


def found(wanted: str, measured: Iterable[str]) -> str | None:
    """The measured name that is meant: itself, or the only one that differs in signs between words or in capitals.

    >>> found("val_loss", ["acc", "val/loss"])
    'val/loss'
    """
    names = list(measured)
    if wanted in names:
        return wanted
    alike = [name for name in names if _plain(name) == _plain(wanted)]
    # `val/loss` for `val_loss`; of two such names neither is guessed
    return alike[0] if len(alike) == 1 else None


def the_loss(measured: Iterable[str]) -> str | None:
    """The loss of a run that was not told which: the only name with "loss" in it, or the usual one among several.

    >>> the_loss(["acc", "val/loss"]), the_loss(["lm_loss", "aux_loss"]), the_loss(["aux_loss", "val_loss"])
    ('val/loss', None, 'val_loss')
    """
    names = [name for name in measured if "loss" in name.lower()]
    names = [name for name in names if not any(name == other + fork for other in names for fork in _FORKS)]
    usual = [name for loss in _USUAL_LOSS for name in names if _plain(name) == loss]
    return names[0] if len(names) == 1 else next(iter(usual), None)


def to_show(measured: Iterable[str]) -> str | None:
    """The metric of a run that somebody looks at who named none: the loss, else the first that was measured.

    >>> to_show(["val_acc", "val_loss"]), to_show(["val_acc", "val_f1"]), to_show([])
    ('val_loss', 'val_acc', None)
    """
    names = list(measured)
    return the_loss(names) or next(iter(names), None)


def measured_name(key: str, wanted: str, measured: Iterable[str]) -> str:
    """The measured name that a key of the configuration means.

    Raises:
        ConfigError: None was measured; names the nearest.
    """
    names = list(measured)
    name = found(wanted, names)
    if name is None:
        known = ", ".join(names) or "nothing"
        raise ConfigError(f"{key}: {wanted!r} was not measured. Measured: {known}.{did_you_mean(wanted, names)}")
    return name


def did_you_mean(wanted: str, known: Iterable[str]) -> str:
    """`" Did you mean 'val_loss'?"`, or nothing where no known name is near."""
    names = list(known)
    # several loaders: Lightning logs `val_loss` as `val_loss/dataloader_idx_0` and so on
    near = nearest(wanted, names) or next((name for name in names if name.startswith(f"{wanted}/")), None)
    return f" Did you mean {near!r}?" if near else ""


def _plain(name: str) -> str:
    return _BETWEEN_WORDS.sub("_", name.lower())
