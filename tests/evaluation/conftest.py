"""Every test starts from the same random numbers."""

import pytest
from lightning.pytorch import seed_everything


@pytest.fixture(autouse=True)
def _seeded():
    seed_everything(0, verbose=False)
