"""Files made to hang, to fill memory, to break a process or to write to a terminal: one error of ours each."""

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain_merge import load_merged
from pretrain_merge.cli.model_shapes import read_model
from pretrain_merge.config import MergeConfig, build
from pretrain_merge.errors import PretrainMergeError
from pretrain_merge.files.layout import Layout
from pretrain_merge.files.sharded_folder import _check
from pretrain_merge.files.snapshot_file import SnapshotFile, read
from pretrain_merge.forecast import Calibration
from pretrain_merge.forecast.calibration import SHIPPED
from pretrain_merge.merged_models.merged import save_merged
from pretrain_merge.merged_models.provenance import read_provenance, write_provenance
from pretrain_merge.records import MergeRecord, read_records
from pretrain_merge.records.read_run import read_run

pytestmark = pytest.mark.timeout(60)
MOST_BYTES = 200 * 10**6
DEEP = "[" * 100_000
ESCAPE = "loss\x1b[2J\x1b]0;title\x07"
RECORD = json.loads(MergeRecord("merge", 4, 8, 0, 2, 0.1, {"val_loss": 1.0}, {"sma": {"val_loss": 0.9}}).to_json())
CALIBRATION = json.loads(SHIPPED.read_text())
LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 8}

Use = Callable[[Path], object]


def text(content: str | bytes) -> Use:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def value(content: object) -> Use:
    return text(json.dumps(content))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 * 10**9)  # sparse: takes no disk


ANYTHING = {
    "a pipe": pipe,
    "a folder": folder,
    "a device without end": endless,
    "3 GB of zeros": large,
    "no text": text(b"\xff\xfe\x00"),
    "nothing": text(""),
    "nested without end": text(DEEP),
    "a mapping nested without end": text('{"a":' * 100_000),
    "ten million values": text("[" + "[],[],[],[],[],[],[],[],[],[]," * 300_000 + "0]"),
    "digits without end": text('{"format": ' + "9" * 100_000 + "}"),
    "another kind of value": text('"text"'),
    "null": text("null"),
}


def broken(values: dict[str, object], **changed: object) -> Use:
    return value(values | changed)


def header(entries: object, *, size: int | None = None) -> Use:
    encoded = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return text(struct.pack("<Q", len(encoded) if size is None else size) + encoded)


