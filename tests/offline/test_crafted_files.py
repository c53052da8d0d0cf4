"""Files that lie, are cut off, or are programs: one of our errors each, and nothing is run, read beyond, or left."""

import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from offline import writers
from offline.writers import tensors

from pretrain_merge import merge_checkpoints
from pretrain_merge.errors import PretrainMergeError


class Program:
    """A pickle that would make a file."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def header_of(text, body=b""):
    return struct.pack("<Q", len(text)) + text + body


def entry(**changed):
    return json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changed}).encode()


SAFETENSORS = {
    "empty": b"",
    "cut off in the length": b"\x10\x00",
    "a header longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "a header of nothing": header_of(b""),
    "not JSON": header_of(b"{nonsense"),
    "not an object": header_of(b"[]"),
    "nested without end": header_of(b"[" * 100_000),
    "bytes that are not text": header_of(b"\xff\xfe\xfa"),
    "a name twice": header_of(entry()[:-1] + b"," + entry()[1:], b"\0" * 8),
    "an unknown dtype": header_of(entry(dtype="F99"), b"\0" * 8),
    "a negative size": header_of(entry(shape=[-2]), b"\0" * 8),
    "a size that is no number": header_of(entry(shape=["2"]), b"\0" * 8),
    "a huge size": header_of(entry(shape=[2**61, 2**61]), b"\0" * 8),
    "sizes and bytes that differ": header_of(entry(shape=[3]), b"\0" * 8),
    "more bytes than its size has": header_of(entry(shape=[1]), b"\0" * 8),
    "bytes beyond the end": header_of(entry(shape=[4], data_offsets=[0, 16]), b"\0" * 8),
    "bytes of nobody": header_of(entry(), b"\0" * 16),
    "bytes before the beginning": header_of(entry(data_offsets=[-8, 0]), b"\0" * 8),
    "no offsets": header_of(b'{"w": {"dtype": "F32", "shape": [2]}}', b"\0" * 8),
    "shards that lie elsewhere": header_of(
        json.dumps(
            {
                "__metadata__": {"DCP_SHARDING_INFO": '{"w": {"saved_offsets": [5]}}'},
                "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            }
        ).encode(),
        b"\0" * 8,
    ),
}


def refusal(place, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PretrainMergeError) as caught:
        merge_checkpoints([place], tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before  # neither a result nor what a program would have made
    return str(caught.value)


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_safetensors_file_that_lies_is_refused(tmp_path, name):
    path = tmp_path / "model-step1.safetensors"
    path.write_bytes(SAFETENSORS[name])
    assert str(path) in refusal(path, tmp_path) or "each element" in refusal(path, tmp_path)


@pytest.mark.parametrize("write", writers.FORMATS, ids=lambda write: write.__name__)
def test_a_checkpoint_that_is_cut_off_is_refused_whatever_its_format(tmp_path, write):
    place = write(tmp_path, 7, tensors(7))
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    refusal(place, tmp_path)


@pytest.mark.parametrize("write", [writers.pt, writers.lightning, writers.torch_bin], ids=lambda write: write.__name__)
def test_a_program_in_a_checkpoint_is_named_and_not_run(tmp_path, write):
    place = write(tmp_path, 7, tensors(7) | {"evil": Program(tmp_path / "made")})
    assert "mkdir" in refusal(place, tmp_path)


def test_a_class_in_a_checkpoint_is_named(tmp_path):
    place = writers.lightning(tmp_path, 7, tensors(7), hyper_parameters={"config": writers._StorageInfo("", 0, 0)})
    assert "_StorageInfo" in refusal(place, tmp_path)


@pytest.mark.parametrize("what", ["metadata", "a tensor's file", "meta.pt"])
def test_a_program_in_a_dcp_folder_is_named_and_not_run(tmp_path, what):
    place = writers.dcp_of_ranks(tmp_path, 7, tensors(7))
    if what == "metadata":
        (place / ".metadata").write_bytes(pickle.dumps(Program(tmp_path / "made")))
    elif what == "meta.pt":
        torch.save(Program(tmp_path / "made"), place / "meta.pt")
    else:
        for path in place.glob("*.distcp"):
            torch.save(Program(tmp_path / "made"), path)
        length = min(path.stat().st_size for path in place.glob("*.distcp"))
        change_metadata(
            place, lambda m: [vars(info).update(offset=0, length=length) for info in m.storage_data.values()]
        )
    assert "mkdir" in refusal(place, tmp_path)


METADATA = {
    "empty": b"",
    "garbage": b"\x00\x01\x02",
    "another object": pickle.dumps({"state_dict_metadata": {}}),
    "a bytes bomb": b"\x80\x04\x8e" + struct.pack("<Q", 2**60),
    "endless nesting": b"\x80\x04" + b"]" * 10_000 + b".",
    "persistent": b"\x80\x04\x8c\x01xQ.",
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_are_damaged_are_refused(tmp_path, name):
    place = writers.dcp_folder(tmp_path, 7, tensors(7))
    (place / ".metadata").write_bytes(METADATA[name])
    assert ".metadata" in refusal(place, tmp_path)


@pytest.mark.parametrize("place_named", ["/etc/passwd", "../elsewhere", "s3://bucket/x", 7])
def test_metadata_that_name_files_elsewhere_are_refused(tmp_path, place_named):
    place = writers.dcp_of_ranks(tmp_path, 7, {"w": torch.ones(3)})
    metadata = pickle.loads((place / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = place_named
    (place / ".metadata").write_bytes(pickle.dumps(metadata))
    assert ".metadata" in refusal(place, tmp_path)


def change_metadata(place, change):
    metadata = pickle.loads((place / ".metadata").read_bytes())
    change(metadata)
    (place / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.state_dict_metadata["embed.weight"].chunks.pop(),
        lambda m: setattr(m.state_dict_metadata["embed.weight"], "size", torch.Size([400, 16])),
        lambda m: m.storage_data.clear(),
        lambda m: setattr(m.state_dict_metadata["embed.weight"], "properties", None),
        lambda m: [setattr(info, "offset", 2**60) for info in m.storage_data.values()],
        lambda m: [setattr(info, "length", 10) for info in m.storage_data.values()],
        lambda m: [setattr(info, "transform_descriptors", ["zstd"]) for info in m.storage_data.values()],
        lambda m: m.state_dict_metadata.clear(),
    ],
    ids=["part missing", "larger", "nowhere", "no dtype", "beyond the end", "too short", "compressed", "nothing"],
)
def test_metadata_that_do_not_fit_the_files_are_refused(tmp_path, change):
    place = writers.dcp_of_ranks(tmp_path, 7, tensors(7))
    change_metadata(place, change)
    assert str(place) in refusal(place, tmp_path)


def rewritten(path, target, change=lambda name, data: data, **options):
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", **options) as new:
        for info in old.infolist():
            data = change(info.filename, old.read(info))
            if data is not None:
                new.writestr(info.filename, data)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda name, data: data, {"compression": zipfile.ZIP_DEFLATED}),
        (lambda name, data: None if "data/0" in name else data, {}),
        (lambda name, data: data[:-4] if "data/0" in name else data, {}),
        (lambda name, data: None if name.endswith("data.pkl") else data, {}),
        (lambda name, data: b"garbage" if name.endswith("data.pkl") else data, {}),
        (lambda name, data: b"big" if name.endswith("byteorder") else data, {}),
    ],
    ids=["compressed", "storage missing", "storage short", "no pickle", "garbage", "big-endian"],
)
def test_an_archive_that_was_tampered_with_is_refused(tmp_path, change, options):
    good = writers.pt(tmp_path, 7, tensors(7))
    rewritten(good, tmp_path / "bad-step-7.pt", change, **options)
    assert "bad-step-7.pt" in refusal(tmp_path / "bad-step-7.pt", tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.pt", 3),
        ("b.pt", [torch.ones(3)]),
        ("c.pt", {"epoch": 1}),
        ("d.ckpt", {"state_dict": {}, "global_step": 3}),
    ],
)
def test_a_file_without_a_model_says_what_it_has(tmp_path, name, content):
    torch.save(content, tmp_path / name)
    assert name in refusal(tmp_path / name, tmp_path)


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
    path = writers.pt(tmp_path, 1, {"w": torch.arange(6.0)[:3]})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert pickled.count(b"K\x03\x85") == 1  # the shape (3,)
    longer = pickled.replace(b"K\x03\x85", b"K\x63\x85")
    rewritten(path, tmp_path / "bad.pt", lambda name, data: longer if name.endswith("data.pkl") else data)
    assert "storage" in refusal(tmp_path / "bad.pt", tmp_path)


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path):
    place = writers.hugging_face(tmp_path, 7, tensors(7))
    (place / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../../secret.safetensors"}}')
    assert "elsewhere" in refusal(place, tmp_path)


@pytest.mark.parametrize("make", ["nothing", "an empty folder", "a folder of other files", "another file"])
def test_a_place_without_a_checkpoint_is_refused(tmp_path, make):
    place = tmp_path / "place"
    if make != "nothing":
        place.mkdir()
    if make == "a folder of other files":
        (place / "notes.txt").write_text("hello")
    if make == "another file":
        place = place / "notes.txt"
        place.write_text("hello")
    assert "place" in refusal(place, tmp_path)
