"""Memory that depends on nothing, pieces that cover every tensor once, and files divided over ranks."""

import itertools
import math
import os
import socket
import sys

import pytest
import torch
import torch.distributed as dist
from harness.ranks import on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from offline import writers

from pretrain_merge import merge_checkpoints
from pretrain_merge.cli.main import main
from pretrain_merge.kernels.spread import Spread
from pretrain_merge.offline import pieces, shards, stream
from pretrain_merge.offline.agreement import Output
from pretrain_merge.offline.files import Files
from pretrain_merge.offline.pieces import Buffer, Reader, batches, cut
from pretrain_merge.offline.shards import Shard
from pretrain_merge.offline.tensors import Block, Kind, Source
from pretrain_merge.offline.torch_memory import own_dtype, part_of

# of a 70B Llama: embedding, attention, feed-forward, norm
LARGE = {"embed": (128256, 8192), "q": (8192, 8192), "k": (1024, 8192), "up": (28672, 8192), "norm": (8192,)}


@given(st.lists(st.integers(1, 7), max_size=4), st.integers(1, 30), st.lists(st.integers(0, 6), min_size=4, max_size=4))
@settings(deadline=None)
def test_pieces_hold_every_element_once_whatever_the_sharding(shape, longest, cuts):
    value = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
    stored, blocks = {}, []
    sides = [sorted({0, min(at, size), size}) for at, size in zip(cuts, shape, strict=False)]
    for corner in itertools.product(*(itertools.pairwise(side) for side in sides)):
        box = value[tuple(slice(*span) for span in corner)].contiguous()
        file = f"part-{len(stored)}"
        stored[file] = box.reshape(-1).view(torch.uint8).numpy().tobytes()
        blocks.append(Block(file, 0, tuple(first for first, _ in corner), tuple(box.shape)))
    kind = Kind(tuple(value.shape), own_dtype(value.dtype))
    source = Source("memory", "test", {"x": kind}, {"x": blocks}.__getitem__, tuple(stored))

    class Memory(Files):
        def read_into(self, file, start, target):
            target[:] = stored[file][start : start + len(target)]

    reader, found = Reader(source, Memory()), []
    for piece in cut("x", kind.shape, longest):
        assert piece.num_elements <= longest
        target = torch.full(piece.shape, -1, dtype=torch.int32)
        reader.read_into([piece], [part_of(target)])
        found.append(target.flatten())
    assert torch.equal(torch.cat(found), value.flatten())


@pytest.mark.parametrize("num_sources", [1, 8, 32, 200])
def test_buffers_keep_to_their_budget_for_shapes_of_a_70b_model_and_any_number_of_sources(
    tmp_path, monkeypatch, num_sources
):
    """The largest tensor has 2 GB; as many batches of it as use every buffer, with files that give nothing."""
    kinds = {name: Kind(shape, own_dtype(torch.bfloat16)) for name, shape in LARGE.items()}
    block = {name: [Block("file", 0, (0,) * len(kind.shape), kind.shape)] for name, kind in kinds.items()}
    source = Source("sparse", "test", kinds, block.__getitem__, ("file",))
    made = []

    class Counted(Buffer):
        def __init__(self, device):
            super().__init__(device)
            made.append(self)

    monkeypatch.setattr(stream, "Buffer", Counted)
    monkeypatch.setattr(Files, "read_into", lambda *_: None)
    monkeypatch.setattr(stream, "sum_rows", lambda *_, **__: Spread(0.0, 0.0))
    monkeypatch.setattr(stream, "batches", lambda *arguments: itertools.islice(batches(*arguments), 8))
    monkeypatch.setattr(shards.ShardWriter, "result", lambda writer: shards.Written(0, 0, *writer.spread))
    outputs = {name: Output(kind) for name, kind in kinds.items()}
    coefficients = [1 / num_sources] * num_sources
    with stream.Streamer([source] * num_sources, coefficients, device="cpu", progress=lambda _: None) as streamer:
        streamer.write(tmp_path, Shard("model.safetensors", kinds), outputs)
    assert len(made) == len(streamer._lanes) * (num_sources + 1)
    total = sum(len(buffer._memory) for buffer in made)
    assert 0 < total <= stream.BUFFERS


