"""What LightningCLI says of our keys: our sentence first, before what its parser says of all the types that it tried.

The parser refuses an unknown key before our schema sees it, and wraps our own errors in its own (P40). Its public
`error` and `instantiate` are wrapped, once, and change nothing but the text of errors that name our callback.
This module knows jsonargparse's messages by two patterns; where they change, its text stays as it is.
"""

import functools
import re
from typing import Any, NoReturn

import yaml

from pretrain_merge.config import MergeConfig, parse_settings, refuse_misfits
from pretrain_merge.errors import ConfigError, PretrainMergeError

_OURS = r"class_path 'pretrain_merge\.(?:\w+\.)*ModelMerging':\s+"
_UNKNOWN = re.compile(_OURS + r"Option '([\w.]+)' is not accepted")
_MISFIT = re.compile(_OURS + r'Parser key "([\w.]+)":.*?Got value: ([^\n]*)', re.DOTALL)


def explain_errors() -> None:
    """Wrap the parser, where it is installed and not wrapped yet."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        return
    parsers: Any = ArgumentParser
    if hasattr(parsers.error, "__wrapped__"):
        return
    parsers.error = _with_our_sentence(parsers.error)
    # earlier releases have the second only; where both are, it calls the first
    name = "instantiate" if hasattr(parsers, "instantiate") else "instantiate_classes"
    setattr(parsers, name, _ending_with_ours(getattr(parsers, name)))


def _with_our_sentence(say: Any) -> Any:
    @functools.wraps(say)
    def error(self: Any, message: str, *arguments: Any, **options: Any) -> NoReturn:
        say(self, _explained(str(message)), *arguments, **options)
        raise AssertionError("the parser's error returns never")

    return error


def _ending_with_ours(instantiate: Any) -> Any:
    @functools.wraps(instantiate)
    def instantiated(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return instantiate(self, *arguments, **options)
        except ValueError as error:
            cause = error.__cause__  # the parser's own is around ours
            while cause is not None and not isinstance(cause, PretrainMergeError):
                cause = cause.__cause__
            if cause is None:
                raise
            return self.error(str(cause), error)

    return instantiated


def _explained(message: str) -> str:
    """The message, after our sentence where it is about a key of ours."""
    try:
        if found := _UNKNOWN.search(message):
            refuse_misfits(MergeConfig, {found[1]: None})
        elif found := _MISFIT.search(message):
            parse_settings({found[1]: yaml.safe_load(found[2])})
    except ConfigError as error:
        return f"{error}\n{message}"
    except yaml.YAMLError:  # a value that the parser shows in another form
        pass
    return message
