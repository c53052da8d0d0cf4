"""What loggers wrote reads back as the merges that were logged."""

import csv
import dataclasses
import math

import pytest
from harness.wandb_files import finished_records
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from pretrain_merge.cadence import Share
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


def write_csv(path, rows, without=()):
    rows = [{key: value for key, value in row.items() if not key.endswith(tuple(without) or "/never")} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


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

    # without means of a fixed number, only the configuration says how far apart the snapshots were
    items = [dataclasses.replace(item, views={"sma": item.views["sma"]}) for item in RECORDS]
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="tests")
    tracker = Tracker(config={"every": 10, "average": "last"})
    tracker.begin([logger], "merge")
    for item in items:
        tracker.publish([logger], dataclasses.replace(item, recipes={"sma": item.recipes["sma"]}))
    wandb.finish()
    finished_records(*tmp_path.rglob("*.wandb"))
    assert read_run(tmp_path) == [
        dataclasses.replace(item, lr=(), recipes={"sma": item.recipes["sma"]}) for item in items
    ]
    assert len(read_run(tmp_path, every="5 steps")[0].recipes["sma"].steps) == 5  # what the user says counts more


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
    with pytest.raises(ConfigError, match=rf"every: {every} is not a quantity"):
        read_run(tmp_path / "lightning_logs" / "version_0", every=every)


def test_a_csv_exported_from_wandb_has_the_runs_name_before_each_metric(tmp_path):
    path = tmp_path / "export.csv"
    rows = [{f"brave-sun-7 - {key}": value for key, value in item.metrics().items()} for item in RECORDS]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["Step", *rows[0]])
        writer.writeheader()
        writer.writerows({"Step": index} | row for index, row in enumerate(rows))
    assert read_run(path, every=10) == [what_an_export_knows(item) for item in RECORDS]


def test_an_export_of_a_view_with_a_number_says_how_far_apart_the_snapshots_were(tmp_path):
    logged(CSVLogger(tmp_path))
    assert read_run(tmp_path / "lightning_logs" / "version_0") == [what_an_export_knows(item) for item in RECORDS]


def of_share(percent, step, number, tokens=0):
    """A merge of snapshots at a share of the steps, or of the tokens, as the callback takes them."""
    every, per_step = Share(percent), tokens // step or 1
    last = every.index(step * per_step)
    taken = tuple(math.ceil(every.reached(last - back) / per_step) for back in reversed(range(number)))
    recipe = Recipe((*taken[:-1], step), (1 / number,) * number)
    values = {"val_loss": 1.0 + 100 / step}
    return MergeRecord("merge", step, 0, tokens, number, 0.1, values, {"sma": values}, {"sma": recipe})


@pytest.mark.parametrize("with_spans", [True, False])
def test_a_share_gives_the_very_snapshots_of_each_merge(tmp_path, with_spans):
    # of no view with a number, so that the file does not say the interval
    items = [of_share(2.0, Share(2.0).reached(index), 8) for index in (60, 70, 80)]
    write_csv(tmp_path / "a.csv", [item.metrics() for item in items], without=() if with_spans else ("span",))
    with pytest.raises(ConfigError, match=r"every: not given, and a\.csv .*--every 1000, --every 1%"):
        read_run(tmp_path / "a.csv")
    found = read_run(tmp_path / "a.csv", every="2%")
    assert [len(item.recipes["sma"].steps) for item in found] == [8, 8, 8]
    assert [item.recipes["sma"].steps[0] for item in found] == [item.recipes["sma"].steps[0] for item in items]


def test_an_interval_in_tokens_is_told_in_steps_by_the_tokens_so_far(tmp_path):
    items = [of_share(2.0, 400, 8, tokens=400 * 64)]
    write_csv(tmp_path / "a.csv", [item.metrics() for item in items])
    for every, number in (("2% tokens", 8), ("512 tokens", None)):
        (found,) = read_run(tmp_path / "a.csv", every=every)
        span = items[0].recipes["sma"].steps[-1] - items[0].recipes["sma"].steps[0]
        assert len(found.recipes["sma"].steps) == (number or round(span / 8) + 1)
    with pytest.raises(ConfigError, match=r"every: 10 samples counts samples, of which the metrics say nothing"):
        read_run(tmp_path / "a.csv", every="10 samples")