RECORDS = {
    "text where a loss belongs": broken(RECORD, raw={"val_loss": "0.1"}),
    "a list where a loss belongs": broken(RECORD, views={"sma": {"val_loss": [1]}}),
    "a view that is a number": broken(RECORD, views={"sma": 3}),
    "a step of text": broken(RECORD, step="4"),
    "a step that is true": broken(RECORD, step=True),
    "a step below zero": broken(RECORD, step=-4),
    "a step of 10^400": text(json.dumps(RECORD).replace('"step": 4', f'"step": {10**400}')),
    "a loss of 10^400": text(json.dumps(RECORD).replace("1.0", str(10**400))),
    "a spread of text": broken(RECORD, spread="wide"),
    "a recipe of text": broken(RECORD, recipes={"sma": {"steps": ["a"], "coefficients": [1.0]}}),
    "a forecast of text": broken(
        RECORD, forecasts={"f": {"val_loss": {"mean": "a", "low": 1.0, "high": 1.0, "step": 9}}}
    ),
    "a rate of text": broken(RECORD, lr=["fast"]),
    "a phase that is a list": broken(RECORD, phase=[[]]),
    "a reason that is a list": broken(RECORD, skipped={"sma": []}),
}
CSVS = {
    "10^9 snapshots": text("merge/step,merge/window,merge/raw/val_loss,merge/sma/val_loss\n4,1000000000,1,1\n"),
    "a view of more snapshots than a window": text("merge/step,merge/raw/val_loss,merge/sma20000/val_loss\n4,1,1\n"),
    "a view of a billion snapshots": text("merge/step,merge/raw/val_loss,merge/sma999999999/val_loss\n4,1,1\n"),
    "many merges of 10^4 snapshots": text(
        "merge/step,merge/window,merge/raw/val_loss,merge/sma/val_loss\n"
        + "".join(f"{i},10000,1,1\n" for i in range(500))
    ),
    "many views of 10^4 snapshots": text(
        ",".join(["merge/step", "merge/raw/val_loss", *(f"merge/sma{10_000 - i}/val_loss" for i in range(5_000))])
        + "\n" + ",".join(["4"] * 5_002) + "\n"
    ),
    "a step of 10^300": text("merge/step,merge/raw/val_loss\n1e300,1\n"),
    "a step below zero": text("merge/step,merge/raw/val_loss\n-1,1\n"),
    "a line without end": text("merge/step,merge/raw/val_loss\n" + "1" * 20_000_000),
    "NUL": text(b"merge/step\x00,merge/raw/val_loss\n\x00,\x00\n"),
    "an open quote": text('merge/step,merge/raw/val_loss\n"4,1\n' + "a,b\n" * 100_000),
}  # fmt: skip
CALIBRATIONS = {
    "a text as coefficient": broken(CALIBRATION, coefficients=["a"] * 7),
    "NaN": broken(CALIBRATION, coefficients=[float("nan")] * 7),
    "an infinite share": broken(CALIBRATION, shares=[0.1, float("inf")]),
    "a number instead of a list": broken(CALIBRATION, levels=3),
    "no levels": broken(CALIBRATION, levels=[], quantiles=[]),
    "fewer quantiles": broken(CALIBRATION, quantiles=[1.0]),
    "a source that is a list": broken(CALIBRATION, source=[DEEP[:500]]),
    "numbers of 10^300": broken(CALIBRATION, prior=[[1e300] * 7] * 7),
    "an unknown key": broken(CALIBRATION, **{ESCAPE: 1}),
    "lists in lists": broken(CALIBRATION, errors=json.loads("[" * 400 + "]" * 400)),
}
CONFIGURATIONS = {
    "an alias bomb": text(
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    ),
    "a merge-key bomb": text(
        "a: &a {k: 1}\n" + "".join(
            f"{b}: &{b} {{<<: [{','.join(['*' + a] * 10)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        )
    ),
    "an interpolation bomb": text(
        "name: xxxxxxxxxxxxxxxx\n" + "a: ${name}${name}\n"
        + "".join(f"k{i + 1}: ${{k{i}}}${{k{i}}}\n" for i in range(30)).replace("${k0}", "${a}")
    ),
    "an interpolation bomb of mappings": text(
        "k0: {p: 1, q: 2}\n" + "".join(f"k{i + 1}: {{p: '${{k{i}}}', q: '${{k{i}}}'}}\n" for i in range(30))
    ),
    "an alias inside of itself": text("a: &a [*a]\n"),
    "a Python object": text("!!python/object/apply:os.system ['exit 1']\n"),
    "a key for the terminal": text('"win\\e[2Jdow": 4\n'),
    "a name of 300 letters": text(f"name: {'n' * 300}\n"),
    "a view of 300 letters": text(f"views: [{{name: {'n' * 300}, kind: sma}}]\n"),
}  # fmt: skip
SHAPES = {
    "10^18 layers": value(LLAMA | {"num_hidden_layers": 10**18}),
    "10^18 layers inside": value({"model_type": "llama", "text_config": {"n_layer": 10**18}}),
    "10^18 experts": value({"model_type": "mixtral", "num_local_experts": 10**18}),
    "a size of 10^300": value(LLAMA | {"hidden_size": 10**300}),
}
INDICES = {
    "absolute names": value({"weight_map": {"w": "/etc/passwd"}}),
    "names above": value({"weight_map": {"w": "../secret.safetensors"}}),
    "names that are lists": value({"weight_map": ["w"]}),
    "metadata that is a list": value({"metadata": [1], "weight_map": {}}),
    "10^19 parameters": value({"metadata": {"total_parameters": 10**19}}),
}
HEADERS = {
    "a header longer than its file": header({"w": {}}, size=2**60),
    "a header of 30 MB that is not there": header({"w": {}}, size=30_000_000),
    "a header that is nested": header(DEEP.encode()),
    "shapes of text": header({"w": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}}),
    "shapes below zero": header({"w": {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 4]}}),
    "shapes of 10^30": header({"w": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}}),
    "entries that are numbers": header({"w": 4}),
}


def named(cases: dict[str, dict[str, Use]]) -> list[object]:
    return [
        pytest.param(name, make, id=f"{name}: {what}") for name, kinds in cases.items() for what, make in kinds.items()
    ]


def use(name: str, path: Path) -> None:
    if name.endswith(".jsonl"):
        read_records(path)
    elif name.endswith((".csv", ".wandb")):
        read_run(path, every=2)
    elif name == "calibration.json":
        Calibration.load(path)
    elif name.endswith(".yaml"):
        build(MergeConfig, str(path))
    else:
        read_model(str(path))


@pytest.mark.parametrize(
    ("name", "make"),
    named({
        "merges.jsonl": ANYTHING | RECORDS,
        "metrics.csv": ANYTHING | CSVS,
        "run.wandb": ANYTHING,
        "calibration.json": ANYTHING | CALIBRATIONS,
        "merge.yaml": {key: make for key, make in ANYTHING.items() if key not in ("nothing", "null")} | CONFIGURATIONS,
        "config.json": ANYTHING | SHAPES,
        "model.safetensors.index.json": ANYTHING | INDICES,
        "model.safetensors": ANYTHING | HEADERS,
    }),
)  # fmt: skip
def test_a_crafted_file_gives_one_of_our_errors_in_little_memory(name, make, tmp_path):
    path = tmp_path / name
    make(path)
    if name == "merges.jsonl" and make is ANYTHING["nothing"]:
        return  # a run without merges
    with memory() as taken, pytest.raises(PretrainMergeError) as caught:
        use(name, path)
    assert taken() < MOST_BYTES
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 20_000


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def about(**changed: object) -> Use:
    def edit(folder: Path) -> None:
        write_provenance(folder, read_provenance(folder) | changed)

    return edit


