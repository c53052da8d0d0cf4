"""Whether an error came from code of the user's that an evaluation ran, or from what is around it.

An evaluation that failed may be done without; a model that could not be put back may not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_MARK = "_from_users_code"


@contextmanager
def users_code() -> Iterator[None]:
    """Inside runs the user's code: what it raises is marked."""
    try:
        yield
    except Exception as error:
        setattr(error, _MARK, True)
        raise


def is_of_users_code(error: BaseException) -> bool:
    """Whether the error was marked, and not one that came of it while things were put back."""
    return hasattr(error, _MARK)
