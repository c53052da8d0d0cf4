"""What stores take: shares of what is free, buffers for pieces under way, and where a window goes by that.

This module is arithmetic on bytes. It knows no tensors, so that a plan can be made without them.
"""

# The choice is made at the first snapshot, when parameters, gradients and optimizer state are there. Later batches,
# evaluations and data workers may need more than those before.
DEVICE_SHARE = 0.25
HOST_SHARE = 0.5

DEVICE_STAGING = 48 * 2**20  # below the 64 MiB that a merge may take beyond the window
HOST_STAGING = 32 * 2**20  # between a capture and the disk


def fastest_with_room(num_bytes: int, *, free_device: int, free_host: int, has_disk: bool = True) -> str:
    """The store for a window where the user leaves the choice: "device", "host" or "disk".

    Args:
        num_bytes: Of the whole window on a rank.
        free_device: Free bytes where the parameters are.
        free_host: Free bytes of host memory for this rank.
        has_disk: Whether there is a folder for a disk store.
    """
    if num_bytes <= DEVICE_SHARE * free_device:
        return "device"
    return "host" if num_bytes <= HOST_SHARE * free_host or not has_disk else "disk"
