"""Metrics of two ranks are those of one process over all of the data, whether or not the user syncs what is logged."""

import warnings
from collections import Counter
from contextlib import contextmanager

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from harness.rank_trainers import trainer_on_ranks
from harness.ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, Sampler

from pretrain_merge import ModelMerging
from pretrain_merge.errors import EvaluationError
from pretrain_merge.evaluation import evaluate

RUNS = ["ddp", "fsdp2"]
# rows of each rank in batches of two: as many batches on both, with a smaller last one; and as many as it happens
SHARDS = {"even": (8, 8), "ragged": (8, 7), "uneven": (9, 4)}


class Rows(Dataset):
    def __init__(self, seed, size=16):
        self.x = torch.randn(size, 5, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


class OwnRows(Sampler):
    """Rank by rank, nothing repeated."""

    def __init__(self, shards):
        self.shards, self.rank = shards, torch.distributed.get_rank()

    def __len__(self):
        return self.shards[self.rank]

    def __iter__(self):
        start = sum(self.shards[: self.rank])
        return iter(range(start, start + len(self)))


class Model(pl.LightningModule):
    """Logs in every way that Lightning knows."""

    def __init__(self, sharded, with_object):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1))
        self.sharded = sharded
        self.error = torchmetrics.MeanSquaredError() if with_object else None

    def configure_model(self):
        if self.sharded:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return (self.net(batch) - target(batch)).square().mean()

    def validation_step(self, batch, batch_idx):
        given = self.net(batch)
        losses = (given - target(batch)).square()
        self.log("loss", losses.mean())
        self.log("synced", losses.mean(), sync_dist=True)
        self.log("sum", losses.sum(), reduce_fx="sum")
        self.log("largest", losses.max(), reduce_fx="max")
        self.log("smallest", losses.min(), reduce_fx="min")
        self.log("both", losses.mean(), on_step=True, on_epoch=True)
        self.log("weighted", losses.mean(), batch_size=3 * len(batch))
        if self.global_rank == 0:
            self.log("of_rank_0", losses.mean(), rank_zero_only=True)
        if self.error is not None:
            self.error(given, target(batch))
            self.log("error", self.error)

    def on_validation_epoch_end(self):
        self.log("at_end", float(self.trainer.global_step))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def target(x):
    return x.sum(1, keepdim=True).sin()


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Weights:
    """An evaluator that keeps the weights it is shown, and says which rank it is."""

    def __init__(self):
        self.seen = []

    def __call__(self, module):
        self.seen.append({name: full(parameter) for name, parameter in module.net.named_parameters()})
        return {"rank": torch.distributed.get_rank()}


class Communicated(TorchDispatchMode):
    """Counts collectives (CommDebugMode loses track of modules under DDP)."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls[str(function.overloadpacket)] += 1
        return function(*args, **kwargs or {})


@contextmanager
def counted_measurements(counts):
    """What each measurement communicates, while it is part of a run."""
    isolated = evaluate.isolated

    @contextmanager
    def counted(*arguments, **options):
        with isolated(*arguments, **options) as measure:

            def counted_measure(*arguments):
                with Communicated() as communicated:
                    metrics = measure(*arguments)
                counts.append(dict(communicated.calls))
                return metrics

            yield counted_measure

    evaluate.isolated = counted
    try:
        yield
    finally:
        evaluate.isolated = isolated


def train(kind, folder, loader, *, with_object=True):
    pl.seed_everything(1, verbose=False)
    weights = Weights()
    merging = ModelMerging(window=2, every=2, views=["sma"], evaluators={"weights": weights})
    own_rows = loader.sampler.__class__ is OwnRows
    trainer = trainer_on_ranks(kind, folder, merging, max_steps=4, use_distributed_sampler=not own_rows)
    trainer.fit(Model(kind == "fsdp2", with_object), DataLoader(Rows(0), 4), loader)
    record = merging.last_record
    return {"raw": dict(record.raw), "sma": dict(record.views["sma"]), "weights": weights.seen}


def all_runs(folder):
    warnings.simplefilter("ignore")
    results = {}
    for kind in RUNS:
        for name, shards in SHARDS.items():
            if (kind, name) != ("fsdp2", "uneven"):
                loader = DataLoader(Rows(1, sum(shards)), 2, sampler=OwnRows(shards))
                results[f"{kind}, {name}"] = train(kind, f"{folder}/{kind}-{name}", loader)
        loader = DataLoader(Rows(1), 2)  # Lightning gives it a DistributedSampler
        results[f"{kind}, distributed sampler"] = train(kind, f"{folder}/{kind}", loader)
    results["calls"] = []
    with counted_measurements(results["calls"]):
        train("ddp", f"{folder}/counted", DataLoader(Rows(1), 2), with_object=False)
    try:
        train("fsdp2", f"{folder}/unequal", DataLoader(Rows(1, 13), 2, sampler=OwnRows(SHARDS["uneven"])))
    except EvaluationError as error:
        results["unequal"] = str(error)
    return results


CASES = [*(f"{kind}, {data}" for kind in RUNS for data in ["even", "ragged", "distributed sampler"]), "ddp, uneven"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return on_ranks(all_runs, str(tmp_path_factory.mktemp("metrics")), timeout=100)


def expected(weights, num_rows, own=slice(None)):
    """Of one process over all rows, in float64."""
    x = Rows(1, num_rows).x[own].double()
    net = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1)).double()
    given = torch.func.functional_call(net, {name: weight.double() for name, weight in weights.items()}, x)
    losses = (given - target(x)).square()
    mean = losses.mean().item()
    return {
        "loss": mean,
        "synced": mean,
        "sum": losses.sum().item(),
        "largest": losses.max().item(),
        "smallest": losses.min().item(),
        "both": mean,
        "both_epoch": mean,
        "weighted": mean,
        "error": mean,
        "at_end": 4.0,
        "weights/rank": 0.5,
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", ["raw", "sma"])
def test_metrics_of_all_ranks_are_those_of_one_process_over_all_data(runs, case, model):
    num_rows = sum(SHARDS.get(case.split(", ")[1], (8, 8)))
    for rank in runs:
        found, weights = dict(rank[case][model]), rank[case]["weights"][0 if model == "raw" else 1]
        found.pop("of_rank_0")
        assert found == pytest.approx(expected(weights, num_rows), rel=2e-6, abs=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_have_the_same_bits(runs, case):
    one, other = runs
    assert one[case]["raw"] == other[case]["raw"]
    assert one[case]["sma"] == other[case]["sma"]


def test_what_rank_0_alone_logs_is_its_own(runs):
    of_rank_0 = expected(runs[0]["ddp, even"]["weights"][0], 16, own=slice(0, 8))["loss"]
    for rank in runs:
        assert rank["ddp, even"]["raw"]["of_rank_0"] == pytest.approx(of_rank_0, rel=2e-6)


def test_an_evaluation_exchanges_its_metrics_once(runs):
    for rank in runs:
        assert len(rank["calls"]) == 2  # raw and one view
        for calls in rank["calls"]:
            # one exchange of metrics: their size, then they; the others agree to go on: at the start, before each of
            # four batches, after the last, at the end, and that all are there for the exchange
            assert calls == {"c10d.allgather_": 2, "c10d.allreduce_": 8}


def test_ranks_with_unequal_numbers_of_batches_are_an_error_where_parameters_are_sharded(runs):
    for rank in runs:
        assert "1 ranks have no validation batch left and 1 have one" in rank["unequal"]