def test_a_batch_in_work_has_its_buffers_for_itself(tmp_path, monkeypatch):
    in_work, at_once = [], []
    read = stream.Streamer._sum
    finish = stream.Streamer._finish

    def begun(streamer, batch, outputs, lane):
        at_once.append(lane in in_work)
        in_work.append(lane)
        return read(streamer, batch, outputs, lane)

    def finished(streamer, lane, future, writer):
        future.result()
        in_work.remove(lane)
        return finish(streamer, lane, future, writer)

    monkeypatch.setattr(stream.Streamer, "_sum", begun)
    monkeypatch.setattr(stream.Streamer, "_finish", finished)
    monkeypatch.setattr(stream, "batch_size", lambda *_, **__: 64)
    monkeypatch.setattr(Files, "read_into", lambda *_: None)
    kind = Kind((512,), own_dtype(torch.float32))
    source = Source("sparse", "test", {"w": kind}, lambda _: [Block("file", 0, (0,), (512,))], ("file",))
    with stream.Streamer([source], [1.0], device="cpu", progress=lambda _: None) as streamer:
        streamer.write(tmp_path, Shard("model.safetensors", {"w": kind}), {"w": Output(kind)})
    assert len(at_once) == 512 // 16
    assert not any(at_once)


def test_a_budget_that_a_float64_source_would_break_is_seen():
    for num_lanes in (3, 5, 9):
        size = stream.batch_size(32, num_lanes)
        assert num_lanes * 33 * size <= stream.BUFFERS
        kinds = {name: Kind((10**6,), own_dtype(torch.bfloat16)) for name in "ab"}
        for batch in batches(kinds, {"a": torch.float64.itemsize, "b": torch.bfloat16.itemsize}, size):
            widths = [torch.float64.itemsize if piece.name == "a" else torch.bfloat16.itemsize for piece in batch]
            assert sum(piece.num_elements * width for piece, width in zip(batch, widths, strict=True)) <= size


def test_rows_longer_than_a_batch_are_cut():
    found = list(pieces.cut("x", (2, 3, 100), 40))
    assert {piece.lead for piece in found} == {(i, j) for i in range(2) for j in range(3)}
    assert max(piece.num_elements for piece in found) == 40


def command_on_rank(folder, port):
    """The command as torchrun starts it; returns the files that this rank wrote."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["pretrain-merge", "merge", folder, "--out", f"{folder}/ranks", "--largest_file", "300", "--quiet"]
    written, real = [], stream.written
    stream.written = lambda place, shard, **options: written.append(shard.file) or real(place, shard, **options)
    main()
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=2)  # the harness's
    return written


def test_ranks_of_torchrun_divide_the_files_and_the_folder_is_that_of_one_process(tmp_path):
    for step in (1, 2):
        writers.safetensors_file(tmp_path, step, writers.tensors(step))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = on_ranks(command_on_rank, str(tmp_path), port)
    about = merge_checkpoints(sorted(tmp_path.glob("*.safetensors")), tmp_path / "one", largest_file=300)
    assert first
    assert second
    assert sorted([*first, *second]) == sorted(about["files"])
    one, ranks = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "ranks"))
    assert one == ranks


def refuse_on_rank(folder):
    from pathlib import Path

    from pretrain_merge import merge_checkpoints
    from pretrain_merge.errors import PretrainMergeError

    try:
        merge_checkpoints(sorted(Path(folder).glob("*.safetensors")), Path(folder) / "ranks", largest_file=300)
    except PretrainMergeError as error:
        return type(error).__name__
    return "nothing"


def test_a_source_that_only_one_rank_reads_and_that_is_not_finite_ends_all_of_them(tmp_path):
    for step in (1, 2):
        state = writers.tensors(step)
        state["embed.weight"][3, 3] = float("nan")
        writers.safetensors_file(tmp_path, step, state)
    assert sorted(on_ranks(refuse_on_rank, str(tmp_path))) == ["MergeInputError", "RankError"]
    assert not (tmp_path / "ranks").exists()
