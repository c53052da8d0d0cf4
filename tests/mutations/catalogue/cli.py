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
    Fault(
        "of an option that is given twice the last counts alone",
        "cli/arguments.py",
        "lists.setdefault(name, []).extend(",
        "lists[name] = (",
        "tests/cli/test_merge.py",
    ),
    Fault(
        "a reader who leaves ends a command with a traceback",
        "cli/main.py",
        "        _end_unread()\n        raise\n",
        "        raise\n",
        "tests/cli/test_main.py",
    ),
    Fault(
        "a loss below 0 is a target",
        "cli/forecast.py",
        "math.isfinite(loss) and loss > 0.0",
        "math.isfinite(loss)",
        "tests/cli/test_forecast.py",
    ),
    Fault(
        "a report looks for val_loss alone",
        "cli/report.py",
        "(metric_names.to_show(common or known) if wanted",
        '("val_loss" if wanted',
        "tests/cli/test_main.py",
    ),
)
