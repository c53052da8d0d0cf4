"""Settings of the whole process that hooks switch as they do a module's mode: torch's, NumPy's, Python's warnings.

This module knows how each is read and set. It knows no evaluation. The environment, the working directory, signal
handlers and log levels are left alone: what a hook starts may have set them for good.
"""

import contextvars
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.backends import cuda, cudnn, mkldnn

_UNREADABLE: Any = object()


def _chosen_device() -> torch.device | None:
    """The default device, or None where nobody chose one.

    Not `torch.get_default_device`, which says "cpu" then. To set that would leave a mode behind through which every
    operation of training goes from then on: twice the Python of each, and methods that are replaced are called twice.
    """
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    chosen: torch.device | None = None if context is None else context.device
    return chosen


def _set_filters(filters: list[Any]) -> None:
    warnings.resetwarnings()  # so that modules ask again
    warnings.filters[:] = filters  # type: ignore[index]


def _flags(owner: Any, *names: str) -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    return [(partial(getattr, owner, name), partial(setattr, owner, name)) for name in names if hasattr(owner, name)]


def _set_context(before: Iterator[tuple[contextvars.ContextVar[Any], Any]]) -> None:
    # one that was set for the first time cannot be unset without the token of whoever set it
    for variable, value in before:
        if variable.get() is not value:
            variable.set(value)


def _parts(*owners: Any) -> list[Any]:
    return [getattr(owner, name) for owner in owners for name in ("conv", "rnn", "matmul") if hasattr(owner, name)]


# In this order: a setting of a whole, such as the precision of products, before those of its parts.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (_chosen_device, torch.set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (partial(torch.is_autocast_enabled, "cpu"), partial(torch.set_autocast_enabled, "cpu")),
    (partial(torch.is_autocast_enabled, "cuda"), partial(torch.set_autocast_enabled, "cuda")),
    (partial(torch.get_autocast_dtype, "cpu"), partial(torch.set_autocast_dtype, "cpu")),
    (partial(torch.get_autocast_dtype, "cuda"), partial(torch.set_autocast_dtype, "cuda")),
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    *_flags(cudnn, "enabled", "benchmark", "deterministic", "allow_tf32"),
    *_flags(mkldnn, "enabled"),
    *_flags(cuda.matmul, "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"),
    *(
        setting
        for owner in (torch.backends, cudnn, mkldnn, cuda.matmul, *_parts(cudnn, mkldnn))
        for setting in _flags(owner, "fp32_precision")
    ),
    *_flags(torch.utils.deterministic, "fill_uninitialized_memory"),
    (np.geterr, lambda state: np.seterr(**state)),
    (lambda: list(warnings.filters), _set_filters),
    # an iterator equals no other, so that no value is asked whether it equals another
    (lambda: iter(contextvars.copy_context().items()), _set_context),
)


@contextmanager
def settings_kept() -> Iterator[None]:
    """They are afterwards what they were; only what changed is set."""
    before = [_read(get) for get, _ in _SETTINGS]
    try:
        yield
    finally:
        for (get, set_), value in zip(_SETTINGS, before, strict=True):
            if value is not _UNREADABLE and _read(get) != value:
                set_(value)


def _read(get: Callable[[], Any]) -> Any:
    # torch refuses to read a precision by its older name once it was set by its newer one
    try:
        return get()
    except RuntimeError:
        return _UNREADABLE
