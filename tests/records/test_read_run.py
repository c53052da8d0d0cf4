"""What loggers wrote reads back as the merges that were logged."""

import csv
import dataclasses
import math

import pytest
from harness.wandb_files import finished_records
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.records import Expected, MergeRecord, Recipe, append_record
from pretrain_merge.records.loggers import Tracker
from pretrain_merge.records.read_run import read_run


def record(step):
    snapshots = (step - 20, step - 10, step)
    return MergeRecord(
        name="merge",
        step=step,
        samples=0,
        tokens=64 * step,
        window=3,
        spread=0.25,
        raw={"val_loss": 2.0 + 1 / step, "val/other": 1.0},
        views={"sma": {"val_loss": 1.5, "val/other": 0.5}, "sma2": {"val_loss": 1.75}, "wsm": {"val_loss": 1.625}},
        recipes={
            "sma": Recipe(snapshots, (1 / 3,) * 3),
            "sma2": Recipe(snapshots[1:], (0.5, 0.5)),
            "wsm": Recipe(snapshots, (0.5, 0.3, 0.2)),
        },
        forecasts={"now": {"val_loss": Expected(1.5, 1.4, 1.6, step + 7)}},
        lr=(1e-3,),
    )


RECORDS = [record(step) for step in (100, 200, 300)]


def what_an_export_knows(item):
    """A record without what no logger was told."""
    recipes = {view: recipe for view, recipe in item.recipes.items() if view != "wsm"}
    return dataclasses.replace(item, lr=(), recipes=recipes)


def logged(logger):
    for item in RECORDS:
        Tracker().publish([logger], item)
        logger.log_metrics({"train_loss": 3.0}, step=item.step + 1)
    logger.save()


def test_a_runs_folder_is_read_by_its_records(tmp_path):
    for item in RECORDS:
        append_record(tmp_path / "merges.jsonl", item)
    assert read_run(tmp_path) == RECORDS
    assert read_run(tmp_path / "merges.jsonl") == RECORDS


def test_records_of_a_callback_with_a_name_of_its_own_are_found_in_the_runs_folder(tmp_path):
    append_record(tmp_path / "merges.jsonl", RECORDS[0])
    append_record(tmp_path / "long [1]" / "merges.jsonl", dataclasses.replace(RECORDS[1], name="long [1]"))
    assert [item.step for item in read_run(tmp_path, name="long [1]")] == [200]
    assert [item.step for item in read_run(tmp_path)] == [100]


def test_a_folder_of_runs_names_those_in_it(tmp_path):
    for version in ("version_0", "version_1"):
        append_record(tmp_path / "lightning_logs" / version / "merges.jsonl", RECORDS[0])
    with pytest.raises(
        CheckpointError, match=r"lightning_logs is not a run.*version_0, .*version_1\. Name one of these"
    ):
        read_run(tmp_path / "lightning_logs")


def test_lightnings_csv_gives_the_merges_back(tmp_path):
    logger = CSVLogger(tmp_path)
    logged(logger)
    assert read_run(logger.log_dir and tmp_path / "lightning_logs" / "version_0", every=10) == [
        what_an_export_knows(item) for item in RECORDS
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_offline_wandb_run_gives_the_merges_back(tmp_path):
    import wandb

    logged(WandbLogger(save_dir=tmp_path, offline=True, project="tests"))
    wandb.finish()
    finished_records(*tmp_path.rglob("*.wandb"))
    assert read_run(tmp_path, every=10) == [what_an_export_knows(item) for item in RECORDS]


def test_means_of_intervals_that_grow_span_what_was_logged(tmp_path):
    path = tmp_path / "export.csv"
    # at 1% of 367 steps, every 3.67: five snapshots over 14 steps and six over 17
    row = {"merge/step": 367, "merge/window": 10, "merge/raw/val_loss": 2.0} | {
        f"merge/{view}/{key}": value
        for view, span in (("sma5", 14), ("forecast/sma", 17))
        for key, value in (("val_loss", 1.5), ("span", span))
    }
    with path.open("w", newline="") as file:
        csv.DictWriter(file, fieldnames=list(row)).writeheader()
        csv.DictWriter(file, fieldnames=list(row)).writerow(row)
    (found,) = read_run(path, every=4)
    assert {view: recipe.steps[-1] - recipe.steps[0] for view, recipe in found.recipes.items()} == {
        "sma5": 14, "forecast/sma": 17,
    }  # fmt: skip


@pytest.mark.parametrize("every", [0, -3])
def test_a_distance_that_is_none_is_refused(tmp_path, every):
    logged(CSVLogger(tmp_path))
    with pytest.raises(ConfigError, match=rf"every: {every} is not a number of steps"):
        read_run(tmp_path / "lightning_logs" / "version_0", every=every)


def test_a_csv_exported_from_wandb_has_the_runs_name_before_each_metric(tmp_path):
    path = tmp_path / "export.csv"
    rows = [{f"brave-sun-7 - {key}": value for key, value in item.metrics().items()} for item in RECORDS]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["Step", *rows[0]])
        writer.writeheader()
        writer.writerows({"Step": index} | row for index, row in enumerate(rows))
    assert read_run(path, every=10) == [what_an_export_knows(item) for item in RECORDS]


def test_an_export_without_the_distance_of_snapshots_is_an_error(tmp_path):
    logged(CSVLogger(tmp_path))
    with pytest.raises(ConfigError, match=r"every: not given.*--every"):
        read_run(tmp_path / "lightning_logs" / "version_0")


@pytest.mark.parametrize("content", ["", "step,val_loss\n1,2\n", "merge/step\n1\n"])
def test_a_file_without_merges_is_an_error(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"holds no merge of 'merge'"):
        read_run(path, every=10)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b":W&B\x0a\xbe\x00" + b"\x00" * 7 + b"\x00\x00\x00\x00\x02\x00\x01ab"]
)
def test_a_file_that_is_no_wandb_run_is_an_error(tmp_path, content):
    path = tmp_path / "run.wandb"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_run(path, every=10)


def test_a_folder_of_something_else_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a run.*Name the folder"):
        read_run(tmp_path)


def test_a_cell_that_is_no_finite_number_is_not_read(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("merge/step,merge/window,merge/raw/val_loss,merge/sma/val_loss\n10,2,2.0,nan\n20,2,,\n")
    (found,) = read_run(path, every=10)
    assert found.raw == {"val_loss": 2.0}
    assert found.views == {}
    assert math.isnan(found.spread)
