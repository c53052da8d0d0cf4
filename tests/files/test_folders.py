"""Folders appear whole or not at all, and nothing that exists is overwritten."""

import pytest

from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import folders
from pretrain_merge.files.folders import move_aside, published


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_takes_its_name_when_it_is_complete(tmp_path):
    with published(tmp_path / "deep" / "model") as folder:
        (folder / "a").write_text("1")
        assert names(tmp_path / "deep") != ["model"]
    assert names(tmp_path / "deep") == ["model"]
    assert (tmp_path / "deep" / "model" / "a").read_text() == "1"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_that_failed_leaves_nothing(tmp_path, error):
    def fail():
        with published(tmp_path / "model") as folder:
            (folder / "a").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == []


def test_everything_is_on_the_disk_before_the_name_appears(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(folders.os, "fsync", lambda descriptor: synced.append((tmp_path / "model").exists()))
    with published(tmp_path / "model") as folder:
        (folder / "a").write_text("1")
        (folder / "b").write_text("2")
    assert synced == [False, False, False, True]  # two files and the folder; after the rename, the folder above


def test_an_existing_folder_is_never_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("old")
    with pytest.raises(CheckpointError) as caught, published(tmp_path / "model"):
        pytest.fail("nothing may be written")
    assert f"{tmp_path / 'model'} exists and is never overwritten" in str(caught.value)
    assert "Move it away" in str(caught.value)
    assert (tmp_path / "model" / "a").read_text() == "old"


def test_what_a_killed_run_left_behind_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.os, "getpid", lambda: 42)
    (tmp_path / ".model.42.tmp").mkdir()
    (tmp_path / ".model.42.tmp" / "stale").write_text("half")
    with published(tmp_path / "model"):
        pass
    assert names(tmp_path / "model") == []


def test_a_disk_that_refuses_is_an_error_that_says_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as caught, published(tmp_path / "file" / "model"):
        pass
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'file' / 'model'}")
    assert "Free space there, or choose another folder" in str(caught.value)


def test_a_full_disk_leaves_nothing(tmp_path):
    def fill(folder):
        (folder / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"), published(tmp_path / "model") as folder:
        fill(folder)
    assert names(tmp_path) == []


def test_what_an_earlier_run_left_gets_the_next_free_number(tmp_path):
    for expected in ("merges.1.jsonl", "merges.2.jsonl"):
        (tmp_path / "merges.jsonl").write_text(expected)
        assert move_aside(tmp_path / "merges.jsonl") == tmp_path / expected
    assert names(tmp_path) == ["merges.1.jsonl", "merges.2.jsonl"]
    assert (tmp_path / "merges.1.jsonl").read_text() == "merges.1.jsonl"


def test_where_nothing_was_left_nothing_moves(tmp_path):
    assert move_aside(tmp_path / "merged") is None
    (tmp_path / "merged").mkdir()
    assert move_aside(tmp_path / "merged") == tmp_path / "merged.1"
