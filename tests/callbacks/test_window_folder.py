"""A window's folder: one run's alone, and an error with a remedy where it cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from callbacks.resumed_runs import MARKS, files, fit
from harness.folders import read_only_folder
from harness.models import Regression

from pretrain_merge.errors import CheckpointError
from pretrain_merge.merged_models import merged
from pretrain_merge.resume.sidecar import WindowFolder

pytestmark = MARKS


def test_a_second_run_in_the_folder_is_refused_and_the_holder_is_named(tmp_path):
    code = "import sys, time; from pathlib import Path; from pretrain_merge.resume.sidecar import WindowFolder\n"
    code += "own = WindowFolder(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, str(tmp_path / "window")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(CheckpointError, match=rf"in use by process {holder.pid} on .* since "):
                fit(tmp_path)
        finally:
            holder.kill()
    fit(tmp_path, max_steps=4)  # a killed run holds nothing
    assert "lock" not in files(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(CheckpointError, match="Set window_folder to a folder that can be written"):
        fit(tmp_path, window_folder=str(tmp_path / "blocked" / "window"))


def test_a_read_only_folder_is_an_error_with_a_remedy():
    refusal = pytest.raises(CheckpointError, match=r"cannot write to .*Permission denied.*Set window_folder")
    with read_only_folder() as folder, refusal:
        WindowFolder(folder)


def test_a_full_disk_is_an_error_with_a_remedy_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pretrain_merge.callbacks.run_folder.RunFolder.keep_config", lambda *_: None)
    monkeypatch.setattr("pretrain_merge.files.snapshot_file.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*Free space there, or set window_folder"):
        fit(tmp_path, store="device")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "merges" not in path.name] == []


def test_a_merged_model_that_reads_back_differently_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain_merge.merged_models.whole_weights.same_bits", lambda *_: False)
    with pytest.raises(CheckpointError, match="what was read back is not what was written"):
        merged.save_merged(Regression(), tmp_path / "step-1-sma", {})
    assert list(tmp_path.iterdir()) == []
