"""Faults of the configuration."""

from tests.mutations.catalogue.fault import Fault

FAULTS = (
    Fault(
        "an alias is counted once however often it is named",
        "config/yaml_file.py",
        "return 1 + sum(map(self.of, node.value))",
        "return 1",
        "tests/attacks/test_crafted_files.py",
    ),
)
