"""Lines that a resumed run reads again: a long run has 100,000, and of most of them nobody asks for the recipes.

This module knows where in a line the recipes are, which are two thirds of it. What they say is the record's business.
"""

from collections.abc import Iterator, Mapping

from pretrain_merge.records.record import MergeRecord, Recipe

# As `to_json` writes them. Inside of a text a quotation mark has a backslash before it, so these are keys.
_BEGIN = b', "recipes": {'
_NEXT = b', "skipped": {'


class _Unread(Mapping[str, Recipe]):
    """Recipes that are parsed when somebody asks for one."""

    def __init__(self, line: bytes) -> None:
        self._line: bytes | None = line
        self._recipes: Mapping[str, Recipe] = {}

    def _read(self) -> Mapping[str, Recipe]:
        if self._line is not None:
            try:
                self._recipes = MergeRecord.from_json(self._line).recipes
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"not a merge record: {self._line[:80]!r}") from error
            self._line = None
        return self._recipes

    def __getitem__(self, view: str) -> Recipe:
        return self._read()[view]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def read_resumed(line: bytes) -> MergeRecord:
    """A record like that of `MergeRecord.from_json`, whose recipes are parsed and checked when they are asked for.

    Raises:
        ValueError: The line is not JSON, or not one of our records; of its recipes, when they are asked for.
    """
    begin, next_ = line.find(_BEGIN), line.find(_NEXT)
    # a view or metric of such a name, or a line that another wrote: nothing is known of where things are
    if not 0 <= begin < next_ or begin != line.rfind(_BEGIN) or next_ != line.rfind(_NEXT):
        return MergeRecord.from_json(line)
    return MergeRecord.from_json(line[:begin] + line[next_:], recipes=_Unread(line))
