"""A folder for disk stores, and stores in it that are cleared at the end."""

import pytest

from pretrain_merge.stores.disk import DiskStore


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "window"


@pytest.fixture
def new_store(folder):
    """Makes stores in one folder, which are cleared at the end even where a write failed."""
    made = []

    def new(**options):
        made.append(DiskStore(folder, **options))
        return made[-1]

    yield new
    for store in made:
        store.clear()
