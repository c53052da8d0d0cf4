"""A seeded fault: one place of the package, broken, and the tests that must notice."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """One break.

    Attributes:
        what: What goes wrong, in a few words.
        file: Module below `pretrain_merge/`.
        before: Text of the module, found exactly once.
        after: What it becomes.
        tests: Tests of which at least one must fail.
    """

    what: str
    file: str
    before: str
    after: str
    tests: str

    def check(self, root: Path) -> str:
        """The module's text, in which the fault has exactly one place; a stale fault is an error."""
        text = (root / "pretrain_merge" / self.file).read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            raise ValueError(f"{self.what}: {self.before!r} is {text.count(self.before)} times in {self.file}")
        return text

    def break_(self, root: Path) -> None:
        """Put the fault into a copy of the repository."""
        broken = self.check(root).replace(self.before, self.after)
        (root / "pretrain_merge" / self.file).write_text(broken, encoding="utf-8")
