"""Whole tensors of a checkpoint as memory: mapped from their file where they lie there in one piece, else read.

This module knows pages and blocks. A mapped tensor takes no memory of its own: its pages are those that the system
keeps of the file, which it reads when they are touched and drops when it needs the room.
"""

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain_merge.offline.files import Files, is_remote
from pretrain_merge.offline.pieces import Piece, Reader
from pretrain_merge.offline.tensors import Block, Kind, Source
from pretrain_merge.offline.torch_memory import part_of, torch_dtype


class MappedTensors:
    """Tensors of one checkpoint by name, of optimizer states too; not to be written to.

    Args:
        source: The checkpoint.
        files: Open ones.
    """

    def __init__(self, source: Source, files: Files) -> None:
        self._source, self._reader = source, Reader(source, files)
        self._pages: dict[str, mmap.mmap] = {}
        self._blocks: dict[str, Sequence[Block]] = {}  # some formats look into a file to say where a tensor is
        self._fetched: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """A tensor; read anew at each call where it cannot be mapped, unless that takes a network.

        Raises:
            CheckpointError: A file cannot be read.
        """
        if name in self._fetched:
            return self._fetched[name]
        own = self._source.ties.get(name, name)
        kind = self._source.kind(own)
        if own not in self._blocks:
            self._blocks[own] = self._source.locate(own)
        blocks = self._blocks[own]
        if len(blocks) == 1 and _can_be_mapped(blocks[0], kind):
            return self._mapped(blocks[0].file, blocks[0].start, kind)
        found = torch.empty(kind.shape, dtype=torch_dtype(kind.dtype))
        if kind.num_bytes:
            shape = kind.shape or (1,)
            self._reader.read_into([Piece(own, (), (0, shape[0]), shape)], [part_of(found.view(shape))])
        if any(is_remote(block.file) for block in blocks):
            self._fetched[name] = found
        return found

    def release(self) -> None:
        """Let go of pages that were touched so far; whoever reads them again finds the file's bytes as before."""
        for pages in self._pages.values():
            # private pages that nobody wrote to are those of the file
            pages.madvise(mmap.MADV_DONTNEED)

    def _mapped(self, file: str, start: int, kind: Kind) -> Tensor:
        if file not in self._pages:
            with open(file, "rb") as opened:
                # private: torch wants memory it could write
                self._pages[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(self._pages[file], dtype=torch_dtype(kind.dtype), count=kind.num_elements, offset=start)
        return flat.view(kind.shape)


def _can_be_mapped(block: Block, kind: Kind) -> bool:
    # kernels load whole elements, which a header of odd length may have moved
    is_aligned = block.start % kind.dtype.itemsize == 0
    return block.strides is None and not is_remote(block.file) and kind.num_bytes > 0 and is_aligned
