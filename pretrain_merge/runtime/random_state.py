"""The random numbers of the process, kept while something else draws from them (P6).

This module knows the generators that a process has without being asked: Python's, NumPy's, torch's on the CPU and on
every CUDA device. Generators that a user's objects hold (a loader's, a sampler's) are those objects' business.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept() -> Iterator[Callable[[], None]]:
    """Yields a function that sets all generators back to where they were when the block began; so does its end."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def set_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    try:
        yield set_back
    finally:
        set_back()
