"""What `pretrain-merge plan` expects of a measured figure, from the data sheet of the device.

Knows the plan's questions. A figure far from its estimate says that either is wrong.
"""

from dataclasses import replace

from pretrain_merge.cadence import Quantity
from pretrain_merge.plan import HARDWARE, Layout, Merging, Model, Plan, Question, Training, make_plan
from pretrain_merge.plan.times import Move

_DEFAULT = "h100"


def hardware_of(device_name: str) -> str:
    """The nearest entry of the plan's table: by a name that is part of the device's, else the H100."""
    return next((name for name in HARDWARE if name in device_name.lower()), _DEFAULT)


def plan_of(
    hardware: str, elements: int, *, window: int = 10, store: str = "device", step_seconds: float = 1.0
) -> Plan:
    """One rank of its own with so many float32 parameters; a snapshot and a merge of the window every 100 steps."""
    merging = Merging(every=Quantity(100), window=window, views=(window,), store=store)
    model = Model("measured", ((elements, 1),), elements)
    alone = replace(HARDWARE[hardware], ranks_per_host=1)
    return make_plan(Question(model, Layout(), alone, merging, Training(1, 1, step_seconds=step_seconds)))


def merge_seconds(hardware: str, elements: int, *, itemsize: int, num_snapshots: int) -> float:
    """A merge without raw put back: N streams read, one written."""
    return Move((num_snapshots + 1) * elements * itemsize, HARDWARE[hardware].memory_rate, "memory").seconds


def link_seconds(hardware: str, num_bytes: int) -> float | None:
    """From host to device or back; None where there is no link."""
    rate = HARDWARE[hardware].link_rate
    return None if rate is None else Move(num_bytes, rate, "link").seconds
