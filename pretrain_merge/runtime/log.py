"""Saying a thing once: what a user must know, without a line every step.

This module knows text. It goes to Python's logging, so it can be silenced or kept like any other message.
"""

import logging

from pretrain_merge.errors import printable

logger = logging.getLogger("pretrain_merge")


def _as_text(record: logging.LogRecord) -> bool:
    """Names and reasons in a message may come from files that others wrote; a terminal must not obey them."""
    # formatted here, so that no handler formats the raw text again
    record.msg, record.args = printable(record.getMessage(), keep="\n"), None
    return True


logger.addFilter(_as_text)


class WarnOnce:
    """Messages that were said already, by key."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def warn(self, key: str, message: str) -> None:
        """Say the message unless one with this key was said before."""
        if key not in self._said:
            self._said.add(key)
            logger.warning(message)
