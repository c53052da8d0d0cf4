"""A merge that is killed at any moment: no folder that looks complete and is not; the rerun ends with equal bytes."""

import fcntl
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from harness.forks import run_forked
from offline import writers
from safetensors.torch import load_file

from pretrain_merge import merge_checkpoints, sweep_checkpoints
from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic
from pretrain_merge.offline import shards, stream
from pretrain_merge.offline.candidates import FolderBench
from pretrain_merge.offline.merge import merge_checkpoints as merge
from pretrain_merge.records import jsonl

SIZE = 400  # bytes of a file, so that there are several


def tensors(step):
    torch.manual_seed(step)
    return {f"layer.{number}.weight": torch.randn(8, 8) for number in range(4)}


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2, 3):
        writers.safetensors_file(tmp_path, step, tensors(step))
    return tmp_path


def places(folder):
    return sorted(folder.glob("*.safetensors"))


def merge_and_die(folder, moment, number):
    """Merges, and is killed before or behind the so-and-so-many-th call of what changes the disk.

    `publish` gives names: 1 the plan, then by turns a file and its note, at last the provenance.
    """
    owner, name = {"write": (shards.ShardWriter, "write"), "publish": (atomic, "publish"), "rename": (Path, "rename")}[
        moment.split()[1]
    ]
    real, left = getattr(owner, name), [int(number)]

    def dying(*arguments, **options):
        left[0] -= 1
        if left[0] == 0 and moment.startswith("before"):
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments, **options)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)
    merge(places(Path(folder)), Path(folder) / "out", largest_file=SIZE)


def loss_of(folder):
    return {"val_loss": sum(value.square().sum().item() for value in load_file(folder / "model.safetensors").values())}


