"""The words of a command line as jsonargparse takes them. This module knows which commands take a list, and flags."""

import json
from collections.abc import Sequence

# of the commands whose first argument is a list
_FLAGS = {"merge": ("--plan", "--quiet"), "sweep": ("--plan", "--quiet"), "report": ("--all",)}
_TRUTHS = ("true", "false")
_HELP = ("-h", "--help")


def as_one_list(arguments: Sequence[str]) -> list[str]:
    """The words of a command that belong to no option, as the one list that jsonargparse takes; flags get their value.

    Options are named as in Python; with hyphens, as shells have them, they are the same.

    >>> as_one_list(["merge", "a.ckpt", "b.ckpt", "--plan", "--out", "merged"])
    ['merge', '["a.ckpt", "b.ckpt"]', '--plan', 'true', '--out', 'merged']
    >>> as_one_list(["merge", "--out", "merged", "--plan", "a.ckpt"])
    ['merge', '["a.ckpt"]', '--out', 'merged', '--plan', 'true']
    >>> as_one_list(["plan", "--merge-every=1-2"])
    ['plan', '--merge_every=1-2']
    >>> as_one_list(["report", "runs/a"])
    ['report', '["runs/a"]']
    >>> as_one_list(["report", "runs/a", "runs/b", "--all"])
    ['report', '["runs/a", "runs/b"]', '--all', 'true']
    """
    arguments = [_option(word) if word.startswith("--") else word for word in arguments]
    if not arguments or arguments[0] not in _FLAGS:
        return arguments
    # jsonargparse takes one value per argument, and a list as JSON; a shell's user gives words
    named: list[str] = []
    options: list[str] = []
    words = iter(arguments[1:])
    word = next(words, None)
    while word is not None:
        following = next(words, None)
        if not word.startswith("-"):
            named.append(word)
        elif word in _FLAGS[arguments[0]] and following not in _TRUTHS:
            options += [word, "true"]
        elif word in _HELP or "=" in word or following is None:
            options.append(word)
        else:  # every other option has one value
            options += [word, following]
            following = next(words, None)
        word = following
    return [arguments[0], *([json.dumps(named)] if named else []), *options]


def _option(word: str) -> str:
    name, equals, value = word.removeprefix("--").partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
