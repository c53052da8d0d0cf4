"""What a place stands for: a checkpoint, a run around its folder, an order by names; and what it must not be."""

import pytest
import torch
from offline import writers
from offline.writers import tensors

from pretrain_merge import merge_checkpoints
from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.offline.merge import plan_merge


@pytest.mark.parametrize(
    ("source", "out", "options", "error", "piece"),
    [
        ("zz://bucket/x.ckpt", "out", {}, CheckpointError, "zz"),
        ("memory://nothing/x.ckpt", "out", {}, CheckpointError, "not there"),
        (None, "s3://bucket/out", {}, ConfigError, "local folder"),
        (None, "link", {}, CheckpointError, "never overwritten"),
        (None, "file/out", {}, CheckpointError, "cannot make"),
        (None, "out", {"newest": "*weight"}, ConfigError, r"\['\*weight'\]"),
    ],
    ids=str,
)
def test_places_and_patterns_that_are_not_what_they_seem_are_refused(
    tmp_path, monkeypatch, source, out, options, error, piece
):
    monkeypatch.chdir(tmp_path)
    place = source or writers.pt(tmp_path, 1, tensors(1))
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=piece):
        merge_checkpoints([place], out, **options)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("inner", ["checkpoints", "lightning_logs/version_0/checkpoints"])
def test_a_run_folder_is_told_from_the_folder_of_its_checkpoints(tmp_path, inner):
    folder = tmp_path / "run" / inner
    folder.mkdir(parents=True)
    writers.lightning(folder, 1, tensors(1))
    with pytest.raises(CheckpointError, match=f"run holds no checkpoint, and .*{inner} does"):
        merge_checkpoints(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "view", "is_said"),
    [
        (("final", "step=1", "step=2"), "sma", True),  # by name the last one is not the newest
        (("a", "b", "c"), "wma", True),
        (("a", "b", "c"), "sma", False),
        (("a", "b", "c"), [0.5, 0.25, 0.25], False),
        (("step=1", "step=2", "step=3"), "wma", False),
    ],
)
def test_an_order_that_is_a_guess_is_said(tmp_path, caplog, names, view, is_said):
    (tmp_path / "run").mkdir()
    for number, name in enumerate(names):
        torch.save({"w": torch.full((2,), float(number))}, tmp_path / "run" / f"{name}.pt")
    about = merge_checkpoints(tmp_path / "run", tmp_path / "out", view)
    newest = about["sources"][-1]["place"]
    assert (f"{newest} is taken for the newest" in caplog.text) == is_said


def test_a_place_that_cannot_be_written_is_named_without_words_of_training(tmp_path):
    place = writers.pt(tmp_path, 1, {"w": torch.ones(2**21)})
    for work in (merge_checkpoints, plan_merge):
        with pytest.raises(CheckpointError, match="another folder") as caught:
            work([place], "/proc/merged")
        assert "/proc" in str(caught.value)
        assert "window" not in str(caught.value)


def test_a_plan_makes_nothing(tmp_path):
    place = writers.pt(tmp_path, 1, {"w": torch.ones(2**21)})
    assert plan_merge([place], tmp_path / "new" / "folder" / "out").seconds is not None
    assert list(tmp_path.iterdir()) == [place]
