"""Records in real loggers, read back from their own files."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness.models import LIGHTNING_REMARKS, MemoryLogger, Regression, TiedModel, documents, rows, trainer
from harness.records import RECORD, at, falling_run
from harness.wandb_files import finished_records
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from pretrain_merge import ModelMerging
from pretrain_merge.records import read_records
from pretrain_merge.records.loggers import Tracker

pytestmark = LIGHTNING_REMARKS


def fit(folder: Path, *loggers: Any) -> dict[int, dict[str, float]]:
    """Merges at steps 4 and 6, with a second callback whose merge is at step 6; what the records say, by step."""
    callbacks = [ModelMerging(window=2, every=2, views=["sma", "wma"]), ModelMerging(window=2, every=3, name="slow")]
    own = trainer(folder, *callbacks, max_steps=6, logger=list(loggers), val_check_interval=2, log_every_n_steps=1)
    own.fit(TiedModel(), documents(), documents(6, seed=1))
    lines: dict[int, dict[str, float]] = {}
    for path in folder.rglob("merges.jsonl"):
        for record in read_records(path):
            lines.setdefault(record.step, {}).update(record.metrics())
    return lines


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory) -> SimpleNamespace:
    """What the records say, the rows of the history, how each metric was defined, the configuration, the files."""
    import wandb

    folder = tmp_path_factory.mktemp("wandb")
    lines = fit(folder, WandbLogger(save_dir=folder, offline=True, project="tests"))
    wandb.finish()
    (path,) = folder.rglob("*.wandb")
    history, defined, config = [], {}, {}
    for record in finished_records(path):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append(row)
        elif record.WhichOneof("record_type") == "metric":
            defined[record.metric.name or record.metric.glob_name] = record.metric
        elif record.WhichOneof("record_type") == "config":
            config |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.config.update
            }
    return SimpleNamespace(lines=lines, history=history, defined=defined, config=config, files=path.parent / "files")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_has_raw_merged_and_step_of_every_merge_in_one_row(wandb_run):
    lines, history = wandb_run.lines, wandb_run.history
    assert sorted(lines) == [4, 6]
    for step, name in ((4, "merge"), (6, "merge"), (6, "slow")):
        (row,) = (row for row in history if row.get(f"{name}/step") == step)
        expected = {key: value for key, value in lines[step].items() if key.startswith(f"{name}/")}
        assert {key: row[key] for key in expected} == pytest.approx(expected)
        assert {f"{name}/raw/val_loss", f"{name}/sma/val_loss", f"{name}/tokens", f"{name}/spread"} <= expected.keys()
        assert row["trainer/global_step"] == step


def test_wandb_draws_every_metric_of_ours_against_the_step_of_the_merge(wandb_run):
    for metric in {**wandb_run.lines[4], **wandb_run.lines[6]}:
        name = metric.partition("/")[0]
        own_axis = metric in (f"{name}/step", f"{name}/tokens")
        assert wandb_run.defined[metric].step_metric == ("" if own_axis else f"{name}/step"), metric


def test_wandb_summarises_a_metric_by_its_best_and_its_last_value(wandb_run):
    for name, has_summary in (("merge/raw/val_loss", True), ("merge/sma/val_loss", True), ("merge/spread", False)):
        summary = wandb_run.defined[name].summary
        assert (summary.min, summary.last, summary.max) == (has_summary, has_summary, False)


def test_wandb_has_the_configuration_of_each_callback(wandb_run):
    assert (wandb_run.config["merge/config"]["views"], wandb_run.config["slow/config"]["every"]) == (["sma", "wma"], 3)
    assert "merge" not in wandb_run.config  # a key that the user may have


@pytest.mark.parametrize(("name", "steps"), [("merge", [4, 6]), ("slow", [6])])
def test_wandb_has_a_table_and_a_picture_of_all_merges(wandb_run, name, steps):
    (table,) = (json.loads(path.read_text()) for path in wandb_run.files.glob(f"media/table/{name}/merges*.json"))
    assert [row[table["columns"].index("step")] for row in table["data"]] == steps
    assert not any(column.startswith(f"{name}/") for column in table["columns"])  # the table has the name
    (picture,) = wandb_run.files.glob(f"media/images/{name}/curves*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_p15_wandb_keeps_the_users_own_metrics_on_their_axis(wandb_run):
    history = wandb_run.history
    assert wandb_run.defined["*"].step_metric == "trainer/global_step"
    own = [row for row in history if "val_loss" in row]
    assert [row["trainer/global_step"] for row in own] == [1, 3, 5]  # Lightning's own count, untouched by us
    assert not any(key.startswith("merge/") for row in own for key in row)


class _Experiment:
    def __init__(self) -> None:
        self.defined: list[tuple[str, str | None, str | None]] = []

    def define_metric(self, name: str, step_metric: str | None = None, summary: str | None = None) -> None:
        self.defined.append((name, step_metric, summary))


class _LikeWandb(MemoryLogger):
    LOGGER_JOIN_CHAR = "-"

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.experiment, self._prefix, self.num_saves = _Experiment(), prefix, 0

    def save(self) -> None:
        self.num_saves += 1


def test_axes_carry_the_loggers_prefix_and_are_defined_once():
    logger, tracker = _LikeWandb("mine"), Tracker()
    tracker.publish([logger], RECORD)
    tracker.publish([logger], RECORD)
    assert sorted(logger.experiment.defined, key=str) == [
        ("mine-merge/raw/val_loss", "mine-merge/step", "min,last"),
        ("mine-merge/sma/span", "mine-merge/step", None),
        ("mine-merge/sma/val_loss", "mine-merge/step", "min,last"),
        ("mine-merge/sma2/val_loss", "mine-merge/step", "min,last"),
        ("mine-merge/spread", "mine-merge/step", None),
        ("mine-merge/step", None, None),
        ("mine-merge/tokens", None, None),
        ("mine-merge/window", "mine-merge/step", None),
    ]


def test_every_logger_is_given_its_axes():
    first, second = _LikeWandb(), _LikeWandb()
    Tracker().publish([first, second], RECORD)
    assert len(first.experiment.defined) == len(second.experiment.defined) == 8


@pytest.mark.parametrize(
    ("metric", "modes", "best"), [("acc", {}, "max"), ("x", {}, "min"), ("x", {"x": "max"}, "max")]
)
def test_the_best_value_is_the_largest_of_a_metric_that_should_be_large(metric, modes, best):
    logger = _LikeWandb()
    Tracker(modes=modes).publish([logger], at(1, raw={metric: 1.0}, views={}))
    assert (f"merge/raw/{metric}", "merge/step", f"{best},last") in logger.experiment.defined


def test_a_second_run_of_one_callback_is_given_its_axes(tmp_path):
    merging, loggers = ModelMerging(window=2, every=2), [_LikeWandb(), _LikeWandb()]
    for logger in loggers:
        trainer(tmp_path, merging, max_steps=4, logger=logger).fit(Regression(), rows(), rows(4, seed=1))
    assert loggers[0].experiment.defined == loggers[1].experiment.defined != []


def test_p15_the_step_is_that_of_the_merge_and_the_logger_is_saved():
    logger = _LikeWandb()
    Tracker().publish([logger], RECORD)
    assert logger.lines == [(400, RECORD.metrics())]
    assert logger.num_saves == 1


def test_tensorboard_has_every_metric_at_the_step_of_its_merge(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="run")
    lines = fit(tmp_path, logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    for metric in {**lines[4], **lines[6]}:
        found = {event.step: event.value for event in events.Scalars(metric)}
        assert found == pytest.approx({step: line[metric] for step, line in lines.items() if metric in line}, rel=1e-6)
    assert [event.step for event in events.Scalars("val_loss")] == [1, 3, 5]


def test_tensorboard_draws_raw_views_and_forecasts_in_one_chart(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    logger, tracker = TensorBoardLogger(tmp_path, name="run", prefix="p"), Tracker(forecasts={"soon": "val_loss"})
    records = falling_run(4)
    for record in records:
        tracker.publish([logger], record)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (found,) = events.Tensors("custom_scalars__config__")
    (category,) = layout_pb2.Layout.FromString(found.tensor_proto.string_val[0]).category
    charts = {chart.title: chart for chart in category.chart}
    tags = events.Tags()["scalars"]
    overlay = [tag for tag in tags if re.match(charts["val_loss"].multiline.tag[0], tag)]
    models = ("raw", "sma", "sma2", "forecast/soon")
    assert sorted(overlay) == sorted(f"p-merge/{model}/val_loss" for model in models)
    (series,) = charts["forecast: soon"].margin.series
    assert {series.value, series.lower, series.upper} <= set(tags)
    assert [tag for tag in tags if re.match(charts["gap closed"].multiline.tag[0], tag)] == [
        "p-merge/sma/gap_closed/soon",
        "p-merge/sma2/gap_closed/soon",
    ]


@pytest.mark.filterwarnings("ignore")  # its libraries' own
def test_mlflow_has_every_metric_at_the_step_of_its_merge(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed; it is no dependency of ours")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.chdir(tmp_path)
    logger = MLFlowLogger("tests", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    lines = fit(tmp_path, logger)
    for metric in {**lines[4], **lines[6]}:
        found = {item.step: item.value for item in logger.experiment.get_metric_history(logger.run_id, metric)}
        assert found == pytest.approx({step: line[metric] for step, line in lines.items() if metric in line})


def test_csv_has_every_metric_at_the_step_of_its_merge(tmp_path):
    logger = CSVLogger(tmp_path, name="run")
    lines = fit(tmp_path, logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    for step, line in lines.items():
        for metric, value in line.items():
            assert float(value) in [float(row[metric]) for row in table if row["step"] == str(step) and row[metric]]


def test_several_loggers_are_given_the_same(tmp_path):
    loggers = [MemoryLogger(tmp_path / "a"), MemoryLogger(tmp_path / "b")]
    lines = fit(tmp_path, *loggers)
    for logger in loggers:
        ours = [(step, line) for step, line in logger.lines if any("/" in key for key in line)]
        assert [step for step, _ in ours] == [4, 6, 6]
        assert {**ours[1][1], **ours[2][1]} == lines[6]


def test_without_a_logger_nothing_is_missing(tmp_path):
    assert sorted(fit(tmp_path)) == [4, 6]


def test_a_metric_that_is_not_finite_reaches_logger_and_file(tmp_path):
    logger = MemoryLogger(tmp_path)
    merging = ModelMerging(window=2, every=2, evaluators={"own": lambda _: {"x": float("nan"), "y": float("inf")}})
    trainer(tmp_path, merging, max_steps=4, logger=logger).fit(Regression(), rows(), rows(4, seed=1))
    (line,) = (line for step, line in logger.lines if step == 4)
    assert str(line["merge/sma/own/x"]) == "nan"
    (record,) = read_records(tmp_path / "merges.jsonl")
    assert str(record.views["sma"]["own/x"]) == "nan"
    assert record.views["sma"]["own/y"] == float("inf")
