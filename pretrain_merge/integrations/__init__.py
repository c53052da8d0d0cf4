"""Merging in the training loops of other libraries: each module here is the only one that imports its library.

This module knows names and extras. It imports a library when its integration is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pretrain_merge.errors import MissingDependencyError

if TYPE_CHECKING:
    from pretrain_merge.integrations.hugging_face import HuggingFaceMerging as HuggingFaceMerging

_MODULE_OF = {"HuggingFaceMerging": "pretrain_merge.integrations.hugging_face"}
_NEEDED = {"HuggingFaceMerging": ("transformers", "accelerate")}
_EXTRA = "huggingface"

__all__ = ["HuggingFaceMerging"]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    for library in _NEEDED[name]:
        try:
            import_module(library)
        except ImportError as error:
            raise MissingDependencyError(
                f"{name} needs {library}, which is not installed ({error}). Allowed: transformers from 4.50 on with "
                f"accelerate. Install them: pip install 'pretrain-merge[{_EXTRA}]'."
            ) from error
    return getattr(import_module(_MODULE_OF[name]), name)
