"""What happens on one rank alone is decided by all: none goes on, none waits, and all say why."""

import errno
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from harness.rank_trainers import trainer_on_ranks
from harness.ranks import on_ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

from pretrain_merge import ModelMerging, RollingMerger
from pretrain_merge.callbacks import publisher
from pretrain_merge.callbacks.kept_window import KeptWindow
from pretrain_merge.callbacks.publisher import Publisher
from pretrain_merge.errors import CheckpointError
from pretrain_merge.evaluation import evaluate
from pretrain_merge.merged_models import whole_weights
from pretrain_merge.resume.sidecar import WindowFolder
from pretrain_merge.stores import disk

STEPS = 6


class Rows(Dataset):
    def __init__(self, fails=False):
        self.x = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
        self.fails = fails

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if self.fails and index > 8:
            raise OSError(errno.EIO, "row cannot be read")
        return self.x[index]


class Model(pl.LightningModule):
    def __init__(self, sharded, fails_at):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1))
        self.sharded, self.fails_at = sharded, fails_at

    def configure_model(self):
        if self.sharded:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        if self.fails_at == "validation_step" and batch_idx == 1:
            raise ValueError("a step failed")
        self.log("val_loss", loss)

    def on_validation_epoch_end(self):
        if self.fails_at == "epoch end":
            raise ValueError("the epoch's end failed")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class NotANumber(pl.Callback):
    """Makes the raw weights of this rank useless after a step, until the next batch starts."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            weight = next(pl_module.parameters()).detach()
            self.weight = weight.to_local() if hasattr(weight, "to_local") else weight
            self.kept = self.weight.clone()
            self.weight.fill_(float("nan"))

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            self.weight.copy_(self.kept)


class Phase(pl.Callback):
    """A data switch that one rank alone is told of."""

    def __init__(self, merging, step):
        self.merging, self.step = merging, step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            self.merging.mark_phase("other data")


def broken_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def run(
    kind, folder, *, on_rank=1, fails_at="", callbacks=lambda merging: [], saves_every=1000, resume=None, **options
):
    """What became of one run, which snapshots it held at its end, and what was saved because it failed."""
    here = torch.distributed.get_rank() == on_rank
    merging = ModelMerging(**{"window": 3, "every": 1, "views": ["sma"]} | options)
    saving = ModelCheckpoint(folder, every_n_train_steps=saves_every, filename="{step}", save_on_exception=True)
    trainer = trainer_on_ranks(
        kind, folder, *(callbacks(merging) if here else []), merging, saving, max_steps=STEPS, enable_checkpointing=True
    )
    records = []
    publish = Publisher.publish
    Publisher.publish = lambda publisher, record: records.append(record) or publish(publisher, record)
    error = ""
    try:
        validation = DataLoader(Rows(fails=here and fails_at == "data"), 2)
        trainer.fit(Model(kind != "ddp", fails_at if here else ""), DataLoader(Rows(), 2), validation, ckpt_path=resume)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    finally:
        Publisher.publish = publish
    return {
        "error": error,
        "step": trainer.global_step,
        "saved": sorted(path.name for path in Path(folder).glob("*.ckpt")),
        "records": [[record.step, record.window, record.refused] for record in records],
    }


@contextmanager
def broken_here(owner, name, do=broken_disk, *, on_rank=1, unless=lambda: False):
    """A function that fails on one rank."""
    whole = getattr(owner, name)
    if torch.distributed.get_rank() == on_rank:
        setattr(owner, name, lambda *given, **options: (whole if unless() else do)(*given, **options))
    try:
        yield
    finally:
        setattr(owner, name, whole)


class NoCheckpoint:
    def __init__(self, folder):
        self.folder = Path(folder)

    def __call__(self):
        return not list(self.folder.glob("*.ckpt"))


def fail(error, reason):
    raise error(reason)


# while a run is resumed: what a user's choice may answer, and what nothing answers
RESTORING = {"_find": (CheckpointError, "not on this node"), "_fill": (MemoryError, "no room here")}


class Tokens:
    """Tells the tokens of a batch, and on one rank not those of the second."""

    num_told = 0

    def __call__(self, batch):
        self.num_told += 1
        if torch.distributed.get_rank() == 1 and self.num_told == 2:
            raise ValueError("no tokens")
        return 2


def evaluator(module):
    if torch.distributed.get_rank() == 1:
        raise ValueError("a benchmark failed")
    return {"score": 1.0}


def all_runs(folder):
    warnings.simplefilter("ignore")
    runs = {}
    for kind in ("ddp", "fsdp2"):
        for fails_at in ("validation_step", "data", "epoch end"):
            runs[f"{kind}, {fails_at}"] = run(kind, f"{folder}/{kind}-{fails_at}", fails_at=fails_at)
        runs[f"{kind}, evaluator"] = run(kind, f"{folder}/{kind}-evaluator", evaluators={"benchmark": evaluator})
        with broken_here(disk, "_write_file", broken_write):
            runs[f"{kind}, store full"] = run(kind, f"{folder}/{kind}-store", store="disk")
        with broken_here(publisher, "append_record", on_rank=0):
            runs[f"{kind}, record"] = run(kind, f"{folder}/{kind}-record")
        with broken_here(KeptWindow, "keep", on_rank=0):
            runs[f"{kind}, checkpoint"] = run(kind, f"{folder}/{kind}-checkpoint", saves_every=2)
        once = iter([False])
        with broken_here(WindowFolder, "register", on_rank=0, unless=lambda once=once: next(once, True)):
            runs[f"{kind}, announcing"] = run(kind, f"{folder}/{kind}-announcing", saves_every=2)
        with broken_here(WindowFolder, "prune", on_rank=0, unless=NoCheckpoint(f"{folder}/{kind}-pruning")):
            runs[f"{kind}, pruning"] = run(kind, f"{folder}/{kind}-pruning", saves_every=2)
        with broken_here(whole_weights, "save_file", on_rank=0):
            runs[f"{kind}, merged model"] = run(kind, f"{folder}/{kind}-merged", save={"every": 2})
        (Path(folder) / "file").touch()
        runs[f"{kind}, window folder"] = run(kind, f"{folder}/{kind}-folder", window_folder=f"{folder}/file/window")
        here = torch.distributed.get_rank() == 1
        runs[f"{kind}, configuration"] = run(kind, f"{folder}/{kind}-configuration", every=1 + here)
        tokens = {"every": "4 tokens", "tokens_per_batch": Tokens()}
        runs[f"{kind}, tokens"] = run(kind, f"{folder}/{kind}-tokens", **tokens)
        with broken_here(KeptWindow, "keep", on_rank=0):
            runs[f"{kind}, end"] = run(kind, f"{folder}/{kind}-end")
        whole = f"{folder}/{kind}-whole"
        run(kind, whole, saves_every=4)
        for fails_at, error in RESTORING.items():
            with broken_here(KeptWindow, fails_at, lambda *_, error=error: fail(*error)):
                runs[f"{kind}, {fails_at}"] = run(
                    kind, f"{whole}/{fails_at}", resume=f"{whole}/step=4.ckpt", window_folder=f"{whole}/window"
                )
        runs[f"{kind}, nan"] = run(kind, f"{folder}/{kind}-nan", callbacks=lambda merging: [NotANumber(4)])
        own = {"name": "own", "kind": "decay", "shape": lambda x: 1 - x}  # cannot be pickled, so ranks compare its name
        runs[f"{kind}, phase"] = run(
            kind, f"{folder}/{kind}-phase", callbacks=lambda merging: [Phase(merging, 3)], views=["sma", own]
        )
    runs["no folder"] = no_folder_on_one_rank(folder)
    runs["block"] = broken_block()
    return runs


def broken_write(slot, filled, free):
    slot.failure = OSError(errno.ENOSPC, "No space left on device")
    free.put(None)
    slot.readable.set()
    raise slot.failure


def no_folder_on_one_rank(folder):
    """A store that one rank cannot open, in a loop of one's own."""
    place = Path(folder) / "place"
    if torch.distributed.get_rank() == 1:
        place = place / "file" / "window"
        place.parent.parent.mkdir()
        place.parent.touch()
    torch.distributed.barrier()
    merging = RollingMerger(window=2, every=1, store="disk", store_folder=str(place))
    try:
        merging.observe(nn.Linear(2, 1), 1)
    except Exception as caught:
        return type(caught).__name__
    return ""


