"""What a process of the tests does without: what no test can see, and all of them together wait minutes for.

Imported before anything that may hold one of these functions. This module knows no library under test.
"""

import functools
import importlib.metadata
import os
from typing import Any

# What is installed does not change while tests run. Every Trainer lists it, and every merged model tells versions: a
# directory listing and a file for each package, a tenth of a short run.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)
importlib.metadata.version = functools.cache(importlib.metadata.version)


def _without_the_disk(file: Any) -> None:
    os.fstat(file if isinstance(file, int) else file.fileno())  # a closed one is still an error


# A test may kill a process, and what that process wrote stays; it cannot cut the power. Those that ask what is flushed,
# and when, put a function of their own here.
os.fsync = _without_the_disk
