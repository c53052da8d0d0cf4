"""The run so far as one picture and one table, for loggers that show such things: what W&B has without any hand work.

Both are of a thinned history, and are logged seldom: they cost the same at any length of the run, and together at most
a hundredth of its time. This module knows W&B's media by Lightning's logger; what is drawn is `plots`' business.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pretrain_merge.errors import MissingDependencyError
from pretrain_merge.records import plots
from pretrain_merge.records.record import MergeRecord
from pretrain_merge.records.thinning import History

if TYPE_CHECKING:
    from PIL.Image import Image

Say = Callable[[str, str], object]  # what it is about, and the message
_FIRST = 1.0  # seconds that the first one is taken to need; matplotlib's import and its fonts are among them
_SHARE = 0.01  # of the run's time
_GROWTH = 0.1  # of the run since the last one: a week has a hundred, not ten thousand


class Showcase:
    """Shows one run, now and then.

    Args:
        name: Of the callback; prefix of both keys.
        history: Of the run; a resumed run begins with the records before.
        say: Told once what is not shown, and why.
        clock: Seconds.
    """

    def __init__(self, name: str, history: History, say: Say, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._history, self._say, self._clock = name, history, say, clock
        self._begun = clock()
        self._due = self._begun + _FIRST / _SHARE
        self._shown: MergeRecord | None = None

    def add(self, record: MergeRecord, loggers: Sequence[Any]) -> None:
        """The next record; shows the run where it is time."""
        self._history.append(record)
        if self._clock() >= self._due:
            self.show(loggers)

    def show(self, loggers: Sequence[Any]) -> None:
        """Show the run as it is, unless that was done already."""
        records = self._history.records
        if not loggers or not records or records[-1] is self._shown:
            return
        self._shown, started = records[-1], self._clock()
        try:
            self._log(records, loggers)
        except MissingDependencyError as error:
            self._say("no picture", f"W&B is given no picture of the curves: {error}")
        except Exception as error:  # the metrics are logged: a run does not end for a picture of them
            self._say("no picture", f"W&B was given no picture of the curves, or no table: {error!r}")
        now = self._clock()
        self._due = now + max((now - started) / _SHARE, _GROWTH * (now - self._begun))

    def _log(self, records: Sequence[MergeRecord], loggers: Sequence[Any]) -> None:
        step, (columns, rows) = records[-1].step, table(records)
        # the table bears the callback's name: two dozen columns that begin alike would hide what they are
        columns = [column.removeprefix(f"{self._name}/") for column in columns]
        for logger in loggers:
            logger.log_table(f"{self._name}/merges", columns=columns, data=rows, step=step)
        metric = _first_metric(records[-1])
        if metric is not None:
            picture = _picture(records, metric)
            for logger in loggers:
                logger.log_image(f"{self._name}/curves", [picture], step=step)


def table(records: Sequence[MergeRecord]) -> tuple[list[str], list[list[float | None]]]:
    """Columns and rows: one row for each record, with everything that loggers are given of it."""
    lines = [record.metrics() for record in records]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    return columns, [[line.get(column) for column in columns] for line in lines]


def _first_metric(record: MergeRecord) -> str | None:
    """What the picture is of: the metric of a forecast, else a loss, else what there is."""
    forecast = [metric for expected in record.forecasts.values() for metric in expected]
    known = [metric for metric in record.raw if math.isfinite(record.raw[metric])]
    return next(iter([*forecast, *(metric for metric in known if "loss" in metric), *known]), None)


def _picture(records: Sequence[MergeRecord], metric: str) -> "Image":
    from PIL import Image

    return Image.open(plots.rendered(plots.curves(records, metric=metric)))
