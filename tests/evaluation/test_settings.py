"""Settings of the process that a hook switches are back after each pass, whichever way they are read."""

import contextvars
import warnings

import numpy as np
import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from pretrain_merge.evaluation.settings import settings_kept

LEVEL = contextvars.ContextVar("level", default=0)
LEVEL.set(1)
SWITCHED = {
    "products": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    "deterministic": (
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        torch.get_deterministic_debug_mode,
    ),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "device": (lambda: torch.set_default_device("meta"), torch.get_default_device),
    "gradients": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), lambda: torch.is_autocast_enabled("cpu")),
    "attention": (lambda: torch.backends.cuda.enable_flash_sdp(False), torch.backends.cuda.flash_sdp_enabled),
    "cuDNN": (
        lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
        lambda: torch.backends.cudnn.allow_tf32,
    ),
    "NumPy": (lambda: np.seterr(divide="raise"), np.geterr),
    "a variable of the context": (lambda: LEVEL.set(2), LEVEL.get),
    "warnings": (lambda: warnings.simplefilter("always"), lambda: list(warnings.filters)),
}


@pytest.mark.parametrize("what", SWITCHED)
def test_what_a_hook_switches_is_switched_back(what):
    switch, read = SWITCHED[what]
    before = read()
    with settings_kept():
        switch()
        assert read() != before
    assert read() == before


@pytest.mark.parametrize("before", [None, "cpu", "meta"])
def test_operations_go_through_the_same_modes_as_before_a_hook_chose_a_device(before):
    torch.set_default_device(before)
    try:
        num_modes = len(_get_current_function_mode_stack())
        with settings_kept():
            torch.set_default_device("meta" if before == "cpu" else "cpu")
        assert len(_get_current_function_mode_stack()) == num_modes == (before is not None)
        assert torch.get_default_device() == torch.device(before or "cpu")
    finally:
        torch.set_default_device(None)


def test_a_precision_that_was_set_by_its_newer_name_keeps_no_merge_from_being_measured():
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"  # torch refuses to be asked by the older name from now on
        with settings_kept():
            products.fp32_precision = "ieee"
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before
