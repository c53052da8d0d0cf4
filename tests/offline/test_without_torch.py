"""Merges of no format load torch, which takes longer to load than they take. With or without, the same bits."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offline import writers

from pretrain_merge import merge_checkpoints
from pretrain_merge.offline import sums
from pretrain_merge.offline.sums import Row, sum_rows
from pretrain_merge.offline.tensors import MERGED_DTYPES
from pretrain_merge.offline.torch_memory import part_of, tensor_of, torch_dtype

PROBE = """
import sys
sys.argv = ["pretrain-merge", *sys.argv[1:]]
from pretrain_merge.cli.main import main
main()
print(*{name.partition(".")[0] for name in sys.modules}, sep="\\n")
"""
DTYPES = [torch_dtype(dtype) for dtype in MERGED_DTYPES]


def test_the_command_merges_every_format_without_loading_torch_to_the_bytes_of_a_process_that_has_it(tmp_path):
    pytest.importorskip("llvmlite")
    (tmp_path / "run").mkdir()
    formats = [
        writers.safetensors_file,
        writers.hugging_face,
        writers.lightning,
        writers.dcp_folder,
        writers.dcp_of_ranks,
    ]
    for step, write in enumerate(formats, 1):
        write(tmp_path / "run", step, writers.tensors(step))
    command = [sys.executable, "-c", PROBE, "merge", str(tmp_path / "run"), "--out", str(tmp_path / "light")]
    loaded = set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert "numpy" in loaded  # so the probe sees what is loaded
    assert not loaded & {"torch", "lightning", "pytorch_lightning", "omegaconf", "rich", "fsspec", "safetensors"}
    merge_checkpoints([tmp_path / "run"], tmp_path / "heavy")
    light, heavy = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("light", "heavy")
    )
    assert light == heavy


PEAK = """
import sys
from pathlib import Path
from pretrain_merge.cli.main import main
sys.argv = ["pretrain-merge", *sys.argv[1:]]
main()
print(*(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak of a process by itself")
def test_a_plan_says_at_least_the_memory_that_the_merge_takes_and_at_most_twice_of_it(tmp_path):
    pytest.importorskip("llvmlite")
    for step in range(1, 9):
        writers.pt(tmp_path, step, {"w": torch.randn(2**21, dtype=torch.float32) * step})
    command = [sys.executable, "-c", PEAK, "merge", str(tmp_path), "--out", str(tmp_path / "out"), "--quiet"]
    planned, done = (
        subprocess.run([*command, *more], check=True, capture_output=True, text=True).stdout
        for more in (["--plan"], [])
    )
    peak = int(done.split("VmHWM:")[1].split()[0]) / 1024
    said = int(planned.split("memory")[1].split()[0])
    assert peak <= said <= 2 * peak, (peak, said)


@st.composite
def merges(draw):
    seeds = iter(range(1000))
    num_sources = draw(st.integers(1, 4))

    def tensor(shape):
        generator = torch.Generator().manual_seed(next(seeds))
        return torch.randn(shape, generator=generator).to(draw(st.sampled_from(DTYPES)))

    shapes = draw(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=3))
    tensors = [[tensor(shape) for _ in range(num_sources + 1)] for shape in shapes]
    return tensors, draw(st.lists(st.floats(-2, 2), min_size=num_sources, max_size=num_sources))


def rows_of(tensors):
    return [Row("w", part_of(target.clone()), [part_of(part) for part in parts]) for target, *parts in tensors]


@given(merges())
@settings(deadline=None, max_examples=60)
def test_the_kernel_gives_the_bits_and_the_spread_that_it_gives_through_torch(merge):
    tensors, coefficients = merge
    with_torch, without = rows_of(tensors), rows_of(tensors)
    spread = sum_rows(without, [], coefficients)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "_compiled", lambda: None)
        expected = sum_rows(with_torch, [], coefficients)
    for one, other in zip(without, with_torch, strict=True):
        assert one.target.bits.tobytes() == other.target.bits.tobytes()
    assert spread == pytest.approx(expected, rel=1e-12)


def test_a_spread_that_float32_cannot_hold_is_measured_in_float64():
    parts = [torch.full((100,), value) for value in (1e-30, 3e-30)]
    spread = sum_rows(rows_of([[torch.zeros(100), *parts]]), [], [0.5, 0.5])
    assert spread.relative_rms == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_known_by_its_bits(dtype, value):
    largest = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).tiny, -0.0], dtype=dtype)
    assert sums._is_finite(part_of(largest))
    assert not sums._is_finite(part_of(torch.cat([largest, torch.tensor([value], dtype=dtype)])))


@given(st.sampled_from([*DTYPES, torch.int32, torch.bool, torch.complex128, torch.float8_e4m3fn]))
def test_a_part_and_its_tensor_are_the_same_memory(dtype):
    tensor = torch.zeros(2, 3).to(dtype)
    part = part_of(tensor)
    assert part.bits.shape == (2, 3)
    part.bits.view(np.uint8)[0, 0] = 1
    assert tensor.view(torch.uint8)[0, 0] == 1
    assert tensor_of(part).dtype is dtype
    assert tensor_of(part).data_ptr() == tensor.data_ptr()


def test_names_of_dtypes_in_headers_are_those_of_the_format(tmp_path):
    from safetensors.torch import load_file, save_file

    from pretrain_merge.offline import safetensors_format

    known = {name: torch_dtype(dtype) for name, dtype in safetensors_format.DTYPES.items()}
    save_file({name: torch.zeros(2, dtype=dtype) for name, dtype in known.items()}, tmp_path / "all.safetensors")
    length = int.from_bytes((tmp_path / "all.safetensors").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "all.safetensors").read_bytes()[8 : 8 + length])
    for name, kind in safetensors_format.open_files("all", [str(tmp_path / "all.safetensors")]).tensors.items():
        assert header[name]["dtype"] == name
        assert (kind.dtype.name, kind.dtype.itemsize) == (str(known[name])[6:], known[name].itemsize)
    assert load_file(tmp_path / "all.safetensors").keys() == known.keys()
