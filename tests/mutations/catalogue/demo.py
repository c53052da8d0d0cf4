"""Faults of the demo."""

from tests.mutations.catalogue.fault import Fault

FAULTS = (
    Fault(
        "the branch begins one snapshot late",
        "demo/experiment.py",
        'back = config.window + (config.average == "block")',
        'back = config.window - 1 + (config.average == "block")',
        "tests/demo/test_run.py",
    ),
    Fault(
        "a router is compared with itself",
        "demo/routing.py",
        "* _chosen(other, num_chosen)",
        "* _chosen(logits, num_chosen)",
        "tests/demo/test_routing.py",
    ),
    Fault(
        "the anneal sees other data",
        "demo/run.py",
        "first_step=branch.start",
        "first_step=0",
        "tests/demo/test_run.py",
    ),
)
