"""Every seeded fault has its one place in the package as it is now, and tests that exist."""

from pathlib import Path

from tests.mutations.catalogue import FAULTS

ROOT = Path(__file__).parents[2]


def test_no_fault_is_stale():
    assert len(FAULTS) >= 30
    for fault in FAULTS:
        fault.check(ROOT)
        assert fault.before != fault.after
        assert all((ROOT / test.partition("::")[0]).exists() for test in fault.tests.split()), fault.what
