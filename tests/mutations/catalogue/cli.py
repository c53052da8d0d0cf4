"""Faults of the command."""

from tests.mutations.catalogue.fault import Fault

FAULTS = (
    Fault(
        "a narrow terminal cuts numbers off",
        "cli/merges_table.py",
        "if number <= 1 or Measurement",
        "if True or Measurement",
        "tests/cli/test_report.py",
    ),
    Fault(
        "the run of somebody else is not read, since no picture can be written beside it",
        "cli/results.py",
        "        if wanted is not None:",
        "        if True:",
        "tests/cli/test_report.py",
    ),
)
