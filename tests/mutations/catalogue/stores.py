"""Faults of stores."""

from tests.mutations.catalogue.fault import Fault

FAULTS = (
    Fault(
        "the slot that is being written needs no room",
        "stores/choose.py",
        "if num_bytes + slot_bytes > room:",
        "if num_bytes > room:",
        "tests/stores/test_choose.py",
    ),
    Fault(
        "each slot of a disk store keeps its file open",
        "stores/disk.py",
        "return torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)",
        "return torch.frombuffer(__import__('mmap').mmap(os.open(path, os.O_RDONLY), 0, access=3), dtype=torch.uint8)",
        "tests/stores/test_disk_store.py",
    ),
)
