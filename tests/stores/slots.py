"""Slots of the disk store, written, read and compared."""

import torch


def weights(value, *, count=1000, num_tensors=3):
    return {f"layer.{index}": torch.full((count,), float(value) + index) for index in range(num_tensors)}


def write(store, slot, tensors, dtype=None):
    store.write(slot, tensors, [dtype or tensor.dtype for tensor in tensors.values()])


def finish(store, slot, like):
    """Wait until a slot is on the disk: the next capture does."""
    write(store, slot, like)


def read(store, slot, like):
    out = [torch.full_like(tensor, float("nan")) for tensor in like.values()]
    store.read_(out, slot)
    return out


def holds(store, slot, tensors):
    return all(torch.equal(a, b) for a, b in zip(read(store, slot, tensors), tensors.values(), strict=True))


def path_of(folder, slot):
    return folder / f"slot-{slot:03d}.safetensors"