def test_means_of_an_export_share_their_snapshots_also_where_half_a_step_is_rounded(tmp_path):
    row = {"merge/step": 367, "merge/window": 10, "merge/raw/val_loss": 2.0}
    row |= {f"merge/{view}/val_loss": 1.5 for view in ("sma", "sma5")}
    write_csv(tmp_path / "a.csv", [row | {"merge/sma/span": 24, "merge/sma5/span": 14}])
    (found,) = read_run(tmp_path / "a.csv")
    assert found.recipes["sma"].steps[-5:] == found.recipes["sma5"].steps


def test_a_window_that_shrank_was_begun_anew(tmp_path):
    rows = [{**item.metrics(), "merge/window": window} for item, window in zip(RECORDS, (3, 2, 3), strict=True)]
    write_csv(tmp_path / "a.csv", rows)
    assert [item.since for item in read_run(tmp_path / "a.csv")] == [0, 100, 100]


def test_a_raw_loss_that_is_not_a_number_is_read_as_one(tmp_path):
    write_csv(tmp_path / "a.csv", [{**RECORDS[0].metrics(), "merge/raw/val_loss": math.nan}])
    assert math.isnan(read_run(tmp_path / "a.csv")[0].raw["val_loss"])


def test_cells_that_an_export_filled_with_nan_were_not_measured(tmp_path):
    nothing = dict.fromkeys(RECORDS[0].metrics(), math.nan)
    late = {**nothing, "merge/step": float(RECORDS[0].step)}  # as numbers of a published model come
    write_csv(tmp_path / "a.csv", [nothing, RECORDS[0].metrics(), late, nothing])
    assert read_run(tmp_path / "a.csv") == [what_an_export_knows(RECORDS[0])]


def test_merges_of_another_name_are_named(tmp_path):
    write_csv(tmp_path / "a.csv", [dataclasses.replace(RECORDS[0], name="long").metrics()])
    with pytest.raises(CheckpointError, match=r"no merge of 'merge', and some of long\. Add --name long"):
        read_run(tmp_path / "a.csv")


@pytest.mark.parametrize("logged_metrics", ["step,val_loss\n1,2\n", None])
def test_a_run_that_has_not_merged_is_told_from_a_file_of_something_else(tmp_path, logged_metrics):
    (tmp_path / "merges.run.json").touch()
    if logged_metrics:
        (tmp_path / "metrics.csv").write_text(logged_metrics)
    with pytest.raises(
        CheckpointError, match=r"is of a run that has not merged\. Wait for the first.*its log says why"
    ):
        read_run(tmp_path)


def test_of_several_wandb_runs_in_a_folder_none_is_guessed(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / f"run-{run}.wandb").touch()
    with pytest.raises(CheckpointError, match=r"Runs in it: .*run-a\.wandb, .*run-b\.wandb\. Name one of these"):
        read_run(tmp_path)


def test_a_folder_of_folders_of_runs_is_not_read_by_the_one_wandb_run_in_it(tmp_path):
    append_record(tmp_path / "a" / "lightning_logs" / "version_0" / "merges.jsonl", RECORDS[0])
    (tmp_path / "b" / "offline-run-b").mkdir(parents=True)
    (tmp_path / "b" / "offline-run-b" / "run-b.wandb").touch()
    with pytest.raises(CheckpointError, match=r"Runs in it: .*version_0\. Name one of these"):
        read_run(tmp_path)


@pytest.mark.parametrize(("name", "said"), [("no", "does not exist"), ("a.csv.gz", "is a file of another kind")])
def test_a_path_that_is_no_run_says_what_it_is(tmp_path, name, said):
    (tmp_path / "a.csv.gz").touch()
    with pytest.raises(CheckpointError, match=rf"{name} {said}\. Name the folder of a run"):
        read_run(tmp_path / name)


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


def test_an_interval_that_decides_nothing_is_said_to(tmp_path, caplog):
    logger = CSVLogger(tmp_path)
    for item in RECORDS:
        Tracker().publish([logger], item)
    path = tmp_path / "lightning_logs" / "version_0"
    assert read_run(path, every=999) == read_run(path)
    (said,) = caplog.messages
    assert said == "every: 999 is not used, as metrics.csv says itself over how many steps its means reach."
