"""Faults of the plan."""

from tests.mutations.catalogue.fault import Fault

_PLAN = "tests/plan"

FAULTS = (
    Fault(
        "the plan's shards round down",
        "plan/shards.py",
        "own = -(-rows // self.shard)",
        "own = rows // self.shard",
        _PLAN,
    ),
    Fault(
        "the plan forgets the sum of a block",
        "plan/costs.py",
        "accumulator = elements * merging.accumulator_itemsize",
        "accumulator = elements * merging.slot_itemsize",
        _PLAN,
    ),
    Fault(
        "the plan forgets that a slot's old file stays",
        "plan/costs.py",
        "Place(window + slot,",
        "Place(window,",
        _PLAN,
    ),
    Fault(
        "the plan forgets the scratch copy of narrow slots",
        "plan/inputs.py",
        "return self.in_blocks or self.slot_itemsize < self.itemsize",
        "return self.in_blocks",
        _PLAN,
    ),
    Fault(
        "the plan takes the pages of a copy aside for granted",
        "plan/times.py",
        "(4 if self.hardware.link_rate else 5)",
        "4",
        _PLAN,
    ),
    Fault(
        "the plan hides a core's arithmetic behind memory",
        "plan/times.py",
        "if rate is not None else ()",
        "if rate is None else ()",
        _PLAN,
    ),
    Fault(
        "the plan reads the paper's rows in straight lines",
        "plan/paper.py",
        "position = math.log(activated / below.parameters) / math.log(above.parameters / below.parameters)",
        "position = (activated - below.parameters) / (above.parameters - below.parameters)",
        _PLAN,
    ),
)
