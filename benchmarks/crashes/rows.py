"""Counts of one kind of break as a row of the table, and what each difference was."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.crashes import compare
from benchmarks.crashes.run import Reference, Run

COLUMNS = {
    "what": "what", "times": "times", "runs": "runs", "differences": "differences", "unexplained files": "unexplained",
}  # fmt: skip


@dataclass
class Row:
    """What happened to the runs of one kind.

    Attributes:
        what: The kind.
        setting: Of which runs; empty for runs of all settings.
        times: How often one was broken, or a file damaged.
        runs: Runs that were judged.
        differences: Runs that differ from the uninterrupted one, or ended with an error that they should not have.
        unexplained: Files that nothing needs, and needed ones that are missing.
        figures: Further counts, by name.
        details: What each difference was.
    """

    what: str
    setting: str = ""
    times: int = 0
    runs: int = 0
    differences: int = 0
    unexplained: int = 0
    figures: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)

    def judge(self, run: Run, reference: Reference, note: str = "") -> None:
        """Compare a run that ended with the uninterrupted one."""
        self.runs += 1
        if not (run.folder / "final.pt").exists():
            self.wrong(f"{note} did not end")
            return
        wrong = compare.differences(reference.outcome, compare.outcome(run.folder))
        files = compare.unexplained(run.folder, reference.folder)
        self.unexplained += len(files)
        if files:
            self.details.append(f"{self.what}: {note} unexplained {files}")
        if wrong:
            self.wrong(f"{note} differs in {wrong}")

    def wrong(self, detail: str) -> None:
        """One difference more."""
        self.differences += 1
        self.details.append(f"{self.what}: {detail}")

    def plain(self) -> dict[str, Any]:
        """As the table and JSON take it."""
        return {
            "what": self.what, "setting": self.setting, "times": self.times, "runs": self.runs,
            "differences": self.differences, "unexplained": self.unexplained, "figures": dict(self.figures),
        }  # fmt: skip


def totals(rows: Iterable[Row]) -> list[Row]:
    """One row for each kind."""
    by_kind: dict[str, Row] = {}
    for row in rows:
        total = by_kind.setdefault(row.what, Row(row.what))
        total.times += row.times
        total.runs += row.runs
        total.differences += row.differences
        total.unexplained += row.unexplained
        total.figures += row.figures
    return list(by_kind.values())
