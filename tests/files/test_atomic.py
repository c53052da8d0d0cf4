"""Many files at once: all on the disk before one has its name, the folder flushed once, and none where one fails."""

import os
from pathlib import Path

import pytest

from pretrain_merge.files import atomic


@pytest.fixture
def calls(monkeypatch):
    """What was flushed, by the name that it had then, and what was renamed, in order."""
    calls = []
    fsync, replace = os.fsync, Path.replace

    def counted_fsync(descriptor):
        calls.append(("flush", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def counted_replace(path, target):
        calls.append(("name", Path(target).name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", counted_fsync)
    monkeypatch.setattr(Path, "replace", counted_replace)
    return calls


def write_all(folder, number):
    with atomic.batch() as batch:
        for index in range(number):
            with atomic.draft(folder / f"file-{index}", batch=batch) as draft:
                draft.file.write(b"content")


def test_files_of_a_batch_are_flushed_before_one_has_its_name_and_their_folder_once(tmp_path, calls):
    write_all(tmp_path, 20)
    whats = [what for what, _ in calls]
    assert whats == ["flush"] * 20 + ["name"] * 20 + ["flush"]
    assert calls[-1] == ("flush", tmp_path.name)
    assert len({name for what, name in calls if what == "flush"}) == 21
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"file-{index}" for index in range(20))


def test_a_batch_of_large_files_does_not_hold_them_all_back(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(atomic, "_MOST_PENDING", 20)
    write_all(tmp_path, 9)
    names = [index for index, (what, _) in enumerate(calls) if what == "name"]
    assert names[2] < len(calls) // 2  # three of 7 bytes are more than 20
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"file-{index}" for index in range(9)]


def test_where_one_cannot_be_flushed_none_has_its_name(tmp_path, monkeypatch):
    fsync, left = os.fsync, [5]

    def full(descriptor):
        left[0] -= 1
        if left[0] == 0:
            raise OSError("no space left")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_all(tmp_path, 10)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_is_broken_off_leaves_nothing(tmp_path):
    def broken_off():
        with atomic.batch() as batch, atomic.draft(tmp_path / "file", batch=batch) as draft:
            draft.file.write(b"content")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert list(tmp_path.iterdir()) == []
