"""The demo from end to end, on a run of seconds: what it leaves, and that its anneal is a fair check."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from pretrain_merge import ModelMerging, RollingMerger, load_merged
from pretrain_merge.cli.report import report
from pretrain_merge.config import MergeConfig, build
from pretrain_merge.demo import run
from pretrain_merge.demo.corpus import load_corpus
from pretrain_merge.demo.experiment import Branch, Experiment, last_window
from pretrain_merge.demo.fitting import CheckpointAt, NamedBar, fit, quiet
from pretrain_merge.demo.models import LanguageModel, build_model, constant_after_warmup, language_model, linear_anneal
from pretrain_merge.errors import CheckpointError, ConfigError, MissingDependencyError
from pretrain_merge.records import read_records
from pretrain_merge.records.read_run import read_run

SHORT = Experiment(num_steps=40, warmup_steps=10, batch_size=4, block_length=32, num_validation_blocks=16)
MERGING = {"window": 3, "every": 5, "start": 10, "merge_every": 10, "views": ["sma", "sma2"], "save": {"at_end": True}}
BRANCH = Branch(start=30, num_steps=10, validate_every=1)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


@pytest.fixture(scope="module", params=["llama", "moe"])
def finished(request, tmp_path_factory):
    """A demo's summary, and its folder, which an interrupted demo had used before."""
    out = tmp_path_factory.mktemp(request.param) / "runs" / "demo"
    experiment = Experiment(**{**vars(SHORT), "family": request.param})
    run.prepare_folder(out)
    (out / "left-over").mkdir()
    return run.demo(experiment, out=out, merging=MERGING), out


class Recorder(Callback):
    """The batch and the learning rate of every step."""

    def __init__(self):
        self.batches, self.rates = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch["input_ids"].clone())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def short_fit(corpus, folder, *, lr_factor, **options):
    recorder = Recorder()
    defaults = {"logger": False, "enable_progress_bar": False, "default_root_dir": folder}
    callbacks = [recorder, *options.pop("callbacks", [])]
    with quiet():
        module = language_model(SHORT, lr_factor)
        fit(SHORT, corpus, module, callbacks=callbacks, **(defaults | options))
    return {name: value.clone() for name, value in module.state_dict().items()}, recorder


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_summary_holds_raw_merged_annealed_steps_and_seconds(finished):
    summary, out = finished
    written = json.loads((out / "summary.json").read_text())
    assert {"raw", "merged", "annealed", "steps", "seconds", "gap_closed"} <= written.keys()
    assert written["merged"].keys() == {"sma", "sma2"}
    assert written["steps"] == 40
    assert written["raw"] == summary.raw
    assert 0 < written["seconds_train"] < written["seconds"]
    assert [int(step) for step in written["anneal_curve"]] == list(range(30, 41))


def test_every_merge_point_is_a_record_and_the_last_one_is_the_summary(finished):
    summary, out = finished
    records = read_records(out / "merges.jsonl")
    assert [record.step for record in records if record.views] == [20, 30, 40]
    assert records[-1].raw["val_loss"] == summary.raw
    measured = {view: metrics["val_loss"] for view, metrics in records[-1].views.items()}
    assert {view: measured[view] for view in ("sma", "sma2")} == summary.merged  # and what a forecast reads besides
    assert records[-1].recipes["sma"].steps == (30, 35, 40)  # the stretch that is annealed
    assert records[-1].tokens == summary.tokens == 40 * 4 * 32


def test_a_report_reads_what_the_demo_leaves(finished, tmp_path, capsys):
    _, out = finished
    report([out], picture=tmp_path / "report.png")
    assert "40" in capsys.readouterr().out
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert read_run(out)[-1].recipes["sma"].steps == (30, 35, 40)  # of merges.jsonl: W&B does not know them


def test_the_merged_weights_load_back_and_have_the_loss_that_was_reported(finished, corpus):
    summary, out = finished
    (folder,) = out.glob("merged/*-sma")
    family = "llama" if "Llama" in summary.model else "moe"
    module = LanguageModel(build_model(family, seed=9), peak_lr=1.0, lr_factor=constant_after_warmup(1))
    load_merged(module, folder)
    step = len(corpus.validation) // 16
    blocks = torch.stack([corpus.validation[index * step : index * step + 32].long() for index in range(16)])
    with torch.no_grad():
        loss = module.model(input_ids=blocks, labels=blocks).loss.item()
    assert loss == pytest.approx(summary.merged["sma"], rel=1e-5)


