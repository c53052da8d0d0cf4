"""A run that somebody might have, built anew each time, so that two runs share nothing."""

from dataclasses import dataclass, field
from typing import Any

import torch
from harness.models import Regression, rows


@dataclass
class Situation:
    """A run that somebody might have, built anew for each of the two runs."""

    module: Any = field(default_factory=Regression)
    train: Any = field(default_factory=lambda: rows(shuffle=True))
    validation: Any = field(default_factory=lambda: rows(10, seed=1))
    generators: tuple[torch.Generator, ...] = ()
    callbacks: tuple[Any, ...] = ()
    callbacks_first: bool = False
    data: Any = None
    options: dict[str, Any] = field(default_factory=dict)
