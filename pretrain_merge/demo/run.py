"""The demo from end to end: train with merging on, anneal one real branch, compare, draw, and say what was seen.

This module knows the order of things and the folder they end in. What is merged, and when, is `merge.yaml`'s business;
how a Trainer is set up is `fitting`'s; what is said is `report`'s.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from pretrain_merge import ModelMerging, load_merged
from pretrain_merge.config import parse_views
from pretrain_merge.demo.corpus import Corpus, load_corpus
from pretrain_merge.demo.experiment import FAMILIES, Branch, Experiment, last_window
from pretrain_merge.demo.fitting import (
    CheckpointAt,
    NamedBar,
    ValidationCurve,
    fit,
    offline_run,
    quiet,
    validation_loader,
)
from pretrain_merge.demo.models import (
    LanguageModel,
    build_model,
    constant_after_warmup,
    language_model,
    linear_anneal,
)
from pretrain_merge.demo.report import METRIC, Summary, show, summarise
from pretrain_merge.demo.routing import Routing, compare, read_routers
from pretrain_merge.errors import CheckpointError, MissingDependencyError
from pretrain_merge.files import atomic
from pretrain_merge.records import MergeRecord, plots, read_records

MERGE_YAML = Path(__file__).with_name("merge.yaml")

_MARKER = ".pretrain-merge-demo"  # tells our folder from anybody else's


def demo(
    experiment: Experiment | None = None, *, out: Path = Path("runs/demo"), merging: object = MERGE_YAML
) -> Summary:
    """Train, anneal, compare; prints what happens and leaves the results in a folder.

    The folder then holds `summary.json`, `merges.jsonl`, `curves.png`, `merged/` (safetensors), `wandb/` (an offline
    run) and `checkpoints/` (where the anneal branched off). A folder of an earlier demo is replaced.

    Args:
        experiment: What is trained; default: the one behind the README's figures.
        out: Where results go.
        merging: Configuration of `ModelMerging`, its intervals in steps: a YAML file or a mapping.

    Raises:
        CheckpointError: `out` holds something that is not ours.
        ConfigError: The experiment's steps do not fit the merging, or its family is unknown.
        MissingDependencyError: A library of the extra `demo` is missing, or the source text of Python.
    """
    _require_libraries()
    experiment = experiment or Experiment()
    # all that can be refused is refused before an earlier run's folder is emptied
    callback = ModelMerging.from_config(merging)
    branch = last_window(experiment, callback.config)
    corpus = load_corpus()
    # built once more only to be counted: the module itself is made inside, when the clock runs
    parameters = build_model(experiment.family, seed=experiment.seed).num_parameters()
    name = FAMILIES[experiment.family]
    prepare_folder(out)
    print(
        f"Training a {name} of {parameters:,} parameters for {experiment.num_steps} steps on "
        f"{len(corpus.train) / 1e6:.1f} MB of Python's standard library ({len(corpus.validation) / 1e6:.1f} MB held "
        f"out), then its last {branch.num_steps} steps once more, annealing."
    )
    with quiet(), offline_run(experiment, out) as logger:
        started = time.perf_counter()
        module = language_model(experiment, constant_after_warmup(experiment.warmup_steps))
        checkpoint = train(experiment, corpus, module, callback, branch, out, logger)
        seconds_train = time.perf_counter() - started
        curve = anneal(experiment, corpus, branch, checkpoint, logger)
        seconds_anneal = time.perf_counter() - started - seconds_train
    records = read_records(out / "merges.jsonl")
    views = [view.name for view in parse_views(callback.config)]
    summary = summarise(
        records,
        {record.step: record.raw[METRIC] for record in records if record.step == branch.start} | curve,
        views=views,
        routing=routing(experiment, corpus, module, checkpoint, out / "merged", views[0]),
        model=name,
        parameters=parameters,
        seconds_train=seconds_train,
        seconds_anneal=seconds_anneal,
    )
    atomic.write(out / "summary.json", json.dumps(asdict(summary), indent=2) + "\n")
    draw(records, summary, out / "curves.png")
    show(records, summary, out)
    return summary


def train(
    experiment: Experiment,
    corpus: Corpus,
    module: LanguageModel,
    merging: Callback,
    branch: Branch,
    out: Path,
    logger: WandbLogger | None,
) -> Path:
    """The run itself: warm-up, then constant rate, with merging on.

    Args:
        experiment: What is trained.
        corpus: The text.
        module: The model, which is trained.
        merging: The callback under demonstration.
        branch: Where the annealing branch will leave the run; a Lightning checkpoint is saved there.
        out: Folder of the run.
        logger: Where metrics go.

    Returns:
        The checkpoint.
    """
    checkpoint = out / "checkpoints" / f"step-{branch.start:08d}.ckpt"
    fit(
        experiment,
        corpus,
        module,
        callbacks=[merging, CheckpointAt(branch.start, checkpoint), NamedBar("training")],
        default_root_dir=out,
        logger=logger,
    )
    return checkpoint


def anneal(
    experiment: Experiment, corpus: Corpus, branch: Branch, checkpoint: Path, logger: WandbLogger | None
) -> dict[int, float]:
    """The check: go back to where the last window began and train on while the learning rate falls linearly to zero.

    The branch sees the batches that the run saw, so that nothing but the learning rate differs.

    Args:
        experiment: What was trained.
        corpus: The text.
        branch: The stretch.
        checkpoint: Lightning checkpoint of the run at the start of the stretch.
        logger: Where `annealed/val_loss` goes.

    Returns:
        Validation loss of the branch by step, up to the run's last step.
    """
    curve = ValidationCurve(logger)
    fit(
        experiment,
        corpus,
        language_model(experiment, linear_anneal(branch.start, branch.num_steps)),
        first_step=branch.start,
        ckpt_path=checkpoint,
        callbacks=[curve, NamedBar("annealing")],
        default_root_dir=checkpoint.parent,
        logger=False,
        check_val_every_n_epoch=None,
        val_check_interval=branch.validate_every,
    )
    return curve.values


def routing(
    experiment: Experiment, corpus: Corpus, module: LanguageModel, checkpoint: Path, merged: Path, view: str
) -> Routing | None:
    """What the last merge did to the routers of a mixture of experts; None for a dense model.

    Args:
        experiment: What was trained.
        corpus: The text.
        module: The run's model after its last step.
        checkpoint: Of the run, where its last window began.
        merged: Folder of the merged weights.
        view: Of which the newest are read.
    """
    folders = sorted(merged.glob(f"*-{view}"))
    if experiment.family != "moe" or not folders:
        return None
    other = language_model(experiment, constant_after_warmup(experiment.warmup_steps))
    batches = [batch["input_ids"] for batch in validation_loader(experiment, corpus)]
    # read before `other` gets weights: one model after another, so that two are in memory at most
    raw = read_routers(module.model.eval(), batches)
    other.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    before = read_routers(other.model.eval(), batches)
    load_merged(other, folders[-1])
    return compare(raw, read_routers(other.model.eval(), batches), before, module.model.config.num_experts_per_tok)


def draw(records: Sequence[MergeRecord], summary: Summary, path: Path) -> None:
    """Raw, merged and annealed curves as a PNG."""
    figure = plots.curves(
        records,
        metric=METRIC,
        views=list(summary.merged),
        annealed=summary.anneal_curve,
        label="validation loss (nats per byte)",
        title=f"{summary.model} of {summary.parameters:,} parameters, constant learning rate, Python source text",
    )
    plots.save(figure, path)


def prepare_folder(out: Path) -> None:
    """An empty folder for a run; what an earlier demo left there goes.

    Raises:
        CheckpointError: The folder holds something that no demo wrote.
    """
    if out.exists() and not (out / _MARKER).exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            f"{out} exists and is not the folder of an earlier demo, so it is not replaced. Choose another with --out, "
            f"or move it away."
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()  # first, so that a run that is interrupted leaves a folder that the next one recognises
    for path in out.iterdir():
        # a link in the folder is removed, and never what it points to
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _MARKER:
            path.unlink()


def _require_libraries() -> None:
    """Say what is missing before minutes of training, not after."""
    missing = [name for name in ("transformers", "rich", "matplotlib") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"The demo needs {', '.join(missing)}, which this Python does not have. "
            f"Run: pip install 'pretrain-merge[demo]'"
        )