def test_of_a_mixture_of_experts_the_routers_are_compared(finished):
    summary, out = finished
    written = json.loads((out / "summary.json").read_text())["routing"]
    assert (summary.routing is None) == (written is None) == ("Llama" in summary.model)
    if written:
        assert 0 < written["drift"] < written["drift_of_training"] < 1  # a mean lies between its ends
        assert [sum(layer) for layer in written["merged"]["load"]] == pytest.approx([1.0, 1.0])


def test_the_picture_is_a_png_and_the_w_and_b_run_holds_raw_merged_and_annealed(finished):
    _, out = finished
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    (log,) = out.glob("wandb/offline-run-*/*.wandb")
    written = log.read_bytes()
    for name in (b"merge/raw/val_loss", b"merge/sma/val_loss", b"annealed/val_loss", b"train_loss"):
        assert name in written


def test_a_run_replaces_what_an_earlier_one_left(finished):
    _, out = finished
    assert not (out / "left-over").exists()
    assert {path.name for path in out.iterdir()} == {
        *(
            "summary.json",
            "merges.jsonl",
            "merges.run.json",
            "merges.config.yaml",
            "curves.png",
            "merged",
            "wandb",
            "checkpoints",
            "window",
            ".pretrain-merge-demo",
        )
    }


def test_the_branch_at_a_constant_rate_lands_bit_for_bit_where_the_run_does(corpus, tmp_path):
    constant = constant_after_warmup(SHORT.warmup_steps)
    checkpoint = tmp_path / "branch.ckpt"
    run_end, run_seen = short_fit(corpus, tmp_path, lr_factor=constant, callbacks=[CheckpointAt(30, checkpoint)])
    options = {"ckpt_path": checkpoint, "check_val_every_n_epoch": None, "val_check_interval": 5}
    branch_end, branch_seen = short_fit(corpus, tmp_path, lr_factor=constant, first_step=30, **options)
    assert len(run_seen.batches) == 40
    assert len(branch_seen.batches) == 10
    for ours, theirs in zip(branch_seen.batches, run_seen.batches[30:], strict=True):
        assert torch.equal(ours, theirs)
    assert equal(branch_end, run_end)
    # and the comparison can fail: with data that start over, as a plain loader's do, it lands elsewhere
    other_end, _ = short_fit(corpus, tmp_path, lr_factor=constant, first_step=0, **options)
    assert not equal(other_end, run_end)


def test_the_branch_anneals_linearly_to_zero_over_exactly_the_window(corpus, tmp_path):
    checkpoint = tmp_path / "branch.ckpt"
    _, run_seen = short_fit(
        corpus, tmp_path, lr_factor=constant_after_warmup(10), callbacks=[CheckpointAt(30, checkpoint)]
    )
    _, branch_seen = short_fit(corpus, tmp_path, lr_factor=linear_anneal(30, 10), first_step=30, ckpt_path=checkpoint)
    assert run_seen.rates == pytest.approx([6e-3 * min(1.0, (step + 1) / 10) for step in range(40)])
    assert branch_seen.rates == pytest.approx([6e-3 * (1 - step / 10) for step in range(10)])


def test_merging_leaves_the_run_as_it_is(corpus, tmp_path):
    plain, _ = short_fit(corpus, tmp_path, lr_factor=constant_after_warmup(10))
    merging = ModelMerging.from_config(MERGING)
    merged, _ = short_fit(corpus, tmp_path, lr_factor=constant_after_warmup(10), callbacks=[merging])
    assert merging.last_record.step == 40
    assert equal(plain, merged)


def test_the_bar_runs_from_the_first_step_of_the_fit_to_the_last_of_the_run(corpus, tmp_path, capsys):
    checkpoint = tmp_path / "branch.ckpt"
    short_fit(corpus, tmp_path, lr_factor=constant_after_warmup(10), callbacks=[CheckpointAt(30, checkpoint)])
    bar = NamedBar("annealing")
    options = {"callbacks": [bar], "enable_progress_bar": True, "first_step": 30, "ckpt_path": checkpoint}
    short_fit(corpus, tmp_path, lr_factor=linear_anneal(30, 10), **options)
    assert (bar.train_progress_bar.initial, bar.train_progress_bar.n, bar.train_progress_bar.total) == (30, 40, 40)
    assert "annealing: 100%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "branch"),
    [({}, BRANCH), ({"average": "block", "window": 2}, BRANCH), ({"merge_every": None}, BRANCH)],
)
def test_the_branch_is_what_the_last_window_spans(changes, branch):
    assert last_window(SHORT, build(MergeConfig, MERGING | changes)) == branch