def replaced(name: str, make: Use) -> Use:
    def replace(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return replace


INDEX = "model.safetensors.index.json"
MODELS = {
    **{f"provenance: {what}": replaced("provenance.json", make) for what, make in ANYTHING.items()},
    **{
        f"weights: {what}": replaced("model.safetensors", make)
        for what, make in ANYTHING.items()
        if make is not endless
    },
    **{f"index: {what}": replaced(INDEX, make) for what, make in ANYTHING.items() if make is not folder},
    "an index of files elsewhere": replaced(INDEX, value({"weight_map": {"layer.weight": "/etc/passwd"}})),
    "an index of lists": replaced(INDEX, value({"weight_map": [["a"]]})),
    "ties of lists": about(ties={"a": []}),
    "a prefix that is a list": about(prefix=[]),
    "files elsewhere": about(files={"../../secret": [1, 1]}),
    "sums of text": about(files={"model.safetensors": ["a", "b"]}),
    "dtypes of lists": about(as_integers={"layer.weight": []}),
    "a dtype that it is not": about(as_integers={"layer.weight": ESCAPE}),
    "a name for the terminal": about(ties={ESCAPE: "layer.weight"}),
}


@pytest.mark.parametrize("attack", MODELS.values(), ids=MODELS.keys())
def test_a_crafted_merged_model_gives_one_of_our_errors_and_changes_nothing(attack, tmp_path):
    save_merged(Small(), tmp_path / "model", {})
    attack(tmp_path / "model")
    module = Small()
    before = module.layer.weight.clone()
    with memory() as taken, pytest.raises(PretrainMergeError) as caught:
        load_merged(module, tmp_path / "model")
    assert taken() < MOST_BYTES
    assert torch.equal(module.layer.weight, before)
    assert "\x1b" not in str(caught.value)


SNAPSHOT = "snapshot-00000004-0a1b2c3d"


@pytest.mark.parametrize("make", ANYTHING.values(), ids=ANYTHING.keys())
@pytest.mark.parametrize("size", [-1, 0, 10**18])
def test_a_crafted_file_of_the_window_gives_one_of_our_errors(make, size, tmp_path):
    entry = SnapshotFile(f"{SNAPSHOT}.safetensors", size, 0)
    make(tmp_path / entry.name)
    with memory() as taken, pytest.raises(PretrainMergeError):
        read(tmp_path, entry, Layout.of({"w": torch.zeros(2)}, [torch.float32]))
    assert taken() < MOST_BYTES


@pytest.mark.parametrize("make", ANYTHING.values(), ids=ANYTHING.keys())
@pytest.mark.parametrize("name", ["parts.json", "part.safetensors"])
def test_a_crafted_folder_of_the_window_is_refused(make, name, tmp_path):
    parts = json.dumps([["part.safetensors", 0, 0]]).encode()
    (tmp_path / f"{SNAPSHOT}.sharded").mkdir()
    (tmp_path / f"{SNAPSHOT}.sharded" / "parts.json").write_bytes(parts)
    replaced(name, make)(tmp_path / f"{SNAPSHOT}.sharded")
    if make is ANYTHING["nothing"] and name == "part.safetensors":
        return  # that is what parts.json says
    with memory() as taken, pytest.raises((OSError, ValueError)):  # its caller makes them ours
        _check(tmp_path / f"{SNAPSHOT}.sharded", SnapshotFile(f"{SNAPSHOT}.sharded", len(parts), zlib.crc32(parts)))
    assert taken() < MOST_BYTES


@pytest.mark.parametrize("parts", ["[]x", "{}", "[1]", '[["a", 1]]', '[["a", "b", "c"]]', '[[["a"], 1, 1]]', DEEP])
def test_a_list_of_parts_that_is_none_is_refused(parts, tmp_path):
    folder = tmp_path / f"{SNAPSHOT}.sharded"
    folder.mkdir()
    (folder / "parts.json").write_text(parts)
    with pytest.raises((OSError, ValueError)):
        _check(folder, SnapshotFile(folder.name, len(parts), zlib.crc32(parts.encode())))


@contextmanager
def memory() -> Iterator[Callable[[], int]]:
    """How much more memory the process had at its highest than before, in bytes."""

    def line(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(row for row in status.splitlines() if row.startswith(name)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the highest is now's
    before = line("VmRSS")
    yield lambda: line("VmHWM") - before
