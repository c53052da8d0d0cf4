"""Slots on local storage: safetensors files, written by a background thread, merged from the page cache by memory map.

This module knows files, threads and buffers. Files are written here and not by safetensors' own `save_file`, which
wants the whole model in host memory at once; the format is theirs (`slot_file`), and any of its readers opens a slot.
"""

import os
import weakref
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import torch
from torch import Tensor

from pretrain_merge import parameters
from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic, folder_lock, snapshot_file
from pretrain_merge.files.atomic import Batch
from pretrain_merge.files.layout import Layout
from pretrain_merge.files.snapshot_file import SnapshotFile, stage
from pretrain_merge.kernels.weighted_sum import Spread
from pretrain_merge.stores.budget import HOST_STAGING
from pretrain_merge.stores.streaming import merge_from_host_

_NUM_BUFFERS = 2  # one is filled while the other is written

# What a capture hands to the writer: a filled buffer and its bytes; None at the end; an error where it broke off.
_Filled = tuple[Tensor, int] | BaseException | None


@dataclass
class _Slot:
    """One file: its tensors once they can be read; its checksum and identity once it is on the disk."""

    path: Path
    layout: Layout
    tensors: list[Tensor] = field(default_factory=list)
    readable: Event = field(default_factory=Event)
    failure: Exception | None = None
    checksum: int = 0
    identity: tuple[int, int] | None = None


class DiskStore:
    """One safetensors file per slot.

    A capture copies into a bounded staging buffer, from which a thread writes. It returns when the last byte is in the
    buffer, so the live parameters may change; a model larger than the buffer waits until the page cache has taken its
    first part. A slot can be merged as soon as its bytes are in the page cache; only the next capture waits for the
    disk.

    Args:
        folder: Where slot files go; created where needed, and locked against other processes, which would overwrite
            the slots. Local storage, since it is read at memory speed.
        staging_bytes: Host memory between capture and disk, at least 16 bytes.

    Raises:
        CheckpointError: The folder cannot be made or written, or another process keeps its window there.
    """

    def __init__(self, folder: Path, *, staging_bytes: int = HOST_STAGING) -> None:
        self._folder = folder.absolute()
        self._slots: dict[int, _Slot] = {}  # by number; a slot that is written again is a new entry
        # a buffer that cannot hold one element would never be full enough to be written
        self._staging_bytes = max(staging_bytes // _NUM_BUFFERS, torch.float64.itemsize)
        self._staging: list[Tensor] = []  # allocated at the first capture, when it is known whether they are pinned
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pretrain-merge-writer")
        self._writing: Future[None] | None = None  # the one write under way: the next capture waits for it
        self._lock: weakref.finalize[..., DiskStore] | None = None
        self._claim_folder()

    def write(self, slot: int, tensors: Mapping[str, Tensor], dtypes: Sequence[torch.dtype]) -> None:
        """Copy tensors into a slot, through the staging buffer.

        Raises:
            CheckpointError: This write or the one before it failed; the message names the file.
        """
        # two writes at a time would need twice the buffers and share one disk
        self._finish()
        self._claim_folder()
        layout = Layout.of(tensors, dtypes)
        entry = _Slot(self._folder / f"slot-{slot:03d}.safetensors", layout)
        free: SimpleQueue[Tensor | None] = SimpleQueue()  # a new one: whatever happened before, no buffer is missing
        for staging in self._staging_buffers(pinned=any(tensor.is_cuda for tensor in tensors.values())):
            free.put(staging)
        filled: SimpleQueue[_Filled] = SimpleQueue()
        self._writing = self._writer.submit(_write_file, entry, filled, free)
        self._slots[slot] = entry
        try:
            for chunk in layout.chunks({name: [tensor] for name, tensor in tensors.items()}, self._staging_bytes):
                buffer = free.get()
                if buffer is None:
                    break  # the writer gave up
                filled.put((buffer, stage(buffer, chunk)))
        except BaseException as error:
            filled.put(error)  # what is written so far must not pass for a slot
            wait([self._writing])
            self._writing = None
            raise
        else:
            filled.put(None)
            if buffer is None:
                self._finish()  # raises what the writer met

    def wait_for_copy(self) -> None:
        """Nothing to wait for: a capture returns when it has read the last byte."""

    def merge_(
        self,
        out: Sequence[Tensor],
        slots: Sequence[int],
        coefficients: Sequence[float],
        *,
        spread: bool | Sequence[float] = False,
    ) -> Spread | None:
        """`weighted_sum_` of slots, oldest first, into `out`, from the page cache.

        Raises:
            CheckpointError: One of the slots could not be written.
        """
        return merge_from_host_(out, [self._mapped(slot) for slot in slots], coefficients, spread=spread)

    def read_(self, out: Sequence[Tensor], slot: int) -> None:
        """Copy a slot into `out`.

        Raises:
            CheckpointError: The slot could not be written.
        """
        parameters.copy_(out, self._mapped(slot))

    def holds(self, slot: int, tensors: Sequence[Tensor]) -> bool:
        """Whether a slot is bit for bit what these tensors of its dtypes are.

        Raises:
            CheckpointError: The slot could not be written.
        """
        return parameters.all_same_bits(tensors, self._mapped(slot))

    def save(self, slot: int, folder: Path, stem: str, *, batch: Batch | None = None) -> SnapshotFile:
        """Give the slot's file a second name; a copy where the file system has no links.

        Raises:
            CheckpointError: The slot could not be written, or the disk refuses.
        """
        # its checksum is known only when the last byte is on the disk
        self._finish()
        tensors, entry = self._mapped(slot), self._slots[slot]
        linked = snapshot_file.link(folder, stem, entry.path, entry.checksum, identity=entry.identity, batch=batch)
        parts = {name: [tensor] for name, tensor in zip(entry.layout.places, tensors, strict=True)}
        return linked or snapshot_file.write(folder, stem, entry.layout, parts, batch=batch)

    def clear(self) -> None:
        """Delete the files of all slots, written or not, and let others use the folder."""
        if self._writing is not None:
            wait([self._writing])  # its failure does not matter any more
            self._writing = None
        for slot in self._slots.values():
            if (
                snapshot_file.identity_of(slot.path) == slot.identity
            ):  # another store of this process may have replaced it
                slot.path.unlink(missing_ok=True)
        self._slots.clear()
        self._staging.clear()
        if self._lock is not None:
            self._lock()
            self._lock = None

    def _claim_folder(self) -> None:
        if self._lock is not None:
            return
        is_first = folder_lock.claim(
            self._folder,
            remedy="Set store_folder to a folder on local storage that can be written, of this run alone.",
            is_shared_here=True,
        )
        self._lock = weakref.finalize(self, folder_lock.release, self._folder)  # also for a store that nobody clears
        if is_first:  # what is there is of a run that was killed
            atomic.remove_leftovers(self._folder, "slot-*")
            for leftover in self._folder.glob("slot-*"):
                leftover.unlink(missing_ok=True)

    def _mapped(self, slot: int) -> list[Tensor]:
        entry = self._slots[slot]
        entry.readable.wait()
        if entry.failure is not None:
            # met by the thread, told to whoever asks for the slot first
            raise self._write_error(entry.failure) from entry.failure
        return entry.tensors

    def _finish(self) -> None:
        """Wait until the file before is on the disk."""
        if self._writing is not None:
            wait([self._writing])
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except OSError as error:
                raise self._write_error(error) from error

    def _write_error(self, error: Exception) -> CheckpointError:
        remedy = (
            "Free space there, or set store_folder to another local disk." if error.args[1:] else "Take another one."
        )
        return CheckpointError(f"cannot write a snapshot to {self._folder}: {error}. {remedy}")

    def _staging_buffers(self, *, pinned: bool) -> list[Tensor]:
        if not self._staging:
            size = self._staging_bytes
            self._staging = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(_NUM_BUFFERS)]
        return self._staging


