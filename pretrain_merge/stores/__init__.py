"""Where the bytes of snapshots live during training. A store knows slots; it knows no steps and no coefficients."""

from pretrain_merge.stores.choose import choose_store
from pretrain_merge.stores.store import Store, slot_dtype

__all__ = ["Store", "choose_store", "slot_dtype"]
