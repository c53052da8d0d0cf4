"""Faults of the command."""

from tests.mutations.catalogue.fault import Fault

FAULTS = (
    Fault(
        "a narrow terminal cuts numbers off",
        "cli/report.py",
        "if number <= 1 or Measurement",
        "if True or Measurement",
        "tests/cli/test_report.py",
    ),
)
