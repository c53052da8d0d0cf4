"""The words of a command line as jsonargparse takes them. This module knows which commands take a list, and flags."""

import itertools
import json
from collections.abc import Sequence

# of the commands whose first argument is a list
_FLAGS = {"merge": ("--plan", "--quiet"), "sweep": ("--plan", "--quiet"), "report": ("--all",)}


def as_one_list(arguments: Sequence[str]) -> list[str]:
    """The words after a command up to the first option, as the one list that jsonargparse takes; flags get their value.

    >>> as_one_list(["merge", "a.ckpt", "b.ckpt", "--plan", "--out", "merged"])
    ['merge', '["a.ckpt", "b.ckpt"]', '--plan', 'true', '--out', 'merged']
    >>> as_one_list(["report", "runs/a"])
    ['report', '["runs/a"]']
    >>> as_one_list(["report", "runs/a", "runs/b", "--all"])
    ['report', '["runs/a", "runs/b"]', '--all', 'true']
    """
    if not arguments or arguments[0] not in _FLAGS:
        return list(arguments)
    # jsonargparse takes one value per argument, and a list as JSON; a shell's user gives words
    end = next((index for index, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    named, given = arguments[1:end], arguments[end:]
    options: list[str] = []
    for word, following in itertools.pairwise([*given, "--"]):  # a last word, so that a flag at the end is alone too
        is_alone = word in _FLAGS[arguments[0]] and following.startswith("-")
        options += [word, "true"] if is_alone else [word]
    return [arguments[0], *([json.dumps(named)] if named else []), *options]