def _write_file(slot: _Slot, filled: SimpleQueue[_Filled], free: SimpleQueue[Tensor | None]) -> None:
    """The writer's side of a capture: takes filled buffers, gives them back, and None where it gave up."""
    try:
        with atomic.draft(slot.path, outlives_run=False) as draft:
            draft.file.write(slot.layout.header)
            while (item := filled.get()) is not None:
                if isinstance(item, BaseException):
                    raise OSError(f"the capture broke off ({type(item).__name__})")
                draft.file.write(item[0].numpy().data[: item[1]])
                free.put(item[0])
            draft.file.flush()
            pages = _mapped(draft.path, os.fstat(draft.file.fileno()).st_size)
            slot.tensors = slot.layout.tensors_over(pages)
            slot.readable.set()  # a merge need not wait for the disk, only for the page cache
            slot.checksum, slot.identity = zlib.crc32(pages.numpy().data), snapshot_file.identity_of(draft.path)
    except Exception as error:
        slot.failure = error
        free.put(None)
        raise
    finally:
        slot.readable.set()


def _mapped(path: Path, num_bytes: int) -> Tensor:
    """The bytes of a file as private pages, which keep it alive and no descriptor of it open, as `mmap.mmap` would."""
    try:
        return torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)
    except RuntimeError as error:  # more mappings than the system allows, say
        raise OSError(f"{path} cannot be mapped: {error}") from error
