"""The classes that a callback inherits from, so that Trainers of `lightning` and of `pytorch_lightning` take it."""

from importlib.util import find_spec

import lightning.pytorch as lightning

CALLBACKS: tuple[type, ...] = (lightning.Callback,)
if find_spec("pytorch_lightning"):
    # the same library under its other name: a Trainer of either checks for the Callback class of its own
    from pytorch_lightning import Callback as _OtherCallback

    CALLBACKS += (_OtherCallback,)
