"""Pages of the documentation whose tables are written from records. This module knows Markdown and the marks in it."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

_BLOCK = re.compile(r"(<!-- records: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_ResultsT = TypeVar("_ResultsT")


def written(text: str, tables: Mapping[str, Callable[[_ResultsT], str]], results: _ResultsT) -> str:
    """The page with every table between its marks as the records have it."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{tables[found['name']](results)}\n\n{found[3]}", text)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
