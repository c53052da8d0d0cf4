"""The demo's text: the source code of Python's own standard library, read as bytes.

This module knows where that text lies, which files are held out for validation, and which bytes a training step sees.
It knows no model and no trainer. Nothing is downloaded: every Python installation brings the text along, and a token is
a byte, so there is no tokenizer either.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pretrain_merge.errors import ConfigError, MissingDependencyError

VOCAB_SIZE = 256

# Installed packages differ between machines; test suites and generated tables are no prose worth learning.
_EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
_MIN_BYTES = 1_000_000  # a complete standard library has some 9 million


@dataclass(frozen=True)
class Corpus:
    """Two disjoint texts, split by file.

    Attributes:
        train: uint8, shape `(num_bytes,)`.
        validation: uint8, shape `(num_bytes,)`, about one file in twelve.
        num_files: Files in both together.
    """

    train: Tensor
    validation: Tensor
    num_files: int


def load_corpus(root: Path | None = None) -> Corpus:
    """Read every Python file under `root` and split the files into training and validation text.

    A file's side depends on its path below `root` alone: the same on every machine, and a new file moves no other.

    Args:
        root: Folder to read; None means the standard library of the running interpreter.

    Raises:
        MissingDependencyError: There is too little source text (some minimal Python installations strip it).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    corpus = split_by_name((name, (root / name).read_bytes()) for name in _source_files(root))
    num_bytes = len(corpus.train) + len(corpus.validation)
    if num_bytes < _MIN_BYTES or not len(corpus.train) or not len(corpus.validation):
        raise MissingDependencyError(
            f"{root} holds {num_bytes} bytes of Python source in {corpus.num_files} files. The demo trains on at least "
            f"{_MIN_BYTES} bytes of the standard library's source text. Run it with a Python that ships its source "
            f"(python.org, a Linux distribution, uv or conda; not an embedded or zipped one)."
        )
    return corpus


def split_by_name(files: Iterable[tuple[str, bytes]]) -> Corpus:
    """Join texts, each on the side that its name decides."""
    train, validation = bytearray(), bytearray()
    num_files = 0
    for name, content in files:
        text = validation if _is_held_out(name) else train
        text += content
        num_files += 1
    return Corpus(_as_tensor(train), _as_tensor(validation), num_files)


class TrainingBlocks(Dataset[dict[str, Tensor]]):
    """Blocks of text drawn at random places, where the place of block `i` is a pure function of `(seed, i)`.

    A loader over it without shuffling therefore shows step `k` the same batch in every run, on every machine, with any
    number of workers. `first` shifts the count: a branch that leaves the run at step `k` goes on with the run's own
    batches. (A plain DataLoader starts its data set over after a resume, P26, so that must start where the run was.)

    Args:
        text: uint8 bytes, shape `(num_bytes,)`.
        block_length: Bytes per block.
        num_blocks: Length of the data set.
        seed: Draws other places.
        first: Blocks of the run that came before.
    """

    def __init__(self, text: Tensor, *, block_length: int, num_blocks: int, seed: int, first: int = 0) -> None:
        if not 0 < block_length <= len(text):
            raise ConfigError(
                f"block_length: {block_length} bytes were asked for and the text has {len(text)}. "
                f"Choose a length from 1 to {len(text)}."
            )
        self._text = text
        self._block_length = block_length
        self._num_blocks = num_blocks
        self._seed = seed
        self._first = first

    def __len__(self) -> int:
        return self._num_blocks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # a data set that is read past its end would go on for ever: any index has a place
        if not 0 <= index < self._num_blocks:
            raise IndexError(f"block {index} of {self._num_blocks}")
        digest = hashlib.blake2b(f"{self._seed}:{self._first + index}".encode(), digest_size=8).digest()
        num_places = len(self._text) - self._block_length + 1
        start = int.from_bytes(digest, "little") % num_places  # 64 bits over 1e7 places: the bias is below 1e-12
        return _block(self._text, start, self._block_length)


class ValidationBlocks(Dataset[dict[str, Tensor]]):
    """Always the same blocks, spread evenly over the held-out text.

    Args:
        text: uint8 bytes, shape `(num_bytes,)`.
        block_length: Bytes per block.
        num_blocks: How many; they must fit side by side.
    """

    def __init__(self, text: Tensor, *, block_length: int, num_blocks: int) -> None:
        if not 0 < block_length * num_blocks <= len(text):
            raise ConfigError(
                f"num_blocks: {num_blocks} blocks of {block_length} bytes were asked for and the held-out text "
                f"has {len(text)} bytes. Ask for 1 to {len(text) // max(block_length, 1)} blocks of this length."
            )
        self._text = text
        self._block_length = block_length
        self._num_blocks = num_blocks

    def __len__(self) -> int:
        return self._num_blocks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._num_blocks:
            raise IndexError(f"block {index} of {self._num_blocks}")
        return _block(self._text, index * (len(self._text) // self._num_blocks), self._block_length)


def _source_files(root: Path) -> list[str]:
    """Paths below `root` with forward slashes, in an order that no file system decides."""
    names: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _EXCLUDED_FOLDERS]  # in place: os.walk skips them
        # forward slashes, since the name decides the side
        names += [(Path(folder) / file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    return sorted(names)


def _is_held_out(name: str) -> bool:
    # not `hash()`, which differs from process to process
    return hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % 12 == 0


def _as_tensor(text: bytearray) -> Tensor:
    # frombuffer refuses an empty buffer
    return torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def _block(text: Tensor, start: int, length: int) -> dict[str, Tensor]:
    # The key is the one that Hugging Face models take and that the callback counts tokens by.
    return {"input_ids": text[start : start + length].long()}
