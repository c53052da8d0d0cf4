"""What wrappers put into names is taken out, and no part of a user's own name is."""

import pytest

from pretrain_merge.parameters import shards
from pretrain_merge.tensor_names import ADDED, plain_name


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_orig_mod.a._orig_mod.weight", "a.weight"),
        ("_forward_module._orig_mod.a.weight", "a.weight"),  # of Fabric
        ("a._fsdp_wrapped_module.weight", "a.weight"),
        ("my_orig_mod.w", "my_orig_mod.w"),
        ("a._orig_mod", "a._orig_mod"),  # a parameter's own name
        ("w", "w"),
    ],
)
def test_a_name_is_that_of_the_model_inside(name, plain):
    assert plain_name(name) == plain


def test_every_wrapper_that_is_looked_into_is_taken_out_of_names():
    assert set(shards._WRAPPERS) <= set(ADDED)
    for part in ADDED:
        assert plain_name(f"a.{part}.w") == "a.w"
