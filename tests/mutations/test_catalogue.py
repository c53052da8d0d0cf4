"""Every seeded fault has its one place in the package as it is, stands with its stage, and names tests that exist."""

from pathlib import Path

import pytest

from tests.mutations.catalogue import FAULTS, STAGES

ROOT = Path(__file__).parents[2]


def is_there(test: str) -> bool:
    """Whether a file or folder of tests exists, and the test of it that is named."""
    path, _, name = test.partition("::")
    name = name.partition("[")[0]
    return (ROOT / path).exists() and (not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"))


def test_no_fault_is_stale():
    assert len(FAULTS) >= 30
    for fault in FAULTS:
        fault.check(ROOT)
        assert fault.before != fault.after
        assert all(map(is_there, fault.tests.split())), fault.what


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__.rpartition(".")[2])
def test_a_fault_stands_in_the_file_of_its_folder(stage):
    name = stage.__name__.rpartition(".")[2]
    folders = {fault.file.rpartition("/")[0].partition("/")[0] for fault in stage.FAULTS}
    assert folders == {"" if name == "loose" else name}