@pytest.mark.parametrize(
    "changes", [{"every": "5 samples"}, {"merge_every": "1M tokens"}, {"merge_every": 15}, {"window": 8}]
)
def test_a_run_that_does_not_fit_its_merging_is_refused_before_anything_is_touched(changes, tmp_path):
    with pytest.raises(ConfigError, match=r"num_steps: 40 does not fit"):
        run.demo(SHORT, out=tmp_path / "demo", merging=MERGING | changes)
    assert not (tmp_path / "demo").exists()


def test_the_shipped_configuration_fits_the_default_experiment():
    config = ModelMerging.from_config(run.MERGE_YAML).config
    assert config.every == "1%"
    branch = last_window(Experiment(), config)
    assert branch.start + branch.num_steps == Experiment().num_steps
    assert Experiment().num_steps % branch.validate_every == 0
    assert 0.09 < branch.num_steps / (Experiment().num_steps - Experiment().warmup_steps) < 0.1  # ten intervals of 1%


def test_the_branch_begins_at_a_merge_point_so_that_its_first_point_and_a_forecast_are_measured():
    config = ModelMerging.from_config(run.MERGE_YAML).config
    branch = last_window(Experiment(), config)
    assert last_window(Experiment(num_steps=branch.start), config).num_steps > 0  # a run that ended there would fit


def test_the_branch_of_a_growing_interval_is_what_the_merger_merges():
    config = ModelMerging.from_config(run.MERGE_YAML).config
    merger = RollingMerger(window=config.window, every=config.every, span=config.span, views=["sma"])
    module = torch.nn.Linear(1, 1)
    for step in range(1, Experiment().num_steps + 1):
        merger.observe(module, step, lr=min(1.0, step / Experiment().warmup_steps))
    with merger.merged(module, "sma") as recipe:
        assert recipe.steps[-1] == Experiment().num_steps
        assert recipe.steps[0] == last_window(Experiment(), config).start


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    thesis = tmp_path / "demo" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    for place in (thesis.parent, thesis):
        with pytest.raises(CheckpointError, match=r"(?s)not the folder of an earlier demo.*--out"):
            run.demo(SHORT, out=place, merging=MERGING)
    assert thesis.read_text() == "years of work"
    assert list(thesis.parent.iterdir()) == [thesis]


def test_a_folder_of_ours_is_emptied_and_nothing_beyond_it(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    out = tmp_path / "demo"
    run.prepare_folder(out)
    (out / "merged" / "step").mkdir(parents=True)
    (out / "merges.jsonl").touch()
    (out / "latest-run").symlink_to(elsewhere)
    run.prepare_folder(out)
    assert [path.name for path in out.iterdir()] == [".pretrain-merge-demo"]
    assert (elsewhere / "file").exists()


def test_a_missing_library_is_said_before_training(tmp_path, monkeypatch):
    found = run.find_spec
    monkeypatch.setattr(run, "find_spec", lambda name: None if name in ("rich", "matplotlib") else found(name))
    with pytest.raises(MissingDependencyError, match=r"rich, matplotlib.*pretrain-merge\[demo\]"):
        run.demo(SHORT, out=tmp_path / "demo", merging=MERGING)
    assert not (tmp_path / "demo").exists()


def test_the_configuration_ships_beside_the_code():
    assert Path(run.__file__).parent == run.MERGE_YAML.parent
    assert run.MERGE_YAML.is_file()


def test_the_branch_starts_its_data_where_it_leaves_the_run(monkeypatch, tmp_path):
    import pretrain_merge.demo.run as run_module
    from pretrain_merge.demo.experiment import Branch, Experiment

    seen = {}
    monkeypatch.setattr(run_module, "fit", lambda *_, **options: seen.update(options))
    run_module.anneal(Experiment(), None, Branch(2200, 200, 20), tmp_path / "step.ckpt", None)
    assert seen["first_step"] == 2200
