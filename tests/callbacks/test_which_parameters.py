"""Which parameters are merged in real runs: GANs, unfreezing, pruning, filters, callbacks that write the weights."""

import lightning.pytorch as pl
import pytest
import torch
from harness.models import LIGHTNING_REMARKS, WIDTH, Regression, rows, same_bits, trainer, weights
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint, ModelPruning
from safetensors.torch import load_file
from torch import nn

from pretrain_merge import ModelMerging
from pretrain_merge.errors import UnsupportedModelError
from pretrain_merge.records import read_records

pytestmark = [
    *LIGHTNING_REMARKS,
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist"),
]


def merging(**options):
    return ModelMerging(**{"window": 3, "every": 2, "breaks": {"lr": False}, "tokens_per_batch": 5} | options)


def fit(module, folder, *callbacks, ckpt_path=None, **options):
    run = trainer(folder, *callbacks, **options)
    run.fit(module, rows(), rows(8, seed=1), ckpt_path=ckpt_path)
    return run


def saved(folder):
    return load_file(sorted((folder / "merged").glob("step-*"))[-1] / "model.safetensors")


class WithBackbone(Regression):
    def __init__(self):
        super().__init__(dropout=0.0)
        self.backbone = nn.Linear(WIDTH, WIDTH)

    def loss(self, batch):
        return nn.functional.mse_loss(self.net(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class UnfreezesInTheSecondEpoch(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.01)


class Gan(Regression):
    """Two nets of one shape; each batch trains one of them and freezes the other."""

    def __init__(self):
        super().__init__()
        self.net = nn.Identity()
        self.g, self.d, self.automatic_optimization = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), False

    def training_step(self, batch, batch_idx):
        turn = batch_idx % 3 == 2  # of the generator
        self.g.requires_grad_(turn)
        self.d.requires_grad_(not turn)
        optimizer = self.optimizers()[0 if turn else 1]
        optimizer.zero_grad()
        self.manual_backward(self.d(self.g(batch[0])).square().mean())
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.d(self.g(batch[0])).square().mean())

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.g, self.d)]


class FreezesTheOtherAtTheEnd(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        pl_module.d.requires_grad_(False)
        pl_module.g.requires_grad_(True)


def test_p36_a_gan_that_freezes_its_halves_by_turns_fills_one_window(tmp_path, caplog):
    fit(Gan(), tmp_path, merging(every=1), max_epochs=3)
    records = read_records(tmp_path / "merges.jsonl")
    assert records[-1].recipes["sma"].steps == (16, 17, 18)
    assert not any(record.since for record in records)
    assert "break" not in caplog.text


def test_a_half_that_was_never_stepped_is_saved_as_it_is_and_not_with_the_mean_of_the_other(tmp_path):
    class OnlyD(Gan):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, 0)

    module = OnlyD()
    fit(module, tmp_path, FreezesTheOtherAtTheEnd(), merging(every=1, window=2, save={"at_end": True}))
    tensors = saved(tmp_path)
    assert same_bits(tensors["g.weight"], module.g.weight.detach())
    assert not same_bits(tensors["d.weight"], module.d.weight.detach())


@pytest.mark.parametrize(
    "unfreezing",
    [UnfreezesInTheSecondEpoch, lambda: BackboneFinetuning(1, lambda epoch: 1.0, backbone_initial_lr=0.01)],
)
def test_p36_a_run_that_unfroze_layers_resumes_with_its_window(tmp_path, unfreezing):
    def callbacks():
        return merging(), unfreezing(), ModelCheckpoint(tmp_path / "c", save_last=True)

    fit(WithBackbone(), tmp_path, *callbacks(), max_epochs=3)
    fit(WithBackbone(), tmp_path, *callbacks(), max_epochs=4, ckpt_path=tmp_path / "c" / "last.ckpt")
    recipes = {record.step: record.recipes["sma"].steps for record in read_records(tmp_path / "merges.jsonl")}
    assert recipes[20] == (16, 18, 20)


