"""Two ranks train with DDP and with FSDP2: merged weights are right, and the run is that of a run without merging."""

import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from harness import oracles
from harness.models import Witness
from harness.rank_trainers import Group, strategy, trainer_on_ranks
from harness.ranks import on_ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from pretrain_merge import ModelMerging, load_merged

EVERY, WINDOW, STEPS = 2, 3, 8
RESUMED_AT = 6  # the end of an epoch
RUNS = ["ddp", "resharding", "not resharding"]
SAVED = {
    "ddp": {"at_end": True},
    "resharding": {"at_end": True, "best": "val_loss", "every": "4 steps", "keep": 1},
    "not resharding": {},
}


class Rows(Dataset):
    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(48, 5, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


def full(tensor):
    """All of a parameter, whatever part of it is on this rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Model(pl.LightningModule):
    """Layers whose rows do not divide by two; notes what the layers compute with in training."""

    def __init__(self, reshard):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3), nn.Linear(3, 1))
        self.reshard = reshard
        self.used = []

    def configure_model(self):
        if self.reshard is not None:
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh, reshard_after_forward=self.reshard)
            fully_shard(self.net, mesh=mesh, reshard_after_forward=self.reshard)
        for index in (0, 2, 3):
            # FSDP's own hook came first, so the layer holds all of its weight here
            self.net[index].register_forward_pre_hook(self.note)

    def note(self, layer, _):
        if self.trainer.training:
            self.used.append(layer.weight.detach().clone())

    def loss(self, x):
        return (self.net(x) - x.sum(1, keepdim=True).sin()).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Recorder(pl.Callback):
    """All weights after every step, before anybody else sees them."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append({name: full(parameter) for name, parameter in pl_module.named_parameters()})


class Probe:
    """An evaluator that keeps all of the weights it is shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, module):
        self.seen.append({name: full(parameter) for name, parameter in module.named_parameters()})
        return {"number": len(self.seen)}


def train(kind, folder, merging=None, *, saving=None, **resume):
    """One run; returns everything that tests look at, the same on every rank."""
    pl.seed_everything(1, verbose=False)
    module = Model({"ddp": None, "resharding": True, "not resharding": False}[kind])
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy(kind), plugins=[Group()], max_steps=STEPS,
        default_root_dir=folder, logger=False, enable_checkpointing=saving is not None, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[recorder, *filter(None, [merging, saving])], num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Rows(0), 4, shuffle=True), DataLoader(Rows(1), 4), **resume)
    optimizer = [{key: full(value) for key, value in state.items()} for state in trainer.optimizers[0].state.values()]
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {"weights": recorder.weights, "optimizer": optimizer, "metrics": metrics, "used": module.used}


def with_merging(kind, folder):
    probe = Probe()
    options = {"views": ["sma", "wsm"], "evaluators": {"probe": probe}, "save": SAVED[kind]}
    merging = ModelMerging(window=WINDOW, every=EVERY, **options)
    result = train(kind, folder, merging)
    return result | {"seen": probe.seen, "spread": merging.last_record.spread, "record": merging.last_record.to_json()}


def resumed(kind, folder):
    """A run that starts again from a checkpoint in its middle, which Lightning restores at another time for each."""
    saving = ModelCheckpoint(f"{folder}/kept", every_n_train_steps=RESUMED_AT, filename="{step}", save_top_k=-1)
    train(kind, folder, ModelMerging(window=2, every=EVERY), saving=saving)
    merging = ModelMerging(window=2, every=EVERY)
    train(kind, folder, merging, ckpt_path=f"{folder}/kept/step={RESUMED_AT}.ckpt")
    return merging.state_dict()["values"]["progress"] | {"merged at": merging.last_record.step}


def fitted_twice(kind, folder):
    """Steps of the snapshots in the first merge after `fit` was called once more, from memory and no checkpoint."""
    merging, module = ModelMerging(window=3, every=1), Model({"ddp": None, "resharding": True}[kind])
    saving = ModelCheckpoint(f"{folder}/kept", every_n_train_steps=2)
    trainer = trainer_on_ranks(kind, folder, merging, saving, max_steps=2, enable_checkpointing=True)
    trainer.fit(module, DataLoader(Rows(0), 4), DataLoader(Rows(1), 4))
    module.reshard = None  # it is divided already
    trainer.fit_loop.epoch_loop.max_steps = 3
    trainer.fit(module, DataLoader(Rows(0), 4), DataLoader(Rows(1), 4))
    return list(merging.last_record.recipes["sma"].steps)


class WithStatistics(Model):
    """Ends in BatchNorm, whose statistics are of each rank's own batches; notes them where they matter."""

    def __init__(self, reshard):
        super().__init__(reshard)
        self.net.append(nn.BatchNorm1d(1))
        self.measured_with, self.trained_with = Witness(), []
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def on_train_batch_end(self, *_):
        self.trained_with.append(float(self.net[-1].running_mean))

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.measured_with.append(float(self.net[-1].running_mean))


def with_statistics(kind, folder, *callbacks):
    pl.seed_everything(1, verbose=False)
    module = WithStatistics({"ddp": None, "resharding": True}[kind])
    trainer = trainer_on_ranks(kind, folder, *callbacks, max_steps=3, use_distributed_sampler=False)
    # the second rank has no batch under DDP, where it may
    rows = [] if kind == "ddp" and trainer.global_rank == 1 else Rows(1)
    trainer.fit(module, DataLoader(Rows(trainer.global_rank), 4), DataLoader(rows, 8))
    return {"trained": list(module.trained_with), "measured": list(module.measured_with)}


def statistics(kind, folder):
    merging = ModelMerging(window=2, every=1, batch_norm="live", save={"at_end": True})
    return {"off": with_statistics(kind, f"{folder} off"), "on": with_statistics(kind, folder, merging)}


def all_runs(folder):
    warnings.simplefilter("ignore")
    on = {kind: with_merging(kind, f"{folder}/{kind}") for kind in RUNS}
    off = {kind: train(kind, f"{folder}/{kind} off") for kind in RUNS}
    return {
        "on": on,
        "off": off,
        "resumed": {kind: resumed(kind, f"{folder}/{kind} resumed") for kind in ("ddp", "resharding")},
        "twice": {kind: fitted_twice(kind, f"{folder}/{kind} twice") for kind in ("ddp", "resharding")},
        "statistics": {kind: statistics(kind, f"{folder}/{kind} statistics") for kind in ("ddp", "resharding")},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def runs(folder):
    return on_ranks(all_runs, str(folder), timeout=100)


def equal(one, other):
    if torch.is_tensor(one):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(equal(*pair) for pair in zip(one, other, strict=True))
    return one == other


def merge_points():
    """Steps at which merges are due, and the steps of the snapshots in each."""
    taken = list(range(EVERY, STEPS + 1, EVERY))
    return {step: taken[:count][-WINDOW:] for count, step in enumerate(taken, start=1) if count >= 2}


def forwards_on_raw(run):
    """For each training step, whether its forward used exactly the weights that the step before left."""
    names = ["net.0.weight", "net.2.weight", "net.3.weight"]
    forwards = [run["used"][start : start + 3] for start in range(0, len(run["used"]), 3)]
    pairs = zip(run["weights"], forwards[1:], strict=False)
    return [equal([weights[name] for name in names], used) for weights, used in pairs]


@pytest.mark.parametrize("kind", RUNS)
def test_merged_weights_are_the_weighted_sum_of_the_gathered_snapshots(runs, kind):
    for rank in runs:
        run, shown = rank["on"][kind], iter(rank["on"][kind]["seen"])
        for step, steps in merge_points().items():
            assert equal(next(shown), run["weights"][step - 1])  # raw first
            for coefficients in (oracles.sma(len(steps)), oracles.decay(oracles.SHAPES["1-sqrt"], steps)):
                merged = next(shown)
                for name, weight in merged.items():
                    snapshots = [run["weights"][step - 1][name].double().numpy() for step in steps]
                    error = np.abs(weight.double().numpy() - oracles.merged(snapshots, coefficients))
                    assert np.all(error <= oracles.merge_tolerance(snapshots, coefficients, "float32"))
        assert next(shown, None) is None


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_the_same_bit_for_bit_with_and_without_merging(runs, kind):
    for rank in runs:
        on, off = rank["on"][kind], rank["off"][kind]
        assert equal(on["weights"], off["weights"])
        assert equal(on["optimizer"], off["optimizer"])
        assert equal(on["used"], off["used"])
        assert {key: on["metrics"][key] for key in off["metrics"]} == off["metrics"]


@pytest.mark.parametrize("kind", RUNS)
def test_p18_the_first_training_forward_after_an_evaluation_is_bitwise_raw(runs, kind):
    for rank in runs:
        assert len(rank["on"][kind]["used"]) == 3 * STEPS
        assert forwards_on_raw(rank["on"][kind]) == [True] * (STEPS - 1)


def test_a_forward_on_anything_else_would_be_seen(runs):
    run = dict(runs[0]["on"]["ddp"])
    run["used"] = [*run["used"]]
    run["used"][3] = run["used"][3] + 1e-7
    assert forwards_on_raw(run).count(False) == 1


@pytest.mark.parametrize("kind", RUNS)
def test_p17_all_ranks_measure_the_same(runs, kind):
    one, other = (rank["on"][kind] for rank in runs)
    merged = {key: value for key, value in one["metrics"].items() if key.startswith("merge/")}
    assert {"merge/raw/val_loss", "merge/sma/val_loss", "merge/wsm/val_loss"} <= merged.keys()
    assert merged == {key: other["metrics"][key] for key in merged}


@pytest.mark.parametrize("kind", ["ddp", "resharding"])
def test_p10_p13_every_rank_goes_on_counting_from_the_state_of_rank_0_whenever_it_is_restored(runs, kind):
    expected = {"step": STEPS, "samples": STEPS * 8, "merged at": STEPS}
    for rank in runs:
        assert {key: rank["resumed"][kind][key] for key in expected} == expected


@pytest.mark.parametrize("kind", ["ddp", "resharding"])
def test_p24_a_second_fit_of_one_trainer_goes_on_with_the_window_of_rank_0(runs, kind):
    assert [rank["twice"][kind] for rank in runs] == [[1, 2, 3]] * 2


def test_a_window_is_written_once_under_ddp_and_by_every_rank_where_it_is_sharded(runs, folder):
    written = {
        kind: sorted((folder / f"{kind} resumed" / "window").glob("snapshot-*")) for kind in ("ddp", "resharding")
    }
    steps = {kind: [path.name.split("-")[1] for path in paths] for kind, paths in written.items()}
    assert steps["ddp"] == steps["resharding"] == sorted(set(steps["ddp"]))
    assert all(path.is_file() for path in written["ddp"])
    assert all(len(list(path.glob("shard-*.safetensors"))) == 2 for path in written["resharding"])


@pytest.mark.parametrize("kind", ["ddp", "resharding"])
def test_statistics_that_ranks_have_of_their_own_are_those_of_a_run_without_merging(runs, kind):
    of_ranks = [rank["statistics"][kind] for rank in runs]
    assert of_ranks[0]["on"]["trained"] != of_ranks[1]["on"]["trained"]
    assert all(one["on"]["trained"] == one["off"]["trained"] for one in of_ranks)


def test_under_ddp_raw_and_merged_are_measured_with_the_statistics_of_rank_0_also_where_a_rank_has_no_batch(runs):
    of_ranks = [rank["statistics"]["ddp"]["on"] for rank in runs]
    trained = of_ranks[0]["trained"]
    num_batches = len(of_ranks[0]["measured"]) // 4  # raw and merged at steps 2 and 3
    assert of_ranks[0]["measured"] == [trained[1]] * 2 * num_batches + [trained[2]] * 2 * num_batches
    assert of_ranks[1]["measured"] == []


def test_a_merged_model_of_shards_has_the_statistics_of_rank_0(runs, folder):
    module = WithStatistics(None)
    load_merged(module, folder / "resharding statistics" / "merged" / "step-00000003-sma")
    assert float(module.net[-1].running_mean) == runs[0]["statistics"]["resharding"]["on"]["trained"][-1]


@pytest.mark.parametrize("kind", RUNS)
def test_the_spread_is_that_of_the_whole_model(runs, kind):
    run = runs[0]["on"][kind]
    held = list(merge_points().values())[-1]
    flat = [np.concatenate([w.double().numpy().ravel() for w in run["weights"][step - 1].values()]) for step in held]
    assert [rank["on"][kind]["spread"] for rank in runs] == pytest.approx([oracles.relative_spread(flat)] * 2, rel=1e-6)


def test_one_rank_writes_the_merged_model_of_all(runs, folder):
    assert sorted(path.name for path in (folder / "ddp" / "merged").iterdir()) == [
        "step-00000008-sma",
        "step-00000008-wsm",
    ]
    module = Model(reshard=None)
    provenance = load_merged(module, folder / "ddp" / "merged" / "step-00000008-sma")
    assert provenance["steps"] == [4, 6, 8]
    assert equal({name: full(weight) for name, weight in module.named_parameters()}, runs[0]["on"]["ddp"]["seen"][-2])


def test_ranks_write_the_merged_models_of_their_shards_for_one_process_to_read(runs, folder):
    last = "step-00000008-sma"
    saved = {path.name for path in (folder / "resharding" / "merged").iterdir()}
    assert {last, "step-00000008-wsm"} <= saved
    assert len(saved) <= 2 + 1  # of the end, of which one is the newest periodic one, and the best
    module = Model(reshard=None)
    provenance = load_merged(module, folder / "resharding" / "merged" / last)
    assert provenance["steps"] == [4, 6, 8]
    assert equal(
        {name: full(weight) for name, weight in module.named_parameters()}, runs[0]["on"]["resharding"]["seen"][-2]
    )
    assert {path.name for path in (folder / "resharding" / "merged" / last).iterdir()} == {
        "model.safetensors",
        "provenance.json",
    }
