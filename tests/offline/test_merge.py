"""Checkpoints on disk merged: every format, the same bits; the policy for what is not a plain sum; the provenance."""

import json
import math

import pytest
import torch
from harness import oracles
from kernels import oracle
from offline import writers
from offline.writers import FORMATS, read, tensors
from safetensors.torch import save_file

from pretrain_merge import load_merged, merge_checkpoints
from pretrain_merge.errors import CheckpointError, CoefficientError, ConfigError, MergeInputError, UnsupportedModelError
from pretrain_merge.offline import stream

STEPS = (100, 250, 300)
COPIED = ("position_ids", "mask")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def places(folder):
    """The same three checkpoints in every format."""
    return {write.__name__: [write(folder, step, tensors(step)) for step in STEPS] for write in FORMATS}


def assert_is_merge(found, states, coefficients, dtype=None):
    for name, value in found.items():
        sources = [state[name] for state in states]
        if name in COPIED or name == "constant":
            assert torch.equal(value, sources[-1])
        else:
            assert value.dtype == (dtype or sources[-1].dtype)
            oracle.assert_is_weighted_sum(value, sources, coefficients)


@pytest.mark.parametrize("name", [write.__name__ for write in FORMATS])
def test_every_format_gives_the_weighted_sum_with_its_own_steps(places, tmp_path, name, monkeypatch):
    monkeypatch.setattr(stream, "_LARGEST_BATCH", 50)  # so that tensors are cut, also within rows
    about = merge_checkpoints(reversed(places[name]), tmp_path / "out", "wma")
    found, written = read(tmp_path / "out")
    assert found.keys() == tensors(0).keys()
    assert_is_merge(found, [tensors(step) for step in STEPS], oracles.wma(3).tolist())
    assert about["steps"] == list(STEPS)
    assert about == written


def test_every_format_gives_the_same_bytes(places, tmp_path):
    contents = set()
    for name, sources in places.items():
        merge_checkpoints(sources, tmp_path / name, "sma")
        merged = read(tmp_path / name)[0]
        contents.add(
            tuple((key, merged[key].reshape(-1).view(torch.uint8).numpy().tobytes()) for key in sorted(merged))
        )
    assert len(contents) == 1


def test_formats_can_be_mixed(places, tmp_path):
    mixed = [places["pt"][0], places["dcp_of_ranks"][1], places["hugging_face"][2]]
    merge_checkpoints(mixed, tmp_path / "out")
    assert_is_merge(read(tmp_path / "out")[0], [tensors(step) for step in STEPS], [1 / 3] * 3)
    assert (tmp_path / "out/config.json").exists()  # of the newest


@pytest.mark.parametrize(
    ("view", "coefficients"),
    [
        ("sma2", oracles.sma(2)),
        ({"name": "d", "kind": "decay", "shape": "1-square"}, oracles.decay(oracles.SHAPES["1-square"], STEPS)),
        ("wsm", oracles.decay(oracles.SHAPES["1-sqrt"], STEPS)),
        ([-0.5, 0.25, 1.25], [-0.5, 0.25, 1.25]),
        ({"name": "e", "kind": "ema", "half_life": 50}, oracles.ema([1 - 2 ** -(150 / 50), 1 - 2 ** -(50 / 50)])),
    ],
    ids=str,
)
def test_coefficients_come_from_the_view_and_the_uneven_steps(places, tmp_path, view, coefficients):
    about = merge_checkpoints(places["pt"], tmp_path / "out", view)
    assert about["coefficients"] == pytest.approx(list(coefficients), abs=1e-12)
    states = [tensors(step) for step in STEPS][-len(coefficients) :]
    assert_is_merge(read(tmp_path / "out")[0], states, about["coefficients"])