def test_unfreezing_is_a_break_that_names_what_is_new(tmp_path, caplog):
    fit(WithBackbone(), tmp_path, merging(), UnfreezesInTheSecondEpoch(), max_epochs=3)
    assert "the set of merged parameters changed: 'backbone.bias' and 1 more are new" in caplog.text
    assert read_records(tmp_path / "merges.jsonl")[-1].recipes["sma"].steps == (14, 16, 18)


def test_pruning_that_becomes_permanent_at_the_end_keeps_its_zeros_in_the_saved_merge(tmp_path):
    module = Regression(dropout=0.0)
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.5)
    fit(module, tmp_path, pruning, merging(save={"at_end": True}), max_epochs=3)
    zeros = module.net[0].weight == 0
    assert zeros.any()
    assert torch.equal(saved(tmp_path)["net.0.weight"] == 0, zeros)


def test_a_model_that_is_another_one_at_the_end_is_said_and_does_not_end_the_run_in_an_error(tmp_path, caplog):
    class Reshapes(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.net[3] = nn.Linear(6, 2)

    fit(Regression(), tmp_path, Reshapes(), merging(save={"at_end": True}))
    assert (
        "no merged model is saved at the end: the model is not the one that was observed: 'net.3.bias'" in caplog.text
    )
    assert not (tmp_path / "merged").exists()


class Clipped(Regression):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        for parameter in self.parameters():
            parameter.data.clamp_(-0.05, 0.05)  # no version is raised by it


class Ema(pl.Callback):
    """As Lightning's weight averaging does it: the weights are replaced when training ends, before ours."""

    def on_train_end(self, trainer, pl_module):
        for parameter in pl_module.parameters():
            parameter.data.copy_(parameter.data * 0.5)


@pytest.mark.parametrize(("build", "before"), [(Clipped, ()), (Regression, (Ema,))], ids=["a clip", "an average"])
def test_p31_what_others_wrote_through_data_is_what_the_run_ends_with(tmp_path, build, before):
    def ended(*callbacks):
        pl.seed_everything(7, verbose=False)
        module = build()
        fit(module, tmp_path, *[kind() for kind in before], *callbacks)
        return weights(module)

    assert same_bits(ended(merging(save={"at_end": True})), ended())


def test_a_filter_by_name_holds_in_a_run_and_what_it_leaves_out_is_raw(tmp_path):
    module = WithBackbone()
    fit(module, tmp_path, merging(parameters={"exclude": ["backbone.*"]}, save={"at_end": True}))
    tensors = saved(tmp_path)
    assert same_bits(tensors["backbone.weight"], module.backbone.weight.detach())
    assert not same_bits(tensors["net.0.weight"], module.net[0].weight.detach())


def test_a_filter_that_matches_nothing_is_refused_before_the_first_step(tmp_path):
    run = trainer(tmp_path, merging(parameters={"exclude": ["backbond.*"]}))
    with pytest.raises(UnsupportedModelError, match=r"parameters.exclude: 'backbond.\*' matches no parameter"):
        run.fit(WithBackbone(), rows(), rows(8, seed=1))
    assert run.global_step == 0


def test_a_graph_that_lives_across_a_merge_trains_as_without_us(tmp_path):
    class TwoPassesOverOneGraph(Regression):
        """Every second batch goes back through the graph of the batch before, whose weights did not move since."""

        def __init__(self):
            super().__init__(dropout=0.0)
            self.automatic_optimization, self.kept = False, None
            self.other = nn.Linear(WIDTH, 1)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            if self.kept is None:
                self.kept = self.loss(batch)
                loss, optimizer = self.other(batch[0]).square().mean(), second
                self.kept.backward(retain_graph=True)
            else:
                loss, optimizer = self.kept, first
                self.kept = None
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.05), torch.optim.SGD(self.other.parameters(), lr=0.05)

    def ended(*callbacks):
        pl.seed_everything(7, verbose=False)
        module = TwoPassesOverOneGraph()
        fit(module, tmp_path, *callbacks)
        return weights(module)

    assert same_bits(ended(merging(every=1)), ended())