def sweep_and_die(folder, moment, number):
    """Sweeps, and is killed before or behind the so-and-so-many-th of what changes its folder."""
    owner, name = {"append": (jsonl.atomic, "append"), "rename": (Path, "rename"), "measure": (FolderBench, "measure")}[
        moment.split()[1]
    ]
    real, left = getattr(owner, name), [int(number)]

    def dying(*arguments, **options):
        if name == "rename" and arguments[1].name != "swept":  # of a model that is evaluated
            return real(*arguments, **options)
        left[0] -= 1
        if left[0] == 0 and moment.startswith("before"):
            os.kill(os.getpid(), signal.SIGKILL)
        if left[0] == 0 and moment.startswith("amid"):  # half a line
            arguments = (arguments[0], arguments[1][: len(arguments[1]) // 2])
        done = real(*arguments, **options)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(owner, name, dying)
    sweep_checkpoints(places(Path(folder)), Path(folder) / "swept", loss_of, views=["sma"])


@pytest.mark.parametrize(
    ("moment", "number", "left"),
    [
        ("before measure", 3, 2),
        ("amid append", 2, 2),
        ("behind append", 1, 2),
        ("before rename", 1, 0),
        ("behind rename", 1, None),
    ],
)
def test_a_killed_sweep_leaves_no_folder_and_its_rerun_ends_with_equal_bytes(folder, moment, number, left):
    code, output = run_forked(sweep_and_die, str(folder), moment, str(number))
    assert code == -signal.SIGKILL, output
    assert (folder / "swept").exists() == (left is None)
    evaluated = []
    if left is not None:

        def evaluate(place):
            evaluated.append(place)
            return loss_of(place)

        sweep_checkpoints(places(folder), folder / "swept", evaluate, views=["sma"])
        assert len(evaluated) == left
    sweep_checkpoints(places(folder), folder / "other", loss_of, views=["sma"])
    assert contents(folder / "swept") == contents(folder / "other")
    # a process that was killed behind its last rename leaves an empty lock, which hinders nobody
    assert left is None or [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("moment", "number", "kept"),
    [
        ("before publish", 1, 0),
        ("behind write", 3, 1),
        ("before publish", 4, 1),
        ("behind publish", 4, 1),  # a file without its note
        ("behind publish", 5, 2),
        ("before publish", 10, 4),
        ("before rename", 1, 0),  # the folder is complete, but for its name; its notes are gone
    ],
)
def test_a_killed_merge_leaves_no_folder_and_its_rerun_ends_with_equal_bytes(folder, caplog, moment, number, kept):
    code, output = run_forked(merge_and_die, str(folder), moment, str(number))
    assert code == -signal.SIGKILL, output
    assert not (folder / "out").exists()
    with caplog.at_level("INFO"):
        merge_checkpoints(places(folder), folder / "out", largest_file=SIZE)
    assert sum("was finished before" in record.message for record in caplog.records) == kept
    merge_checkpoints(places(folder), folder / "other", largest_file=SIZE)
    assert contents(folder / "out") == contents(folder / "other")
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_merge_killed_behind_the_last_rename_is_complete(folder):
    code, output = run_forked(merge_and_die, str(folder), "behind rename", "1")
    assert code == -signal.SIGKILL, output
    merge_checkpoints(places(folder), folder / "other", largest_file=SIZE)
    assert contents(folder / "out") == contents(folder / "other")


@pytest.fixture
def partial(folder, monkeypatch):
    """What is left of a merge that an error broke off behind its second file: the same as after a kill."""
    calls = []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 6:
            raise OSError(5, "Input/output error")
        real(*arguments, **options)

    real = atomic.publish
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "publish", failing)
        with pytest.raises(CheckpointError, match="Input/output"):
            merge_checkpoints(places(folder), folder / "out", largest_file=SIZE)
    return folder / ".out.partial"


def test_a_finished_file_that_was_damaged_since_is_written_again(folder, partial):
    path = min(partial.glob("model-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    merge_checkpoints(places(folder), folder / "out", largest_file=SIZE)
    merge_checkpoints(places(folder), folder / "other", largest_file=SIZE)
    assert contents(folder / "out") == contents(folder / "other")


@pytest.mark.parametrize("change", ["view", "source", "plan"])
def test_files_of_another_merge_are_not_gone_on_with(folder, partial, change):
    view = "wma" if change == "view" else "sma"
    if change == "source":
        writers.safetensors_file(folder, 2, tensors(7))
    if change == "plan":
        (partial / "plan.json").write_bytes(b"\xff")
    merge_checkpoints(places(folder), folder / "out", view, largest_file=SIZE)
    merge_checkpoints(places(folder), folder / "other", view, largest_file=SIZE)
    assert contents(folder / "out") == contents(folder / "other")


def test_what_is_read_back_is_compared(folder, monkeypatch):
    real = os.preadv

    def spoilt(descriptor, buffers, start):
        count = real(descriptor, buffers, start)
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR:  # what is written, not what is merged
            buffers[0][0] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", spoilt)
    with pytest.raises(CheckpointError, match="read back"):
        merge_checkpoints(places(folder), folder / "out")
    assert not (folder / "out").exists()


def test_a_full_disk_is_an_error_of_ours(folder, monkeypatch):
    real = os.pwrite

    def full(descriptor, data, position):
        if isinstance(data, memoryview):  # a file of weights, not the lock
            raise OSError(28, "No space left on device")
        return real(descriptor, data, position)

    monkeypatch.setattr(shards.os, "pwrite", full)
    with pytest.raises(CheckpointError, match=r"No space left.*Free space"):
        merge_checkpoints(places(folder), folder / "out")
    assert not (folder / "out").exists()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_two_merges_into_one_folder_do_not_meet(folder):
    from pretrain_merge.files import folder_lock

    folder_lock.claim(folder / ".out.lock", remedy="")
    try:
        with pytest.raises(CheckpointError, match="in use"):
            merge_checkpoints(places(folder), folder / "out")
    finally:
        folder_lock.release(folder / ".out.lock")


@pytest.mark.parametrize("number", [1, 2])
def test_what_the_disk_refuses_while_more_is_written_is_an_error_though_it_tells_once(folder, monkeypatch, number):
    monkeypatch.setattr(shards, "_FLUSHED", 1)
    monkeypatch.setattr(stream, "_LARGEST_BATCH", 128)
    real, left = os.fsync, [number]

    def refusing(descriptor):
        left[0] -= threading.current_thread().name.startswith("ThreadPool")
        if left[0] == 0:
            left[0] = -1
            raise OSError(5, "the disk is broken")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    with pytest.raises(CheckpointError, match="the disk is broken"):
        merge(places(folder), folder / "out")
    assert sorted(folder.iterdir()) == places(folder)
