"""Ranks with unequal numbers of validation batches, or none: right metrics or a clear error, and no hang."""

import os
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest
from harness.rank_trainers import trainer_on_ranks
from harness.ranks import on_ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from system.test_metrics_over_ranks import Model, OwnRows, Rows, Weights, expected
from torch.utils.data import DataLoader

from pretrain_merge import ModelMerging

# by loader, rows of each rank in batches of two
LOADERS = {
    "empty first, in the middle and last": [(0, 6), (8, 3), (5, 0), (2, 9), (7, 0)],
    "one that is empty": [(5, 0)],
    "nothing on one rank": [(0, 4), (0, 3)],
}


class SeveralLoaders(Model):
    def __init__(self, *options):
        super().__init__(*options)
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


def train(folder, kind, shards, *, with_object=False):
    """Metrics of raw with the weights that they were measured on, or the error."""
    weights = Weights()
    merging = ModelMerging(window=2, every=1, views=["sma"], evaluators={"weights": weights})
    trainer = trainer_on_ranks(kind, folder, merging, max_steps=2, use_distributed_sampler=False)
    loaders = [DataLoader(Rows(1, sum(rows)), 2, sampler=OwnRows(rows)) for rows in shards]
    try:
        trainer.fit(SeveralLoaders(kind == "fsdp2", with_object), DataLoader(Rows(0), 4), loaders)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"raw": dict(merging.last_record.raw), "weights": weights.seen[0]}


def all_runs(folder):
    warnings.simplefilter("ignore")
    runs = {name: train(f"{folder}/{name}", "ddp", shards) for name, shards in LOADERS.items()}
    runs["objects"] = train(f"{folder}/objects", "ddp", [(4, 4), (5, 0)], with_object=True)
    runs["sharded"] = train(f"{folder}/sharded", "fsdp2", [(4, 2), (2, 4)])
    return runs


class Signalled(SeveralLoaders):
    """Both ranks get a SIGTERM inside a merge, one of them later, as from a launcher."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.trainer.global_step == 2 and batch_idx == 0:
            threading.Timer(0.5 * self.global_rank, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(0.1 * (1 - self.global_rank))


def signalled_runs(folder):
    warnings.simplefilter("ignore")
    runs = {}
    for kind in ("ddp", "fsdp2"):
        saving = ModelCheckpoint(
            f"{folder}/{kind}", every_n_train_steps=1000, filename="{step}", save_on_exception=True
        )
        merging = ModelMerging(window=2, every=1, views=["sma"])
        trainer = trainer_on_ranks(kind, f"{folder}/{kind}", merging, saving, max_steps=4, enable_checkpointing=True)
        try:
            trainer.fit(Signalled(kind == "fsdp2", False), DataLoader(Rows(0), 4), DataLoader(Rows(1), 2))
        except BaseException as error:
            saved = sorted(path.name for path in Path(folder, kind).glob("*.ckpt"))
            runs[kind] = [type(error).__name__, trainer.global_step, saved, merging.last_record is None]
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return on_ranks(all_runs, str(tmp_path_factory.mktemp("lockstep")), timeout=60)


@pytest.mark.parametrize("name", LOADERS)
def test_metrics_of_several_loaders_are_those_of_one_process_whichever_are_empty_on_a_rank(runs, name):
    for rank in runs:
        assert "error" not in rank[name], rank[name]
        wanted = {}
        for index, rows in enumerate(LOADERS[name]):
            suffix = f"/dataloader_idx_{index}" if len(LOADERS[name]) > 1 else ""
            of_loader = expected(rank[name]["weights"], sum(rows))
            wanted |= {f"{key}{suffix}": of_loader[key] for key in ("loss", "sum", "largest", "smallest", "weighted")}
        assert {key: rank[name]["raw"][key] for key in wanted} == pytest.approx(wanted, rel=2e-6, abs=1e-7)
    assert runs[0][name]["raw"] == runs[1][name]["raw"]


def test_an_object_of_torchmetrics_that_one_rank_lacks_is_an_error_on_all(runs):
    for rank in runs:
        assert "validation loader 1: 1 of 2 ranks logged an object of torchmetrics" in rank["objects"]["error"]


def test_a_sharded_model_wants_the_same_number_of_batches_from_each_loader(runs):
    for rank in runs:
        assert "validation loader 0: 1 ranks have no validation batch left" in rank["sharded"]["error"]


def test_a_signal_that_reaches_one_rank_later_ends_all_inside_the_merge(tmp_path):
    for rank in on_ranks(signalled_runs, str(tmp_path), timeout=60):
        for kind in ("ddp", "fsdp2"):
            assert rank[kind] == ["SIGTERMException", 2, ["step=2.ckpt"], True]
