"""What merging will cost a run, before it starts: pure arithmetic, no torch.

`make_plan` takes a `Question`: a model's shapes, a layout over ranks, hardware, the callback's configuration, the run.
Where shapes come from and how a plan is shown is the business of `plan_command`.
"""

from pretrain_merge.plan.costs import Cost, Place, Plan, make_plan
from pretrain_merge.plan.hardware import HARDWARE, Hardware, Measured
from pretrain_merge.plan.inputs import Merging, Question, Training
from pretrain_merge.plan.paper import Advice, used_for
from pretrain_merge.plan.shards import Layout, Model

__all__ = [
    "HARDWARE",
    "Advice",
    "Cost",
    "Hardware",
    "Layout",
    "Measured",
    "Merging",
    "Model",
    "Place",
    "Plan",
    "Question",
    "Training",
    "make_plan",
    "used_for",
]