def broken_block():
    """Steps held where one rank alone was told of another phase in the midst of a block."""
    module, merging = nn.Linear(1, 1), RollingMerger(window=4, every=3, average="block")
    for step in range(1, 13):
        if step == 5 and torch.distributed.get_rank() == 1:
            merging.mark_phase("other data")
        merging.observe(module, step)
    return [item.progress.step for item in merging.window.valid]


class BetweenLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 1)

    def forward(self, x):
        hidden = self.first(x)
        if not torch.is_grad_enabled() and torch.distributed.get_rank() == 1:
            raise ValueError("failed between two layers")
        return self.second(hidden)


class FailsBetweenLayers(Model):
    def configure_model(self):
        self.net = BetweenLayers()
        for part in (self.net.first, self.net.second, self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def failure_in_a_forward(folder):
    warnings.simplefilter("ignore")
    evaluate._PATIENCE = timedelta(seconds=2)
    trainer = trainer_on_ranks("fsdp2", folder, ModelMerging(window=3, every=1), max_steps=STEPS)
    trainer.fit(FailsBetweenLayers(True, ""), DataLoader(Rows(), 2), DataLoader(Rows(), 2))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return on_ranks(all_runs, str(tmp_path_factory.mktemp("failures")), timeout=120)


REASONS = {
    "validation_step": ("ValueError: a step failed", 1),
    "data": ("row cannot be read", 1),
    "epoch end": ("ValueError: the epoch's end failed", 1),
    "evaluator": ("ValueError: a benchmark failed", 1),
    "store full": ("No space left on device", 1),
    "record": ("No space left on device", 0),
    "checkpoint": ("No space left on device", 0),
    "announcing": ("No space left on device", 0),
    "pruning": ("No space left on device", 0),
    "merged model": ("No space left on device", 0),
    "window folder": ("Not a directory", 0),
    "_fill": ("MemoryError: no room here", 1),
}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("failure", REASONS)
def test_what_fails_on_one_rank_ends_the_run_on_all_with_the_reason(runs, kind, failure):
    reason, on_rank = REASONS[failure]
    errors = [rank[f"{kind}, {failure}"]["error"] for rank in runs]
    assert reason in errors[on_rank]
    assert errors[1 - on_rank].startswith(("RankError: cannot ", "CheckpointError: cannot "))
    assert f"rank {on_rank} failed with " in errors[1 - on_rank]
    assert reason in errors[1 - on_rank]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("failure", REASONS)
def test_all_ranks_end_at_the_same_step(runs, kind, failure):
    steps = [rank[f"{kind}, {failure}"]["step"] for rank in runs]
    assert steps[0] == steps[1] <= (4 if failure in RESTORING else 2)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("failure", sorted(REASONS.keys() - {"window folder", "_fill", "pruning"}))
def test_a_checkpoint_is_saved_because_of_it_by_all_ranks(runs, kind, failure):
    for rank in runs:
        assert rank[f"{kind}, {failure}"]["saved"] == [f"step={rank[f'{kind}, {failure}']['step']}.ckpt"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_window_that_one_rank_cannot_find_is_missing_on_all(runs, kind):
    errors = [rank[f"{kind}, _find"]["error"] for rank in runs]
    assert "another rank could not read it" in errors[0]
    assert "not on this node" in errors[1]
    assert all(error.startswith("CheckpointError") and "on_missing='refill'" in error for error in errors)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_tokens_that_one_rank_cannot_count_end_the_run_on_all(runs, kind):
    errors = [rank[f"{kind}, tokens"]["error"] for rank in runs]
    assert errors[0].startswith("ProgressError: another rank could not count its batch")
    assert errors[1].startswith("ProgressError: a cadence counts tokens, and a batch of type Tensor does not tell")
    assert [rank[f"{kind}, tokens"]["saved"] for rank in runs] == [["step=2.ckpt"]] * 2


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_window_that_one_rank_cannot_keep_at_the_end_is_an_error_on_all(runs, kind):
    errors = [rank[f"{kind}, end"]["error"] for rank in runs]
    assert errors[0] == "OSError: [Errno 28] No space left on device"
    assert f"rank 0 failed with {errors[0]}" in errors[1]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_configuration_that_differs_on_one_rank_is_an_error_on_all(runs, kind):
    for rank in runs:
        assert rank[f"{kind}, configuration"]["error"].startswith("ConfigError: every: 1 on rank 0 and 2 on rank 1.")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_snapshot_that_one_rank_refuses_is_refused_and_counted_by_all(runs, kind):
    # 4 is refused, 5 is alone
    expected = [[2, 2, 0], [3, 3, 0], [6, 2, 1]]
    assert [rank[f"{kind}, nan"]["records"] for rank in runs] == [expected] * 2


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_break_that_one_rank_sees_is_a_break_on_all(runs, kind):
    expected = [[2, 2, 0], [3, 3, 0], [5, 2, 0], [6, 3, 0]]
    assert [rank[f"{kind}, phase"]["records"] for rank in runs] == [expected] * 2


def test_a_rank_that_fails_where_others_wait_for_its_shards_leaves_with_the_reason_and_ends_them(tmp_path):
    with pytest.raises(AssertionError) as caught:
        on_ranks(failure_in_a_forward, str(tmp_path), timeout=60)
    report = str(caught.value)
    assert "ValueError: failed between two layers" in report
    assert "still running" not in report  # the other one met a broken connection


def test_a_block_that_broke_on_one_rank_gives_no_mean_on_any(runs):
    assert [rank["block"] for rank in runs] == [[9, 12]] * 2


def test_a_store_that_one_rank_cannot_open_stops_all(runs):
    assert [rank["no folder"] for rank in runs] == ["RankError", "CheckpointError"]
