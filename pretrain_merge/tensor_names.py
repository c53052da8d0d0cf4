"""Names of tensors as the user's model has them, whatever wraps or compiles it.

This module knows text. It is loaded where checkpoints are merged without torch, and asked at every snapshot.
"""

# what torch.compile, FSDP and Fabric put into names
ADDED = ("_orig_mod", "_fsdp_wrapped_module", "_forward_module")


def plain_name(name: str) -> str:
    """A tensor's name as the model that is neither compiled nor wrapped has it.

    >>> plain_name("model._orig_mod.layers.0.weight")
    'model.layers.0.weight'
    """
    # asked of every name at every snapshot, and nearly none has one; spelled out, which a loop takes four times as long
    if "_orig_mod." not in name and "_forward_module." not in name and "_fsdp_wrapped_module." not in name:
        return name
    # anywhere in it: a submodule may be compiled or wrapped alone; by whole parts, since a user's may end like one
    *path, last = name.split(".")
    return ".".join([*(part for part in path if part not in ADDED), last])
