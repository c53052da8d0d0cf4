"""`merges.jsonl`: lines that read back in order, cut where a run resumes, and never held together in memory."""

import json
import math
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import strategies
from harness.records import RECORD, at, plain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain_merge.errors import CheckpointError
from pretrain_merge.records import (
    Late,
    MergeRecord,
    append_late,
    append_record,
    keep_records_until,
    read_records,
)


def written(tmp_path, *steps):
    path = tmp_path / "run" / "merges.jsonl"
    for step in steps:
        append_record(path, at(step))
    return path


@given(st.lists(strategies.records, max_size=4))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
def test_a_file_holds_its_records_in_order(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("run") / "merges.jsonl"
    path.touch()
    for record in records:
        append_record(path, record)
    assert [plain(record) for record in read_records(path)] == [plain(record) for record in records]


def test_the_folder_of_the_first_record_is_made(tmp_path):
    assert read_records(written(tmp_path, 100)) == [at(100)]


@pytest.mark.parametrize(
    "line",
    [
        *("", "{", "[]", "5", "null", '"merge"', "{}", '{"name": "merge"}'),
        json.dumps({key: value for key, value in json.loads(RECORD.to_json()).items() if key != "window"}),
        json.dumps({**json.loads(RECORD.to_json()), "recipes": [1]}),
        json.dumps({**json.loads(RECORD.to_json()), "recipes": {"sma": [1]}}),
        json.dumps({**json.loads(RECORD.to_json()), "recipes": {"sma": {"steps": 5, "coefficients": []}}}),
        json.dumps({**json.loads(RECORD.to_json()), "lr": 5}),
        json.dumps({**json.loads(RECORD.to_json()), "step": "400"}),
        json.dumps({**json.loads(RECORD.to_json()), "views": 5}),
        json.dumps({**json.loads(RECORD.to_json()), "since": -1}),
        json.dumps({**json.loads(RECORD.to_json()), "recipes": {"sma": {"steps": [2**63], "coefficients": [1.0]}}}),
        json.dumps({**json.loads(RECORD.to_json()), "lr": [True]}),
    ],
)
@pytest.mark.parametrize("read", [read_records, lambda path: keep_records_until(path, 400)], ids=["read", "keep"])
def test_a_line_that_is_not_a_record_is_an_error_that_names_file_and_line(tmp_path, line, read):
    path = written(tmp_path, 100)
    with path.open("a") as file:
        file.write(f"{line}\n")
    before = path.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert f"{path}, line 2 is not a merge record" in str(caught.value)
    assert "remove the line" in str(caught.value)
    assert path.read_bytes() == before


def test_what_a_later_version_wrote_is_read_as_far_as_it_is_known(tmp_path):
    path = tmp_path / "merges.jsonl"
    path.write_text(json.dumps({**json.loads(at(100).to_json()), "of_a_later_version": {"x": [1]}}) + "\n")
    assert read_records(path) == [at(100)]


def test_a_missing_file_says_what_to_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*merges\.jsonl.*Name the merges\.jsonl of a run"):
        read_records(tmp_path / "merges.jsonl")


def test_a_file_that_cannot_be_written_says_which_and_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as caught:
        append_record(tmp_path / "file" / "merges.jsonl", RECORD)
    assert "cannot append the merge at step 400" in str(caught.value)
    assert "default_root_dir" in str(caught.value)


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    path = written(tmp_path, 100, 200, 300, 400)
    keep_records_until(path, 250)
    append_record(path, at(300))
    assert [record.step for record in read_records(path)] == [100, 200, 300]


def test_a_half_written_last_line_goes_when_the_run_resumes(tmp_path):
    path = written(tmp_path, 100, 200)
    path.write_text(path.read_text() + at(300).to_json()[:57])
    keep_records_until(path, 1000)
    assert [record.step for record in read_records(path)] == [100, 200]


def test_a_character_that_was_cut_in_two_goes_with_its_line(tmp_path):
    path = written(tmp_path, 100)
    path.write_bytes(path.read_bytes() + b'{"name": "\xc3')
    keep_records_until(path, 1000)
    assert [record.step for record in read_records(path)] == [100]


def test_a_new_folder_begins_with_the_records_before_all_at_once(tmp_path, monkeypatch):
    before, path = written(tmp_path / "before", 100, 200, 300), tmp_path / "after" / "merges.jsonl"
    before.write_text(before.read_text() + at(400).to_json()[:57])
    content = before.read_bytes()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            keep_records_until(path, 250, before=before)
    assert not path.exists()
    keep_records_until(path, 250, before=before)
    assert [record.step for record in read_records(path)] == [100, 200]
    keep_records_until(path, 150, before=before)  # what is there goes on
    assert [record.step for record in read_records(path)] == [100]
    assert list(path.parent.iterdir()) == [path]
    assert before.read_bytes() == content


def test_a_file_with_nothing_to_cut_is_not_touched(tmp_path):
    path = written(tmp_path, 100, 200)
    before = path.stat()
    keep_records_until(path, 200)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_cutting_a_run_that_has_no_records_yet_makes_no_file(tmp_path):
    keep_records_until(tmp_path / "merges.jsonl", 100)
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_is_read_once_in_order_and_the_last_step_known(tmp_path):
    path, read = written(tmp_path, 100, 200, 300, 400), []
    assert keep_records_until(path, 350, read=read.append) == 300
    assert read == [at(100), at(200), at(300)]
    assert keep_records_until(path, 50) == 0
    assert read_records(path) == []


def test_two_runs_that_shared_a_file_are_cut_alike(tmp_path):
    path = written(tmp_path, 100, 300, 100, 200, 400, 200)
    assert keep_records_until(path, 200) == 200
    assert [record.step for record in read_records(path)] == [100, 100, 200, 200]


@given(st.lists(strategies.records, max_size=4))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_a_resumed_run_reads_is_what_was_written(tmp_path_factory, records):
    path, read = tmp_path_factory.mktemp("run") / "merges.jsonl", []
    path.write_text("".join(record.to_json() + "\n" for record in records))
    keep_records_until(path, 2**63, read=read.append)
    assert [*map(plain, read)] == [*map(plain, records)]


def test_a_view_called_as_a_key_of_ours_hides_nothing(tmp_path):
    path, read = tmp_path / "merges.jsonl", []
    record = replace(at(100), views={"a": {"x": 1.0}, "recipes": {"skipped": 1.0}}, phase=', "recipes": {')
    append_record(path, record)
    keep_records_until(path, 100, read=read.append)
    assert read == [record]


def test_resuming_holds_one_record_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain_merge.records.jsonl._BLOCK", 4096)
    path = tmp_path / "merges.jsonl"
    line = at(100).to_json() + "\n"
    path.write_text(line * 3000 + at(300).to_json())
    tracemalloc.start()
    assert keep_records_until(path, 200) == 100
    assert tracemalloc.get_traced_memory()[1] < 300_000  # of a file of a megabyte
    tracemalloc.stop()
    assert path.read_text() == line * 3000


def test_nothing_is_written_through_a_link(tmp_path):
    victim = written(tmp_path, 100, 200)
    before = victim.read_bytes()
    link = tmp_path / "merges.jsonl"
    link.symlink_to(victim)
    with pytest.raises(CheckpointError, match=r"cannot append .*merges\.jsonl"):
        append_record(link, at(300))
    with pytest.raises(CheckpointError, match=r"cannot cut .*merges\.jsonl"):
        keep_records_until(link, 150)
    assert victim.read_bytes() == before


def test_a_line_without_an_end_is_not_read_without_an_end(tmp_path):
    path = tmp_path / "merges.jsonl"
    path.touch()
    os.truncate(path, 2**30)  # a hole: nothing is on the disk
    with pytest.raises(CheckpointError, match=r"a line has more than [\d,]+ bytes"):
        read_records(path)


def test_a_line_nested_deeper_than_python_reads_is_not_a_record(tmp_path):
    path = tmp_path / "merges.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(CheckpointError, match="line 1 is not a merge record"):
        read_records(path)


def test_numbers_that_came_later_are_in_the_records_that_they_are_of(tmp_path):
    path = tmp_path / "merges.jsonl"
    first, second = (MergeRecord("merge", step, 0, 0, 2, 0.1, {"x": 1.0}, {"sma": {"x": 2.0}}) for step in (10, 20))
    late = Late("merge", 10, "sma", {"acc": 0.5, "x": math.nan})
    for write, item in ((append_record, first), (append_record, second), (append_late, late)):
        write(path, item)
    append_late(path, Late("merge", 20, "raw", {"acc": 0.25}))
    of_first, of_second = read_records(path)
    assert of_first.views["sma"]["published/acc"] == 0.5
    assert math.isnan(of_first.views["sma"]["published/x"])
    assert of_first.views["sma"]["x"] == 2.0  # never hidden by a number of the same name
    assert of_second.raw == {"x": 1.0, "published/acc": 0.25}
    # a resumed run keeps those of the steps that it keeps, wherever they stand
    seen: list[MergeRecord] = []
    assert keep_records_until(path, 10, read=seen.append) == 10
    assert [record.step for record in seen] == [10]
    assert len(path.read_text().splitlines()) == 2
    (kept,) = read_records(path)
    assert kept.views["sma"]["published/acc"] == 0.5


@pytest.mark.parametrize(
    "line",
    [
        '{"late": 3}',
        '{"late": {"step": 1}}',
        '{"late": {"name": "a", "step": -1, "view": "b", "numbers": {}}}',
    ],
)
def test_a_damaged_line_of_later_numbers_is_an_error_that_names_it(line, tmp_path):
    (tmp_path / "merges.jsonl").write_text(line + "\n")
    with pytest.raises(CheckpointError, match="line 1 is not a merge record"):
        read_records(tmp_path / "merges.jsonl")
