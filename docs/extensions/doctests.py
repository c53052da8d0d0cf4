"""Shows doctests in docstrings as code. Griffe knows them only under a heading "Examples", which ours do without."""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"(?:^>>> .*\n?)(?:^(?!\s*$).*\n?)*", re.M)


class FencedDoctests(griffe.Extension):
    """Puts fences around doctests, and a colon for reStructuredText's two."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite an object's docstring before it is parsed."""
        if obj.docstring:
            text = _DOCTEST.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.M)
