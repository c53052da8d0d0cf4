"""The suite's texts: what any machine with this package holds, read as bytes. Nothing is downloaded.

This module knows where text lies. Each record of the suite keeps the digest of its text, since installations differ.
"""

import gzip
import hashlib
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from pretrain_merge.demo.corpus import Corpus, load_corpus, split_by_name
from pretrain_merge.errors import MissingDependencyError

_MAX_BYTES = 12_000_000
_MIN_BYTES = 1_000_000


def headers() -> Corpus:
    """C and C++ headers that PyTorch ships."""
    return _joined(_files(Path(torch.__file__).parent / "include", "*.h"))


def manuals() -> Corpus:
    """The manual pages of the machine, else what installed packages say of themselves."""
    pages = _files(Path("/usr/share/man"), "man?/*.gz")
    text = _joined(pages)
    if len(text.train) < _MIN_BYTES:
        text = _joined(_files(Path(sysconfig.get_path("purelib")), "*.dist-info/METADATA"))
    return text


def perl() -> Corpus:
    """The Perl library of the machine."""
    return _joined(_files(Path("/usr/share/perl"), "*.p[lm]"))


def scripts() -> Corpus:
    """JavaScript that installed packages ship."""
    return _joined(_files(Path(sysconfig.get_path("purelib")), "*.js"))


def sums() -> Corpus:
    """Synthetic: lines such as `417+86=503`, made from a fixed seed; what carries is learned late and at once."""
    generator = np.random.default_rng(1907)
    pages = generator.integers(1000, size=(512, 1000, 2))
    lines = (("\n".join(f"{a}+{b}={a + b}" for a, b in page) + "\n").encode() for page in pages.tolist())
    return split_by_name((f"page {index}", page) for index, page in enumerate(lines))


def markov() -> Corpus:
    """Synthetic: the next of 32 letters depends on the two before; 2048 chains side by side, made from a fixed seed."""
    letters, chains, length = 32, 2048, 2000
    generator = np.random.default_rng(1906)
    # a few likely successors for each pair of letters, as in text
    cumulated = generator.dirichlet(np.full(letters, 0.15), size=letters * letters).cumsum(axis=1)
    text = np.zeros((length, chains), dtype=np.int64)
    text[:2] = generator.integers(letters, size=(2, chains))
    for position in range(2, length):
        rows = cumulated[text[position - 2] * letters + text[position - 1]]
        draws = generator.random((chains, 1))
        text[position] = np.minimum((rows < draws).sum(axis=1), letters - 1)
    written = (text.T + ord("A")).astype(np.uint8)
    return split_by_name((f"chain {index}", chain.tobytes()) for index, chain in enumerate(written))


TEXTS: Mapping[str, Callable[[], Corpus]] = {
    "stdlib": load_corpus,
    "headers": headers,
    "manuals": manuals,
    "markov": markov,
    "perl": perl,
    "scripts": scripts,
    "sums": sums,
}


def digest(corpus: Corpus) -> str:
    """Tells one machine's text from another's."""
    both = corpus.train.numpy().tobytes() + b"|" + corpus.validation.numpy().tobytes()
    return hashlib.blake2b(both, digest_size=8).hexdigest()


def _files(root: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted(root.rglob(pattern)):
        if path.is_file():  # a link to a page that is not installed is none
            content = path.read_bytes()
            yield path.relative_to(root).as_posix(), gzip.decompress(content) if path.suffix == ".gz" else content


def _joined(files: Iterator[tuple[str, bytes]]) -> Corpus:
    chosen, seen, total = [], set(), 0
    for name, content in files:
        if total < _MAX_BYTES and content not in seen:
            seen.add(content)  # the same page under several names would be on both sides
            chosen.append((name, content))
            total += len(content)
    corpus = split_by_name(chosen)
    if not len(corpus.validation) and total >= _MIN_BYTES:
        raise MissingDependencyError(f"{total} bytes of text in {len(chosen)} files, and none is held out.")
    return corpus
