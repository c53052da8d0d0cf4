"""Faults of what is recorded and shown."""

from tests.mutations.catalogue.fault import Fault

_JSONL = "tests/records/test_jsonl.py"
_REPORT = "tests/records/test_report.py"

FAULTS = (
    Fault(
        "means of intervals that grow are read over too short a span",
        "records/export.py",
        "if not number and is_told:",
        "if False:",
        "tests/records/test_read_run.py",
    ),
    Fault(
        "the record carries the view's metric as raw",
        "records/record.py",
        "{RAW: self.raw, **self.views}",
        "{**self.views, RAW: next(iter(self.views.values()))}",
        "tests/records/test_record.py",
    ),
    Fault(
        "W&B draws against its own step",
        "records/loggers.py",
        '{"step_metric": prefix + axes[0]}',
        "{}",
        "tests/records/test_loggers.py",
    ),
    Fault(
        "records after the resumed step stay",
        "records/jsonl.py",
        "            if record.step <= step:",
        "            if True:",
        f"{_JSONL} tests/system/test_killed_runs.py",
    ),
    Fault(
        "a report prints every merge of a long run",
        "records/tables.py",
        "rows = measured if at_most is None else",
        "rows = measured if True else",
        "tests/cli/test_main.py",
    ),
    Fault(
        "a name of a record ends the page's data and begins a script",
        "records/report.py",
        r'.replace("<", "\\u003c")',
        "",
        _REPORT,
    ),
    Fault(
        "a name of a record is markup in the page's tables",
        "records/report_sections.py",
        "    return html.escape(shown if len(shown) <= longest else",
        "    return (shown if len(shown) <= longest else",
        _REPORT,
    ),
    Fault(
        "two views of many are drawn alike",
        "records/plots.py",
        '"linestyle": _DASHES[turn % len(_DASHES)]',
        '"linestyle": "-"',
        "tests/records/test_plots.py",
    ),
    Fault(
        "the records of a callback with a name of its own are those of another",
        "records/read_run.py",
        'f"{glob.escape(name)}/merges.jsonl", ',
        "",
        "tests/records/test_read_run.py",
    ),
    Fault(
        "a file's name is a scheme in the page's links",
        "records/disk_use.py",
        'link = "./" + quote(',
        "link = (",
        _REPORT,
    ),
    Fault(
        "a gap is closed to a forecast that may be no better than raw",
        "records/record.py",
        "if not (value.high < raw and value.mean < raw and",
        "if not (value.mean < raw and",
        "tests/records/test_record.py",
    ),
    Fault(
        "a picture is drawn at every merge",
        "records/showcase.py",
        "if self._clock() >= self._due:",
        "if True:",
        "tests/records/test_showcase.py",
    ),
    Fault(
        "the configuration of a run takes a key of the user's",
        "records/loggers.py",
        'config.update({f"{name}/config":',
        "config.update({name:",
        "tests/records/test_loggers.py",
    ),
    Fault(
        "the smallest accuracy is the best",
        "records/tables.py",
        'sign = 1.0 if mode == "min" else -1.0\n    return min(',
        "sign = 1.0\n    return min(",
        "tests/cli/test_main.py",
    ),
    Fault(
        "block means are taken to span as little as snapshots",
        "records/record.py",
        'if average == "block" and len',
        "if False and len",
        "tests/forecast",
    ),
    Fault(
        "a resumed run holds all records in memory",
        "records/jsonl.py",
        "for number, line in enumerate(untrusted.lines(source), start=1):",
        "for number, line in list(enumerate(untrusted.lines(source), start=1)):",
        _JSONL,
    ),
    Fault(
        "a resumed run forecasts without the records before",
        "records/jsonl.py",
        "                read(record)\n",
        "",
        "tests/callbacks/test_forecasts.py",
    ),
    Fault(
        "an export may claim any window",
        "records/export.py",
        "if number > _LARGEST_WINDOW:",
        "if False:",
        "tests/attacks/test_crafted_files.py",
    ),
)
