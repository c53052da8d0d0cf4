"""The memory of one array of any library but torch, by its bytes.

This module knows NumPy, `array`, `bytearray` and what other processes share. It knows no containers and no tensors.
"""

import ctypes
import io
from typing import Any

import numpy as np

_TEXT: Any = io.StringIO  # typeshed does not know how it is copied
SAMPLE = 256  # elements of an array that is too large to be copied, and only watched


class BytesState:
    """The memory of an array of any library but torch."""

    __slots__ = ("form", "item", "nbytes", "sample", "saved")

    def __init__(self, item: Any) -> None:
        self.item, self.nbytes, self.form = item, _num_bytes(item), _form(item)
        self.saved: bytes | None = None
        self.sample = b""

    def keep(self) -> bool:
        """Copy it; nothing is left to others."""
        self.saved = _bytes_of(self.item)
        return False

    def watch(self) -> None:
        """Too large to be copied: note some of it."""
        self.sample = _some_bytes(self.item)

    def is_same(self) -> bool:
        """Byte by byte where it was copied."""
        if _num_bytes(self.item) != self.nbytes or _form(self.item) != self.form:
            return False
        return _some_bytes(self.item) == self.sample if self.saved is None else _bytes_of(self.item) == self.saved

    def put_back(self) -> None:
        """The same bytes in the same memory; raises where they are too many."""
        item, saved = self.item, self.saved
        if saved is None:
            self.watch()  # said once, not at every pass
            raise ValueError(f"{self.nbytes:,} bytes are too many to be copied at each merge")
        if issubclass(type(item), np.ndarray):
            item.flags.writeable = True  # as it was: others are not kept
            if item.shape != self.form[0]:
                np.ndarray.resize(item, self.form[0], refcheck=False)
            # a subclass may make something else of an assignment
            plain = item.view(np.ndarray)
            plain[...] = np.frombuffer(saved, item.dtype).reshape(item.shape)
        elif isinstance(item, bytearray):
            # in place: a memoryview that somebody holds keeps it from being resized, not from being written
            item[:] = saved
        elif hasattr(type(item), "frombytes"):
            del item[:]
            item.frombytes(saved)
        else:
            ctypes.memmove(_address(item), saved, self.nbytes)


class BufferState(BytesState):
    """A file in memory, `io.StringIO` or `io.BytesIO`: what is written in it, and the place in it."""

    __slots__ = ("ends", "place")

    def __init__(self, item: Any) -> None:
        self.item, self.place = item, _place(item)
        # what it makes of the ends of lines
        self.ends = _TEXT.__getstate__(item)[1] if self._is_text and self.place is not None else None
        self.nbytes = len(self._content())
        self.saved: Any = None
        self.sample = b""

    def keep(self) -> bool:
        """Copy it; what was read from and never written to shares its bytes."""
        self.saved = self._content()
        return False

    def watch(self) -> None:
        """Too large to be copied: its place is put back all the same."""
        self.nbytes = len(self._content())

    def is_same(self) -> bool:
        """Place first, which moves with whatever is read or written."""
        if _place(self.item) != self.place:
            return False
        now = self._content()
        return len(now) == self.nbytes if self.saved is None else bool(now == self.saved)

    def put_back(self) -> None:
        """The same content, also of one that was closed, and the same place; raises where it is too large."""
        item = self.item
        if self.saved is None and (item.closed or len(self._content()) != self.nbytes):
            self.watch()
            raise ValueError(f"{self.nbytes:,} bytes are too many to be copied at each merge")
        if self.place is None:
            io.IOBase.close(item)
        elif self.saved is None:
            item.seek(self.place)
        elif self._is_text:
            io.StringIO.__init__(item, "", self.ends)  # which opens it again
            _TEXT.__setstate__(item, (self.saved, self.ends, self.place, None))
        else:
            io.BytesIO.__init__(item, self.saved)
            io.BytesIO.seek(item, self.place)

    @property
    def _is_text(self) -> bool:
        return isinstance(self.item, io.StringIO)

    def _content(self) -> Any:
        kind: Any = io.StringIO if self._is_text else io.BytesIO
        return b"" if self.item.closed else kind.getvalue(self.item)


def _place(item: Any) -> int | None:
    return None if item.closed else int(item.tell())


def _num_bytes(item: Any) -> int:
    if issubclass(type(item), np.ndarray):
        return int(item.nbytes)
    if isinstance(item, bytearray):
        return len(item)
    return len(item) * item.itemsize if hasattr(type(item), "frombytes") else ctypes.sizeof(_raw(item))


def _form(item: Any) -> Any:
    """What of an array may change in place beside its bytes."""
    return (item.shape, bool(item.flags.writeable)) if issubclass(type(item), np.ndarray) else None


def _bytes_of(item: Any) -> bytes:
    if issubclass(type(item), np.ndarray) or hasattr(type(item), "frombytes"):
        return bytes(item.tobytes())
    return bytes(item) if isinstance(item, bytearray) else ctypes.string_at(_address(item), _num_bytes(item))


def _some_bytes(item: Any) -> bytes:
    if issubclass(type(item), np.ndarray):
        return bytes(item.flat[:: max(1, item.size // SAMPLE)].tobytes())
    return bytes(item[:: max(1, len(item) // SAMPLE)]) if hasattr(type(item), "__len__") else b""


def _raw(item: Any) -> Any:
    return item.get_obj() if hasattr(type(item), "get_obj") else item


def _address(item: Any) -> int:
    return ctypes.addressof(_raw(item))
