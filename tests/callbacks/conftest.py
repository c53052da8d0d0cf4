"""Every test starts from the same random numbers; one whole run serves all that copy it."""

from pathlib import Path

import pytest
from callbacks.resumed_runs import fit
from lightning.pytorch import seed_everything


@pytest.fixture(autouse=True)
def _seeded():
    seed_everything(0, verbose=False)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to its end with all its checkpoints, to be copied and never changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(folder)
    return folder
