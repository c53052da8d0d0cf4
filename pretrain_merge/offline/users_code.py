"""Modules and classes of the user's own, imported because the user names them, and for no other reason.

This module knows names that come from a command line or a call, never from a file.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from pretrain_merge.errors import ConfigError
from pretrain_merge.offline import plain_pickle


def import_from_here() -> None:
    """As with `python -m`, modules of the current folder can be named."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())


def allow(classes: Sequence[str], *, are_made: bool = False) -> None:
    """Let classes that the user trusts through, where checkpoints hold objects of them, for the rest of the process.

    Whatever else a file names is refused as before. A script's own class is `__main__.Config` in the files that it
    wrote, and `script.Config` for everybody else: that name stands for both.

    Args:
        classes: As package.module.Class.
        are_made: Their objects are to be written again, for which they are imported and made; else they are passed
            over, and nothing is imported.

    Raises:
        ConfigError: One cannot be imported, or is not a class.
    """
    plain_pickle.pass_over(alias for name in classes for alias in (name, f"__main__.{name.rpartition('.')[2]}"))
    if not (classes and are_made):
        return
    # a merge of plain files is faster than torch is loaded
    from torch.serialization import add_safe_globals

    import_from_here()
    for name in classes:
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module or attribute), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"allow: {name!r} is not there ({error}). Name a class that can be imported from here, as "
                f"package.module.Class; one of a script train.py is train.Class, which runs what the script does "
                f"outside of `if __name__ == '__main__':`."
            ) from error
        if not isinstance(found, type):
            raise ConfigError(f"allow: {name!r} is a {type(found).__name__}. Name a class, as package.module.Class.")
        add_safe_globals([found, (found, f"__main__.{attribute}")])
