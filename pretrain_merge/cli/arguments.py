"""The words of a command line as jsonargparse takes them. This module knows which options are lists, and flags."""

import json
from collections.abc import Sequence
from typing import Any

# of the commands whose first argument is a list
_FLAGS = {"merge": ("--plan", "--quiet"), "sweep": ("--plan", "--quiet"), "report": ("--all",)}
_LISTS = {
    "merge": ("--newest", "--average", "--steps", "--allow"),
    "sweep": ("--newest", "--average", "--steps", "--allow", "--views", "--intervals"),
    "export": ("--allow",),
    "forecast": ("--steps",),
    "plan": ("--views",),
    "wandb-view": ("--runs",),
}
_TRUTHS = ("true", "false")
_HELP = ("-h", "--help")


def as_one_list(arguments: Sequence[str]) -> list[str]:
    """The words of a command that belong to no option, as the one list that jsonargparse takes; flags get their value.

    Options are named as in Python; with hyphens, as shells have them, they are the same. One that is a list may be
    given as a word, several times, or as a list in YAML.

    >>> as_one_list(["merge", "a.ckpt", "b.ckpt", "--plan", "--out", "merged"])
    ['merge', '["a.ckpt", "b.ckpt"]', '--plan', 'true', '--out', 'merged']
    >>> as_one_list(["merge", "--out", "merged", "--plan", "a.ckpt"])
    ['merge', '["a.ckpt"]', '--out', 'merged', '--plan', 'true']
    >>> as_one_list(["plan", "--merge-every=1-2"])
    ['plan', '--merge_every=1-2']
    >>> as_one_list(["report", "runs/a", "runs/b", "--all"])
    ['report', '["runs/a", "runs/b"]', '--all', 'true']
    >>> as_one_list(["merge", "a.ckpt", "--newest", "*x*", "--newest=[*y*, z]", "--steps", "[10]"])
    ['merge', '["a.ckpt"]', '--newest', '["*x*", "*y*", "z"]', '--steps', '[10]']
    """
    arguments = [_option(word) if word.startswith("--") else word for word in arguments]
    command = arguments[0] if arguments else ""
    if command not in _FLAGS and command not in _LISTS:
        return arguments
    # jsonargparse takes one value per argument, and a list as JSON; a shell's user gives words
    named: list[str] = []
    options: list[str] = []
    lists: dict[str, list[Any]] = {}
    words = iter(arguments[1:])
    word = next(words, None)
    while word is not None:
        following = next(words, None)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            named.append(word)
        elif word in _FLAGS.get(command, ()) and following not in _TRUTHS:
            options += [word, "true"]
        elif name in _LISTS.get(command, ()) and (equals or following is not None):
            # the last of several would else be the only one, and nobody told
            lists.setdefault(name, []).extend(_items(value if equals else str(following)))
            following = following if equals else next(words, None)
        elif word in _HELP or equals or following is None:
            options.append(word)
        else:  # every other option has one value
            options += [word, following]
            following = next(words, None)
        word = following
    given = [json.dumps(named)] if named and command in _FLAGS else named
    return [command, *given, *options, *(word for name, items in lists.items() for word in (name, json.dumps(items)))]


def _items(value: str) -> list[Any]:
    """What a list is given, or more of it."""
    import yaml

    # `[ab]*` is a pattern, too
    if (value[:1], value[-1:]) not in (("[", "]"), ("{", "}")):
        return [int(value) if value.isdecimal() else value]
    try:
        found = yaml.safe_load(value)
    except (ValueError, RecursionError, yaml.YAMLError):
        # YAML takes a pattern's asterisk for something else
        return [item.strip().strip("'\"") for item in value[1:-1].split(",")]
    return found if isinstance(found, list) else [found]


def _option(word: str) -> str:
    name, equals, value = word.removeprefix("--").partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
