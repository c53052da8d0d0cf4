"""The folder of a window: what checkpoints need is kept, also through kills, and a save costs as much as the first."""

import json
import os

import pytest

from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic
from pretrain_merge.resume import needs
from pretrain_merge.resume.sidecar import WindowFolder


def name(step):
    return f"snapshot-{step:08d}-0123abcd.safetensors"


class Run:
    """A run that keeps its checkpoints: each needs its own snapshot and the one before."""

    def __init__(self, folder, **options):
        self.folder = folder
        self.window = WindowFolder(folder, **options)
        self.there = {}
        self.asked = []

    def fingerprint_of(self, path):
        self.asked.append(path)
        return self.there.get(path)

    def save(self, step):
        (self.folder / name(step)).write_text("weights")
        held = [name(step - 1), name(step)]
        path = f"step={step}.ckpt"
        self.window.register(path, held, self.there.get(path))
        self.there[path] = f"file of step {step}"
        self.asked.clear()
        self.window.prune(held, self.fingerprint_of, thoroughly=False)
        return held


def snapshots(folder):
    return {path.name for path in folder.glob("snapshot-*")}


def listed(folder):
    return needs.read_needs(folder)


def test_a_save_looks_at_few_checkpoints_and_writes_one_line_however_many_there_are(tmp_path, monkeypatch):
    run, written, listings = Run(tmp_path), [], []
    append, write = atomic.append, atomic.write
    monkeypatch.setattr(atomic, "append", lambda path, text, **o: written.append(len(text)) or append(path, text, **o))
    monkeypatch.setattr(atomic, "write", lambda path, text: written.append(len(text)) or write(path, text))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for step in range(1, 501):
        if step == 100:  # what is gone is listed anew only where the run starts and ends
            monkeypatch.setattr(WindowFolder, "_files", lambda self: listings.append(1) or [])
        written.clear()
        run.save(step)
        assert len(run.asked) <= 64
        assert sum(written) < 200
    assert not listings
    assert len(listed(tmp_path)) == 500


def test_a_checkpoint_that_is_gone_is_noticed_in_its_turn_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    run = Run(tmp_path)
    for step in range(1, 201):
        run.save(step)
    for step in range(10, 21):
        del run.there[f"step={step}.ckpt"]
    for step in range(201, 206):
        run.save(step)
    assert snapshots(tmp_path) == {name(step) for step in range(1, 206)} - {name(step) for step in range(10, 20)}
    for step in range(30, 201):
        del run.there[f"step={step}.ckpt"]
    held = run.save(206)
    run.window.prune(held, run.fingerprint_of)
    kept = [*range(1, 10), *range(21, 30), *range(201, 207)]
    assert snapshots(tmp_path) == {name(step) for step in kept} | {name(20), name(200)}


@pytest.mark.parametrize("is_closed", [True, False])
def test_what_checkpoints_need_is_known_to_the_next_run_also_after_a_kill(tmp_path, is_closed):
    run = Run(tmp_path / "window")
    for step in (1, 2, 3):
        run.save(step)
    del run.there["step=1.ckpt"]
    held = run.save(4)
    before = listed(run.folder)
    if is_closed:
        run.window.close()
        assert not (run.folder / "checkpoints.journal").exists()
    else:
        with (run.folder / "checkpoints.journal").open("a") as file:
            file.write('["step=5.ckpt", [["snap')  # killed while it wrote
        run.window._release()
    assert before == {f"step={step}.ckpt": [[name(step - 1), name(step)]] for step in (2, 3, 4)}
    again = WindowFolder(run.folder)
    assert [again.knows(f"step={step}.ckpt") for step in (1, 2, 3, 4, 5)] == [False, True, True, True, False]
    assert json.loads((run.folder / "checkpoints.json").read_text()) == before
    again.prune(held, run.fingerprint_of)
    assert snapshots(run.folder) == {name(step) for step in (1, 2, 3, 4)}  # the first by the checkpoint of step 2
    again.close()


def test_a_list_of_a_version_without_a_journal_is_read(tmp_path):
    tmp_path.joinpath("checkpoints.json").write_text(json.dumps({"step=7.ckpt": [[name(7)]]}))
    (tmp_path / name(7)).touch()
    window = WindowFolder(tmp_path)
    window.prune([], lambda path: "there")
    assert window.knows("step=7.ckpt")
    assert snapshots(tmp_path) == {name(7)}


def test_a_journal_is_put_into_the_list_before_it_is_long(tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "_LEAST_LINES", 10)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    run = Run(tmp_path)
    for step in range(1, 200):  # one path, written again and again
        run.window.register("last.ckpt", [name(step)], run.there.get("last.ckpt"))
        run.there["last.ckpt"] = f"file of step {step}"
        run.window.prune([name(step)], run.fingerprint_of, thoroughly=False)
    assert (tmp_path / "checkpoints.journal").read_text().count("\n") <= 12
    assert listed(tmp_path)["last.ckpt"][-1] == [name(199)]


@pytest.mark.parametrize("line", ["{}", "[1, []]", '["a", 5]', '["a", [5]]', "[" * 100_000])
def test_a_damaged_journal_keeps_every_file(tmp_path, caplog, line):
    (tmp_path / name(7)).touch()
    (tmp_path / "checkpoints.journal").write_text(f"{line}\n")
    window = WindowFolder(tmp_path)
    window.prune([], lambda path: None)
    assert snapshots(tmp_path) == {name(7)}
    assert any("is damaged" in message for message in caplog.messages)


def test_a_list_that_cannot_be_written_says_where_and_what_to_do(tmp_path, monkeypatch):
    window = WindowFolder(tmp_path)
    (tmp_path / "checkpoints.journal").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"cannot write the list of needs .* window_folder"):
        window.register("step=7.ckpt", [name(7)])
    assert not (tmp_path / "elsewhere").exists()


def test_the_windows_of_so_many_saves_are_kept_where_every_checkpoint_is(tmp_path):
    run = Run(tmp_path, keep=2)
    for step in range(1, 8):
        held = run.save(step)
        run.window.register("last.ckpt", held, run.there.get("last.ckpt"))  # needs the same: counts once
        run.there["last.ckpt"] = f"last of step {step}"
        run.window.prune(held, run.fingerprint_of, thoroughly=False)
        assert snapshots(tmp_path) <= {name(number) for number in range(step - 2, step + 1)}
    assert snapshots(tmp_path) == {name(5), name(6), name(7)}
    assert listed(tmp_path).keys() == {"step=6.ckpt", "step=7.ckpt", "last.ckpt"}
    assert not run.window.knows("step=5.ckpt")
    run.asked.clear()
    run.window.prune(held, run.fingerprint_of, thoroughly=False)
    assert set(run.asked) == listed(tmp_path).keys()  # those that were forgotten are looked at no more


def test_a_bound_that_is_set_later_frees_what_older_saves_kept_but_nothing_of_a_damaged_list(tmp_path):
    run = Run(tmp_path)
    for step in range(1, 6):
        run.save(step)
    run.window.close()
    bounded = WindowFolder(tmp_path, keep=1)
    bounded.prune([name(4), name(5)], run.fingerprint_of)
    assert snapshots(tmp_path) == {name(4), name(5)}
    bounded.close()
    (tmp_path / "checkpoints.json").write_text("{")
    damaged = WindowFolder(tmp_path, keep=1)
    damaged.register("step=9.ckpt", [name(9)])
    damaged.prune([], run.fingerprint_of)
    assert snapshots(tmp_path) == {name(4), name(5)}