def test_the_provenance_says_which_decay_the_merge_emulates(places, tmp_path):
    about = merge_checkpoints(places["pt"], tmp_path / "out", [0.2, 0.3, 0.5])
    assert about["emulated_decay"] == pytest.approx([0.8, 0.5])
    assert about["n_eff"] == pytest.approx(1 / (0.04 + 0.09 + 0.25))
    assert about["copied"].keys() == set(COPIED)
    moving = [name for name in tensors(0) if name not in (*COPIED, "constant", "empty")]
    whole = [torch.cat([tensors(step)[name].double().flatten() for name in moving]).numpy() for step in STEPS]
    assert about["spread"] == pytest.approx(oracles.relative_spread(whole), rel=1e-5)


def test_spelled_out_coefficients_belong_to_the_order_in_which_checkpoints_are_named(places, tmp_path):
    first, second, _ = places["pt"]
    merge_checkpoints([second, first], tmp_path / "out", [0.25, 0.75])
    assert_is_merge(read(tmp_path / "out")[0], [tensors(250), tensors(100)], [0.25, 0.75])


def test_a_folder_stands_for_its_checkpoints_and_last_is_not_counted_twice(tmp_path):
    for step in (5, 40, 100):
        path = writers.lightning(tmp_path, step, tensors(step))
    writers.copy_as(path, "last.ckpt")
    (tmp_path / "hparams.yaml").write_text("")
    about = merge_checkpoints(tmp_path, tmp_path.with_name("out-of-folder"))
    assert about["steps"] == [5, 40, 100]
    assert_is_merge(read(tmp_path.with_name("out-of-folder"))[0], list(map(tensors, (5, 40, 100))), [1 / 3] * 3)


