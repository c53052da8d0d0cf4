"""Every error that this package raises on purpose, in one tree.

Each class is also the built-in exception that somebody who has never heard of this package would catch::

    PretrainMergeError
    ├── ConfigError (ValueError)             a key, type or value of the configuration
    ├── CoefficientError (ValueError)        a kind of coefficients or one of its parameters
    ├── MergeInputError (ValueError)         tensors that cannot be merged with each other
    ├── UnsupportedModelError (TypeError)    a model or strategy that cannot be merged exactly
    ├── WindowNotReadyError (RuntimeError)   a view asks for more snapshots than are valid now
    ├── ForecastError (ValueError)           records that do not allow the forecast that was asked for
    ├── EvaluationError (RuntimeError)       raw and merged could not be measured on the same batches
    ├── RankError (RuntimeError)             another rank failed, and this one stops with it
    ├── ProgressError (ValueError)           a counter that went backwards, or tokens that cannot be counted
    ├── DivergenceError (RuntimeError)       a run that diverged once more than SpikeRecovery may take it back
    ├── CheckpointError (OSError)            a file or folder of weights that cannot be read or written as asked
    └── MissingDependencyError (ImportError) an optional library that this call needs

A message says what was given, what is allowed and what to do.
"""

import difflib
from collections.abc import Iterable

_LONGEST_TEXT = 10_000  # characters; the reasons of many ranks fit


class PretrainMergeError(Exception):
    """Base of every error that this package raises on purpose.

    Its text never holds a control character: names and reasons in it may come from files that others wrote.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n")


class ConfigError(PretrainMergeError, ValueError):
    """A key, type or value of the configuration is wrong; the message starts with the key's path."""


class CoefficientError(PretrainMergeError, ValueError):
    """A kind of coefficients is unknown, or one of its parameters is out of range."""


class MergeInputError(PretrainMergeError, ValueError):
    """Tensors handed to a merge do not fit each other (count, shape, dtype, device, overlap)."""


class UnsupportedModelError(PretrainMergeError, TypeError):
    """The model, a parameter or the strategy cannot be merged exactly; the message names the way out."""


class WindowNotReadyError(PretrainMergeError, RuntimeError):
    """A view needs more valid snapshots than the window holds since the last break."""


class ForecastError(PretrainMergeError, ValueError):
    """The records do not allow the forecast that was asked for; the message says why, and from when on they will."""


class EvaluationError(PretrainMergeError, RuntimeError):
    """Raw and merged weights could not be measured on the same batches."""


class RankError(PretrainMergeError, RuntimeError):
    """Another rank failed; the message has its reason."""


class ProgressError(PretrainMergeError, ValueError):
    """A step, sample or token counter went backwards, or cannot be read from a batch."""


class DivergenceError(PretrainMergeError, RuntimeError):
    """Training diverged, and cannot be taken back once more; the message says from where to go on."""


class CheckpointError(PretrainMergeError, OSError):
    """A file or folder of weights cannot be read or written as asked."""


class MissingDependencyError(PretrainMergeError, ImportError):
    """An optional library is needed here; the message names the extra that installs it."""


def printable(text: object, *, keep: str = "") -> str:
    r"""Text that a terminal shows and does not obey: what is not printable is spelled out, the endless is shortened.

    >>> printable("loss" + chr(27) + "[2J") == r"loss\x1b[2J"
    True

    Args:
        text: Whatever a file, a path or somebody else's error says.
        keep: Characters that stay as they are.
    """
    text = str(text)
    if len(text) > _LONGEST_TEXT:
        text = f"{text[: _LONGEST_TEXT // 2]} … {text[-_LONGEST_TEXT // 2 :]}"
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in keep else ascii(character)[1:-1] for character in text
    )


def nearest(given: object, known: Iterable[str]) -> str | None:
    """The known name that a misspelling most likely meant; None where nothing is near.

    >>> nearest("windw", ["window", "every"])
    'window'
    """
    return next(iter(difflib.get_close_matches(str(given).lower(), list(known), n=1)), None)
