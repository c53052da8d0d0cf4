"""Pickles are read by closed lists: what torch takes for plain data is in them, and nothing in a file costs or runs."""

import collections
import io
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from offline.test_crafted_files import rewritten
from torch._weights_only_unpickler import _get_allowed_globals

from pretrain_merge.errors import CheckpointError
from pretrain_merge.offline import dcp_metadata, plain_pickle, recognise, torch_objects
from pretrain_merge.offline.files import Files
from pretrain_merge.offline.tensors import DTYPES
from pretrain_merge.offline.torch_archive import open_archive
from pretrain_merge.offline.torch_memory import own_dtype

_MOST_MEMORY = 200e6  # bytes
DEPTH = 100_000


def test_every_dtype_of_torch_is_known_by_its_name_and_size():
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert {own_dtype(dtype) for dtype in dtypes} == set(DTYPES.values())


def test_whatever_torch_takes_for_plain_data_has_a_stand_in():
    # TypedStorage is a class that torch never writes: it names the class of each dtype
    assert _get_allowed_globals().keys() - torch_objects.NAMES.keys() == {"torch.storage.TypedStorage"}


def short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def named(module, name):
    return short(module) + short(name) + b"\x93"


ORDERED = named("collections", "OrderedDict") + b")R"
SHAPE = b"(" + b"K\x01" * 1000 + b"t"
BOMBS = {
    "bytes that are not there": (b"\x8e" + struct.pack("<Q", 2**60), ""),
    "a frame that is not there": (b"\x95" + struct.pack("<Q", 2**60) + b"N", None),
    "an array of bytes that are not there": (b"\x96" + struct.pack("<Q", 2**28), "operations"),
    "a long number": (b"\x8b" + struct.pack("<i", 10**6) + b"\xff" * 10**6, "operations"),
    "a key that is nested deeply": (b"})" + b"\x85" * DEPTH + b"Ns", "a key other than"),
    "a key that doubles": (b"})" + b"2\x86" * 60 + b"Ns", "operations"),
    "a key that doubles by the memo": (b"})" + b"q\x000h\x00h\x00\x86" * 60 + b"Ns", "a key other than"),
    "a long key": (b"}" + SHAPE + b"Ns", "a key other than"),
    "keys that hash alike": (b"}\x8a\x28" + ((2**61 - 1) << 70).to_bytes(40, "little") + b"Ns", "a key other than"),
    "an old dict that copies": (named("collections", "OrderedDict") + b"]\x85R", "Python 2"),
    # what follows costs no more than its bytes do, so it may be there
    "a number of the memo": (b"Nr" + struct.pack("<I", 2**27), None),
    "an array by its length": (named("builtins", "bytearray") + b"J" + struct.pack("<i", 2**28) + b"\x85R", None),
    "a packed text": (named("_codecs", "encode") + short("x") + short("zlib") + b"\x86R", None),
    "a set of what doubles": (b"\x8f()" + b"q\x000h\x00h\x00\x86" * 60 + b"\x90", None),
    "a set many times": (b"](" + b"N" * 9999 + b"eq\x00" + (named("builtins", "set") + b"h\x00\x85R0") * 9999, None),
    "a list that is nested deeply": (b"]" * DEPTH + b"a" * (DEPTH - 1), None),
    "a list that holds itself": (b"]q\x00h\x00a", None),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_asks_for_much_costs_little(name):
    pickled, refusal = BOMBS[name]
    tracemalloc.start()
    try:
        if refusal is None:
            plain_pickle.load(b"\x80\x04" + pickled + b".", torch_objects.NAMES)
        else:
            with pytest.raises((ValueError, EOFError), match=refusal or None):
                plain_pickle.load(b"\x80\x04" + pickled + b".", torch_objects.NAMES)
        assert tracemalloc.get_traced_memory()[1] < _MOST_MEMORY
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dimensions", [65, 1000])
def test_a_tensor_has_as_many_dimensions_as_torch_allows(dimensions):
    storage = torch_objects.Storage("0", DTYPES["float32"], 4)
    with pytest.raises(ValueError, match=f"{dimensions} sizes"):
        torch_objects.NAMES["torch._utils._rebuild_tensor"].make(storage, 0, (1,) * dimensions, (1,) * dimensions)


def test_a_pickle_that_nests_without_end_is_refused_in_a_file_as_well(tmp_path):
    nested = b"\x80\x04" + b"]" * DEPTH + b"a" * (DEPTH - 1) + b"."
    torch.save({"w": torch.ones(2)}, tmp_path / "good.pt")
    rewritten(tmp_path / "good.pt", tmp_path / "bad.pt", lambda name, data: nested if "data.pkl" in name else data)
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-7" / ".metadata").write_bytes(nested)
    for place in ("bad.pt", "step-7"):
        with pytest.raises(CheckpointError, match="list"):
            recognise.find([tmp_path / place])


def test_a_pickle_that_is_packed_is_refused_for_it_may_be_far_longer_than_its_file(tmp_path):
    good = tmp_path / "good.pt"
    torch.save({"w": torch.ones(2)}, good)
    rewritten(good, tmp_path / "bad.pt", lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed"):
        recognise.find([tmp_path / "bad.pt"])


@pytest.mark.parametrize("target", [("collections", "Counter"), ("collections", "OrderedDict"), ("torch", "Size")])
def test_a_pickle_changes_no_class_of_the_process(target):
    state = b"N}" + short("update") + b"K\x07s\x86b"  # attributes, as objects with slots have them
    before = collections.Counter.update
    for names in (torch_objects.NAMES, dcp_metadata._NAMES):
        with pytest.raises(ValueError, match=r"changes a Name|which is not run"):
            plain_pickle.load(b"\x80\x04" + named(*target) + state + b".", names)
    assert collections.Counter.update is before


def test_only_a_name_of_the_list_can_be_called():
    for called in (b"]", ORDERED, short("text")):
        with pytest.raises(ValueError, match="it calls a"):
            plain_pickle.load(b"\x80\x04" + called + b")R.", torch_objects.NAMES)


class Settings:
    """A class of the user's own."""

    def __setstate__(self, state):
        raise AssertionError("it was made")


def test_a_class_that_the_process_lets_through_is_not_made_either(tmp_path):
    content = {"state_dict": {"w": torch.ones(2)}, "hyper_parameters": {"settings": Settings()}, "global_step": 3}
    vars(content["hyper_parameters"]["settings"])["rate"] = 1
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"test_plain_pickle\.Settings.*add_safe_globals"):
        recognise.find([tmp_path / "a.ckpt"])
    with torch.serialization.safe_globals([Settings]):
        (source,) = recognise.find([tmp_path / "a.ckpt"])
    assert source.step == 3
    assert source.tensors.keys() == {"w"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_writes_is_read(tmp_path, protocol):
    content = {
        "text": "ä" * 300,
        "n": [1, -1, 2**40, 2**100, 0.5, None, True],
        "bytes": b"x" * 300,
        "tuple": (1, (2, 3, 4, 5)),
    }
    torch.save(content | {"w": torch.arange(6.0).view(2, 3).T}, tmp_path / "a.pt", pickle_protocol=protocol)
    with Files() as files:
        found = open_archive(str(tmp_path / "a.pt"), files, 0, (tmp_path / "a.pt").stat().st_size).content
    assert found["w"].strides == (1, 3)
    assert {key: found[key] for key in ("text", "n", "tuple")} == {key: content[key] for key in ("text", "n", "tuple")}


def test_the_reader_in_c_would_take_what_a_file_says():
    """Why it is not used: eight bytes make it set memory aside for all of its memo."""
    tracemalloc.start()
    try:
        pickle.Unpickler(io.BytesIO(b"\x80\x04N" + b"r" + struct.pack("<I", 2**23) + b".")).load()
        assert tracemalloc.get_traced_memory()[1] > 2**24
    finally:
        tracemalloc.stop()


def test_a_conjugate_is_refused_since_its_bits_are_those_of_another_tensor(tmp_path):
    torch.save({"w": torch.ones(2), "c": torch.complex(torch.ones(2), torch.ones(2)).conj()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="c is a tensor whose bits"):
        recognise.find([tmp_path / "a.pt"])


@pytest.mark.parametrize(
    "value", [np.ones(3), torch.eye(2).to_sparse(), torch.empty(2, device="meta")], ids=["array", "sparse", "meta"]
)
def test_a_weight_that_is_not_a_dense_tensor_is_not_left_out_in_silence(tmp_path, value):
    torch.save({"state_dict": {"w": torch.ones(2), "other": value}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="other is a"):
        recognise.find([tmp_path / "a.pt"])