def test_a_state_that_a_folder_holds_twice_counts_once_and_two_states_of_one_step_are_refused(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (10, 20):
        path = writers.lightning(folder, step, tensors(step))
    writers.copy_as(path, "best-v1.ckpt")
    assert merge_checkpoints(folder, tmp_path / "out")["steps"] == [10, 20]
    torch.save({"state_dict": tensors(21), "global_step": 20}, folder / "epoch=0-step=20-v1.ckpt")
    with pytest.raises(CheckpointError, match=r"both of step 20.*weights differ.*one by one"):
        merge_checkpoints(folder, tmp_path / "other")
    both = [folder / "best-v1.ckpt", folder / "epoch=0-step=20-v1.ckpt"]
    assert merge_checkpoints(both, tmp_path / "named")["steps"] == [20, 20]


def test_a_pattern_stands_for_what_matches_unless_a_file_has_that_name(tmp_path):
    paths = [writers.lightning(tmp_path, step, tensors(step)) for step in (10, 20, 30)]
    assert merge_checkpoints(tmp_path / "*[12]0.ckpt", tmp_path / "out")["steps"] == [10, 20]
    paths[0].rename(tmp_path / "[a]*.ckpt")
    assert merge_checkpoints([tmp_path / "[a]*.ckpt"], tmp_path / "one", [1.0])["steps"] == [10]
    with pytest.raises(CheckpointError, match=r"is not there.*pattern"):
        merge_checkpoints(tmp_path / "x*.ckpt", tmp_path / "none")


def test_a_folder_for_each_checkpoint_with_its_optimizer_beside_is_a_checkpoint(tmp_path):
    for step in (1000, 2000):
        folder = tmp_path / "run" / f"step{step}-unsharded"
        folder.mkdir(parents=True)
        torch.save(tensors(step), folder / "model.pt")
        torch.save({"state": {}}, folder / "optim.pt")
    assert merge_checkpoints(tmp_path / "run", tmp_path / "out")["steps"] == [1000, 2000]


def test_a_single_snapshot_window_skips_the_open_block(tmp_path):
    folder = tmp_path / "window"
    folder.mkdir()
    for step in (10, 20):
        writers.window(folder, step, tensors(step))
    save_file({"x": torch.zeros(1)}, folder / "block-00000025-0123abcd.safetensors")
    (folder / "checkpoints.json").write_text("{}")
    assert merge_checkpoints(folder, tmp_path / "out")["steps"] == [10, 20]


def test_the_dtype_can_be_chosen_and_is_rounded_once(places, tmp_path):
    merge_checkpoints(places["pt"], tmp_path / "out", dtype="bfloat16")
    found = read(tmp_path / "out")[0]
    assert found["constant"].dtype == torch.bfloat16
    assert found["position_ids"].dtype == torch.int64
    del found["constant"]
    assert_is_merge(found, list(map(tensors, STEPS)), [1 / 3] * 3, torch.bfloat16)


def test_files_end_at_the_limit_and_have_an_index(places, tmp_path):
    merge_checkpoints(places["pt"], tmp_path / "whole")
    about = merge_checkpoints(places["pt"], tmp_path / "parts", largest_file=700)
    assert len(about["files"]) > 2
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(0).keys()
    whole, parts = read(tmp_path / "whole")[0], read(tmp_path / "parts")[0]
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_ties_are_written_once_and_load_merged_ties_them_again(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.embed = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    paths = [writers.lightning(tmp_path, step, Tied(step).state_dict()) for step in (1, 2)]
    merge_checkpoints(paths, tmp_path / "out")
    assert read(tmp_path / "out")[0].keys() == {"embed.weight"}
    model = Tied(3)
    load_merged(model, tmp_path / "out")
    oracle.assert_is_weighted_sum(
        model.head.weight.detach(), [Tied(s).head.weight.detach() for s in (1, 2)], [0.5, 0.5]
    )


def test_tensors_in_other_orders_of_memory_are_merged_by_index(tmp_path):
    states = [
        {"t": torch.randn(6, 4).t(), "c": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}
        for _ in range(2)
    ]
    paths = [writers.pt(tmp_path, step, state) for step, state in zip((1, 2), states, strict=True)]
    merge_checkpoints(paths, tmp_path / "out")
    for name, value in read(tmp_path / "out")[0].items():
        oracle.assert_is_weighted_sum(value, [state[name].contiguous() for state in states], [0.5, 0.5])


def test_a_merged_folder_can_be_merged_again_and_its_provenance_stays(places, tmp_path):
    first = merge_checkpoints(places["pt"], tmp_path / "merged-step-300")
    again = merge_checkpoints([tmp_path / "merged-step-300"], tmp_path / "again")
    assert again["sources"][0]["provenance"] == first
    assert again["step"] == 300


def states(**changed):
    plain = {"w": torch.ones(2, 2), "v": torch.ones(3)}
    return {name: value for name, value in (plain | changed).items() if value is not None}


@pytest.mark.parametrize(
    ("other", "pieces"),
    [
        ({"w": torch.ones(2, 3)}, ["step_1.pt", "w is float32 (2, 3) there and float32 (2, 2) here"]),
        ({"v": None}, ["v is missing", "on_missing='newest'"]),
        ({"extra": torch.ones(1)}, ["extra is only there"]),
        ({"w": torch.ones(2, 2, dtype=torch.float16)}, ["float16", "set dtype"]),
        ({"w": torch.tensor([[1.0, math.nan], [1.0, 1.0]])}, ["w of", "step_1.pt", "not finite"]),
    ],
    ids=["shape", "missing", "extra", "dtype", "nan"],
)
def test_another_model_is_refused_and_nothing_is_left(tmp_path, other, pieces):
    paths = [writers.pt(tmp_path, 1, states(**other)), writers.pt(tmp_path, 2, states(w=torch.zeros(2, 2)))]
    with pytest.raises(MergeInputError) as caught:
        merge_checkpoints(paths, tmp_path / "out")
    assert all(piece in str(caught.value) for piece in pieces), caught.value
    assert not (tmp_path / "out").exists()


def test_what_some_lack_comes_from_the_newest_where_that_is_asked_for(tmp_path):
    paths = [writers.pt(tmp_path, 1, states(v=None)), writers.pt(tmp_path, 2, states(w=torch.zeros(2, 2)))]
    about = merge_checkpoints(paths, tmp_path / "out", on_missing="newest")
    found = read(tmp_path / "out")[0]
    assert torch.equal(found["w"], torch.full((2, 2), 0.5))
    assert torch.equal(found["v"], torch.ones(3))
    assert about["copied"] == {"v": str(paths[1])}


def test_what_the_newest_lacks_is_not_dropped_from_the_model(tmp_path):
    paths = [writers.pt(tmp_path, 1, states()), writers.pt(tmp_path, 2, states(v=None))]
    for on_missing in ("error", "newest"):
        with pytest.raises(MergeInputError, match=r"v is only there.*or the newest if it is the one that is not whole"):
            merge_checkpoints(paths, tmp_path / "out", on_missing=on_missing)


def test_statistics_of_batch_norm_need_a_choice(tmp_path):
    paths = [
        writers.pt(tmp_path, s, torch.nn.BatchNorm1d(2).state_dict() | {"running_mean": torch.full((2,), s)})
        for s in (1.0, 3.0)
    ]
    with pytest.raises(UnsupportedModelError, match=r"running_mean.*newest.*average"):
        merge_checkpoints(paths, tmp_path / "out")
    merge_checkpoints(paths, tmp_path / "newest", newest=["*running_*"])
    merge_checkpoints(paths, tmp_path / "average", average=["*running_*"])
    assert read(tmp_path / "newest")[0]["running_mean"].tolist() == [3.0, 3.0]
    assert read(tmp_path / "average")[0]["running_mean"].tolist() == [2.0, 2.0]


def test_quantised_weights_are_refused(tmp_path):
    paths = [
        writers.pt(tmp_path, s, {"q": torch.ones(2, 2, dtype=torch.int8), "scale": torch.ones(2) * s}) for s in (1, 2)
    ]
    with pytest.raises(UnsupportedModelError, match=r"q is int8.*quantised"):
        merge_checkpoints(paths, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float8_e4m3fnuz])
def test_a_dtype_that_no_output_can_hold_is_refused_before_anything_is_written(tmp_path, dtype):
    state = {"w": torch.ones(2), "tone": torch.zeros(3).to(dtype)}
    paths = [writers.pt(tmp_path, step, state) for step in (1, 2)]
    with pytest.raises(UnsupportedModelError, match=r"tone is .*safetensors cannot hold.*float32"):
        merge_checkpoints(paths, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_an_overflow_of_the_output_is_refused(tmp_path):
    paths = [writers.pt(tmp_path, s, {"w": torch.tensor([70000.0, s])}) for s in (1, 2)]
    with pytest.raises(MergeInputError, match="float16"):
        merge_checkpoints(paths, tmp_path / "out", dtype="float16")


def test_a_base_gives_what_snapshots_lack(tmp_path):
    full = tensors(1)
    base = writers.lightning(tmp_path, 9, full)
    paths = [writers.window(tmp_path, s, {"embed.weight": torch.full((40, 16), float(s))}) for s in (1, 3)]
    merge_checkpoints(paths, tmp_path / "out", base=base)
    found = read(tmp_path / "out")[0]
    assert found.keys() == full.keys()
    assert torch.equal(found["embed.weight"], torch.full((40, 16), 2.0))
    assert torch.equal(found["a.weight"], full["a.weight"])


def test_averaged_optimizer_states_lie_beside_the_weights_and_counters_are_the_newest(tmp_path):
    paths = []
    for step in (1, 3):
        state = {"state": {0: {"exp_avg": torch.full((3,), float(step)), "step": torch.tensor(float(step))}}}
        paths.append(writers.lightning(tmp_path, step, states(), optimizer_states=[state]))
    merge_checkpoints(paths, tmp_path / "out", optimizer="average")
    from safetensors.torch import load_file

    found = load_file(tmp_path / "out/optimizer.safetensors")
    assert found["optimizer_states/0/0/exp_avg"].tolist() == [2.0] * 3
    assert found["optimizer_states/0/0/step"] == 3.0
    with pytest.raises(MergeInputError, match="negative"):
        merge_checkpoints(paths, tmp_path / "other", [-1.0, 2.0], optimizer="average")
    with pytest.raises(ConfigError, match="has none"):
        merge_checkpoints([writers.pt(tmp_path, 1, states())], tmp_path / "other", [1.0], optimizer="newest")


@pytest.mark.parametrize(
    ("options", "error", "pieces"),
    [
        ({"view": "smaa"}, ConfigError, ["smaa"]),
        ({"view": "sma4"}, ConfigError, ["needs 4", "3 were named"]),
        ({"view": [0.5, 0.4, 0.0]}, CoefficientError, ["sum to"]),
        ({"view": [0.5, 0.5]}, CoefficientError, ["2", "3"]),
        ({"dtype": "int8"}, ConfigError, ["int8", "'float32'"]),
        ({"steps": [1, 2]}, ConfigError, ["2 were given for 3"]),
        ({"view": "wsm", "steps": [1, 1, 2]}, ConfigError, ["do not give one step each"]),
        ({"device": "nowhere"}, ConfigError, ["nowhere"]),
        ({"largest_file": 0}, ConfigError, ["above 0"]),
    ],
    ids=str,
)
def test_options_that_do_not_fit_say_what_does(places, tmp_path, options, error, pieces):
    with pytest.raises(error) as caught:
        merge_checkpoints(places["pt"], tmp_path / "out", **({"view": "sma"} | options))
    assert all(piece in str(caught.value) for piece in pieces), caught.value


def test_what_exists_is_never_overwritten(places, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="never overwritten"):
        merge_checkpoints(places["pt"], tmp_path / "out")


def test_remote_files_are_read_through_fsspec(places, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in places["safetensors_file"]:
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    for path in places["dcp_folder"]:
        memory.put(str(path), f"/bucket/dcp/{path.name}", recursive=True)
    merge_checkpoints([f"memory://bucket/{path.name}" for path in places["safetensors_file"]], tmp_path / "files")
    merge_checkpoints("memory://bucket/dcp", tmp_path / "folders")
    merge_checkpoints("memory://bucket/*.safetensors", tmp_path / "pattern")
    for out in ("files", "folders", "pattern"):
        assert_is_merge(read(tmp_path / out)[0], list(map(tensors, STEPS)), [1 / 3] * 3)


@pytest.mark.parametrize(
    ("content", "error", "pieces"),
    [
        ({"w": torch.eye(3).to_sparse()}, CheckpointError, ["w is", "sparse"]),
        ({"__metadata__": torch.ones(1)}, CheckpointError, ["__metadata__"]),
        ({"w": torch.ones(3, 3).to(torch.float8_e4m3fn)}, UnsupportedModelError, ["quantised"]),
    ],
    ids=["sparse", "reserved name", "float8"],
)
def test_tensors_that_no_merge_can_hold_are_named(tmp_path, content, error, pieces):
    with pytest.raises(error) as caught:
        merge_checkpoints([writers.pt(tmp_path, 1, content)], tmp_path / "out")
    assert all(piece in str(caught.value) for piece in pieces), caught.value


def test_checkpoints_of_compiled_and_plain_models_are_of_one_model(tmp_path):
    plain = writers.lightning(tmp_path, 1, {"net.w": torch.ones(2), "net.v": torch.ones(1)})
    compiled = writers.lightning(tmp_path, 2, {"net._orig_mod.w": torch.zeros(2), "net._orig_mod.v": torch.ones(1)})
    merge_checkpoints([plain, compiled], tmp_path / "out")
    assert read(tmp_path / "out")[0]["net.w"].tolist() == [0.5, 0.5]
