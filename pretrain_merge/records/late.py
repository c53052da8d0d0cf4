"""Numbers that came of a published model after its merge point, as a line of their own beside the record's.

Lines that are there never change, so that a run that is killed loses none. This module knows numbers and names.
"""

import json
import math
from dataclasses import dataclass, replace

from pretrain_merge.files import untrusted
from pretrain_merge.records.record import RAW, MergeRecord, Metrics, metric_name

PUBLISHED = "published"  # before the numbers' own names, so that they never hide what a merge point measured
_LARGEST = 2**63


@dataclass(frozen=True)
class Late:
    """What an evaluation beside training gave.

    Attributes:
        name: As that of the record.
        step: Of the merge point.
        view: Which model, or "raw".
        numbers: By name.
    """

    name: str
    step: int
    view: str
    numbers: Metrics

    def metrics(self) -> dict[str, float]:
        """As flat metrics, with the step that they are of: `merge/sma/published/hellaswag`."""
        named = {metric_name(self.name, self.view, key): value for key, value in self._own().items()}
        return {f"{self.name}/step": float(self.step), **named}

    def added_to(self, record: MergeRecord) -> MergeRecord:
        """The record of that merge point, with the numbers among those of the model."""
        if self.view == RAW:
            return replace(record, raw={**record.raw, **self._own()})
        return replace(record, views={**record.views, self.view: {**record.views.get(self.view, {}), **self._own()}})

    def to_json(self) -> str:
        """One line of JSON, of another form than a record's; non-finite numbers are text."""
        # strict JSON has no word for NaN; `float` reads it back from text
        numbers = {key: value if math.isfinite(value) else str(value) for key, value in self.numbers.items()}
        late = {"name": self.name, "step": self.step, "view": self.view, "numbers": numbers}
        return json.dumps({"late": late}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> "Late | None":
        """The inverse of `to_json`; None where the line is not of this form.

        Raises:
            ValueError: The line is not JSON, or a value is not what it should be.
        """
        line = line.encode() if isinstance(line, str) else line
        if not line.startswith(b'{"late":'):  # a long run has many lines, and hardly one of these
            return None
        values = untrusted.parse_json(line)["late"]
        late = cls(**values | {"numbers": {key: float(value) for key, value in values["numbers"].items()}})
        is_step = type(late.step) is int and 0 <= late.step < _LARGEST
        # JSON of anybody: a bool is an int to `isinstance`
        if not (is_step and isinstance(late.name, str) and isinstance(late.view, str)):
            raise ValueError("a value is of another type than ours, or out of range")
        return late

    def _own(self) -> dict[str, float]:
        return {f"{PUBLISHED}/{key}": float(value) for key, value in self.numbers.items()}
