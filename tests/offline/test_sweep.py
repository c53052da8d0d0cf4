"""A sweep says of a run's checkpoints what the callback would have said while it trained."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from offline import swept, writers
from safetensors.torch import load_file
from torch import nn

from pretrain_merge import forecast_anneal, sweep_checkpoints
from pretrain_merge.errors import CheckpointError, ConfigError, EvaluationError, MergeInputError, PretrainMergeError
from pretrain_merge.offline import mapped
from pretrain_merge.offline.sweep import plan_sweep
from pretrain_merge.records import read_records

KEYS = {"window": swept.WINDOW, "views": swept.VIEWS, "intervals": [1]}
DRAWN = {"drawn"}  # the one metric of the model that depends on where the run's random numbers are


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return swept.train(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    """A sweep of its checkpoints, with the places that were mapped."""
    mapped_places = []
    real = mapped.MappedTensors.__init__

    def counted(self, source, files):
        mapped_places.append(source.place)
        real(self, source, files)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped.MappedTensors, "__init__", counted)
        out = tmp_path_factory.mktemp("sweep") / "swept"
        found = sweep_checkpoints([run / "checkpoints"], out, swept.evaluation(), **KEYS)
    assert read_records(out / "merges.jsonl") == list(found.records)
    return found, mapped_places


def without_drawn(metrics):
    return {name: value for name, value in metrics.items() if name not in DRAWN}


def test_a_sweep_of_checkpoints_measures_what_the_live_callback_measured(run, found):
    live, records = read_records(run / "merges.jsonl"), found[0].records
    assert len(live) == len(records) == 8
    for own, record in zip(live, records, strict=True):
        assert (own.step, own.recipes, own.since, own.lr) == (record.step, record.recipes, record.since, record.lr)
        assert without_drawn(own.raw) == without_drawn(record.raw)
        for view in own.views:
            assert without_drawn(own.views[view]) == without_drawn(record.views[view])
        assert own.spread == record.spread
    for kind, steps in (("forecast", 40), ("nowcast", 20)):
        ours, theirs = (forecast_anneal(of, steps=steps, kind=kind) for of in (live, records))
        assert replace(ours, basis="") == replace(theirs, basis="")


def test_sparser_merges_and_views_of_a_part_leave_forecasts_and_spread_as_the_run_has_them(run, tmp_path):
    """`sma3-every2` spans what `sma5` does, over fewer checkpoints; and neither is over all of them at first."""
    live = read_records(run / "merges.jsonl")
    found = sweep_checkpoints(
        [run / "checkpoints"],
        tmp_path / "swept",
        swept.evaluation(),
        **KEYS | {"views": ["sma3", "sma5"], "intervals": [1, 2]},
    ).records
    assert "sma3-every2" in found[-1].recipes
    of_both = [
        replace(
            record,
            views={view: record.views[view] for view in ("sma3", "sma5") if view in record.views},
            recipes={view: record.recipes[view] for view in ("sma3", "sma5") if view in record.recipes},
        )
        for record in live
    ]
    assert [record.spread for record in found] == [record.spread for record in live]
    assert {bool(record.why_since) for record in found} == {True}
    for kind, steps in (("forecast", 40), ("nowcast", 20)):
        ours, theirs = (forecast_anneal(of, steps=steps, kind=kind) for of in (found, of_both))
        assert replace(ours, basis="") == replace(theirs, basis="")


def test_every_candidate_draws_the_same_random_numbers(found):
    records = found[0].records
    drawn = {metrics["drawn"] for record in records for metrics in (record.raw, *record.views.values())}
    assert len(drawn) == 1


def test_each_checkpoint_is_mapped_once_however_many_merges_it_is_in(found):
    sweep, places = found
    assert len(places) == len(set(places))
    assert len(places) == len({step for record in sweep.records for step in record.recipes["sma"].steps})


CONFIG = {
    "seed_everything": 7,
    "trainer": {"max_steps": 100, "logger": True, "callbacks": None, "precision": "32-true", "accelerator": "cpu"},
    "model": {"class_path": "offline.swept.Model", "init_args": {"width": 16}},
    "data": {"class_path": "offline.swept.Data"},
    "ckpt_path": None,
}


@pytest.mark.parametrize("way", ["config.yaml", "offline.swept:evaluation"])
def test_a_way_that_is_named_measures_what_its_objects_do(run, tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(json.dumps(CONFIG))
    keys = KEYS | {"merge_every": 50}
    named = sweep_checkpoints([run / "checkpoints"], "named", way, **keys)
    given = sweep_checkpoints([run / "checkpoints"], "given", swept.evaluation(), **keys)
    assert [without_drawn(record.views["sma"]) for record in named.records] == [
        without_drawn(record.views["sma"]) for record in given.records
    ]
    assert not list(tmp_path.glob("*lightning*"))


def values(folder, steps):
    """A folder of checkpoints whose one weight is known."""
    for step in steps:
        writers.safetensors_file(folder, step, {"w": torch.tensor([float(step), 1.0])})


def first_weight(folder):
    return {"val_loss": load_file(folder / "model.safetensors")["w"][0].item()}


def test_a_function_of_a_folder_gets_each_merge_once(tmp_path):
    values(tmp_path, range(100, 900, 100))
    seen = []

    def evaluate(folder):
        seen.append(folder)
        assert json.loads((folder / "provenance.json").read_text())["step"]
        return first_weight(folder)

    found = sweep_checkpoints([tmp_path], tmp_path / "out", evaluate, window=8, merge_every=200, span=None)
    last = found.records[-1]
    assert last.raw == {"val_loss": 800.0}
    assert {view: metrics["val_loss"] for view, metrics in last.views.items()} == pytest.approx(
        {
            "sma2": 750.0, "sma4": 650.0, "sma8": 450.0, "sma": 450.0, "wsm": 800 - 100 * mean_age(last),
            "sma2-every2": 700.0, "sma4-every2": 500.0,
        }
    )  # fmt: skip
    assert last.recipes["sma4-every2"].steps == (200, 400, 600, 800)
    # at step 200 the mean of all is that of two, at step 400 that of four: evaluated once
    assert len(seen) == 3 + 5 + 6 + 7
    assert len(seen) == plan_sweep([tmp_path], tmp_path / "other", window=8, merge_every=200, span=None).evaluations
    assert not any(folder.exists() for folder in seen)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["merges.jsonl", "plan.json", "sweep.json"]


def mean_age(record):
    return sum(
        (8 - index) * weight for index, weight in enumerate(record.recipes["wsm"].coefficients, 1)
    )  # fmt: skip


SCRIPT = """
import json, struct, sys
data = open(sys.argv[1] + "/model.safetensors", "rb").read()
(length,) = struct.unpack("<Q", data[:8])
start = json.loads(data[8:8 + length])["w"]["data_offsets"][0] + 8 + length
print("loading", sys.argv[1])
print(json.dumps({"val_loss": struct.unpack("<f", data[start:start + 4])[0]}))
"""


def test_a_command_is_given_a_folder_and_its_last_line_is_read(tmp_path):
    values(tmp_path, (100, 200))
    (tmp_path / "evaluate it.py").write_text(SCRIPT)
    command = f"{sys.executable} -S '{tmp_path}/evaluate it.py'"
    found = sweep_checkpoints([tmp_path], tmp_path / "out", command, views=["sma"])
    assert (found.records[0].raw, found.records[0].views) == ({"val_loss": 200.0}, {"sma": {"val_loss": 150.0}})
    again = sweep_checkpoints([tmp_path], tmp_path / "again", f"{command} {{folder}} more", views=["sma"])
    assert again.records == found.records


@pytest.mark.parametrize(
    ("words", "piece"),
    [
        ("import sys; sys.exit('no GPU')", "no GPU"),
        ("print('val_loss: 3')", "val_loss: 3"),
        ("print('[1]')", r"\[1\]"),
        ("", "JSON object"),
        ("""print('{"val_loss": "low"}')""", "low"),
        ("print('{}')", "no metric"),
        ("print('[' * 100000)", "JSON object"),
    ],
)
def test_a_command_that_fails_is_shown_with_what_it_said(tmp_path, words, piece):
    values(tmp_path, (100, 200))
    (tmp_path / "evaluate.py").write_text(words)
    with pytest.raises(EvaluationError, match=piece):
        sweep_checkpoints([tmp_path], tmp_path / "out", f"{sys.executable} -S {tmp_path}/evaluate.py", views=["sma"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix not in (".safetensors", ".py")) == []


class Wrapped(swept.Model):
    """Holds the model under a name of its own, ties two weights, and shows copies in its state dict."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 1)
        self.head.weight = self.net[2].weight

    def state_dict(self, *arguments, **options):
        return {name: value.clone() for name, value in super().state_dict(*arguments, **options).items()}


@pytest.mark.parametrize("module", [Wrapped, swept.Model])
def test_tensors_reach_a_module_by_its_own_names(run, tmp_path, module):
    if module is Wrapped:
        for step in (90, 100):
            state = torch.load(run / f"checkpoints/step={step}.ckpt")["state_dict"]
            state |= {"head.weight": state["net.2.weight"], "head.bias": torch.zeros(1)}
            writers.lightning(tmp_path, step, state)
        places = list(tmp_path.glob("*.ckpt"))
    else:  # files of the network alone
        for step in (90, 100):
            state = torch.load(run / f"checkpoints/step={step}.ckpt")["state_dict"]
            inner = {name.removeprefix("net."): value for name, value in state.items() if name != "seen"}
            writers.safetensors_file(tmp_path, step, inner)
        places = list(tmp_path.glob("*.safetensors"))
    data = swept.Data().val_dataloader()
    own = sweep_checkpoints([run / "checkpoints"], tmp_path / "own", (swept.Model(), data), window=2, views=["sma2"])
    found = sweep_checkpoints(places, tmp_path / "found", (module(), data), window=2, views=["sma2"])
    assert found.records[-1].views["sma2"]["val_loss"] == own.records[-1].views["sma2"]["val_loss"]


def test_a_module_of_another_size_is_refused_before_anything_is_measured(run, tmp_path):
    with pytest.raises(MergeInputError, match=r"net\.0\.weight is float32 \(16, 8\) .* and \(17, 8\)"):
        sweep_checkpoints([run / "checkpoints"], tmp_path / "out", (swept.Model(17), swept.Data()), **KEYS)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_a_run_that_diverged_is_named(run, tmp_path):
    places = [run / "checkpoints/step=80.ckpt", run / "checkpoints/step=90.ckpt"]
    content = torch.load(run / "checkpoints/step=100.ckpt")
    content["state_dict"]["net.0.bias"][3] = float("nan")
    torch.save(content, tmp_path / "step=100.ckpt")
    with pytest.raises(MergeInputError, match=r"net\.0\.bias of .*step=100\.ckpt is not finite"):
        sweep_checkpoints([*places, tmp_path / "step=100.ckpt"], tmp_path / "out", swept.evaluation(), **KEYS)


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        ({"window": 1}, "window"),
        ({"views": ["mean"]}, "views"),
        ({"views": ["sma20"]}, "sma20"),
        ({"intervals": [0]}, "intervals"),
        ({"intervals": [2], "views": ["sma"]}, "intervals"),
        ({"intervals": []}, "intervals"),
        ({"every": "2e6 samples"}, "every: '2e6 samples'"),
        ({"merge_every": "1M tokens"}, "merge_every"),
        ({"merge_every": 100_000}, "merge_every"),
        ({"start": 800}, "only 1 of them"),
        ({"breaks": {"rate": False}}, "breaks"),
        ({"metric": "accuracy"}, "metric: 'accuracy'"),
        ({"steps": [1]}, "steps: 1 were given for 8"),
        ({"newest": "*bias"}, "newest"),
        ({"evaluate": "nowhere.to.be:found"}, "nowhere"),
        ({"evaluate": "offline.swept:nothing"}, "nothing"),
        ({"evaluate": "offline.swept:number"}, "returned a int"),
        ({"evaluate": ""}, "command"),
        ({"evaluate": "'unclosed"}, "quotes"),
        ({"evaluate": (nn.Linear(2, 2), [])}, "Linear is not a LightningModule"),
        ({"evaluate": (1, 2, 3, 4)}, "4 things"),
    ],
)
def test_an_option_that_is_none_is_refused_and_leaves_nothing(tmp_path, options, piece):
    values(tmp_path, range(100, 900, 100))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PretrainMergeError) as caught:
        sweep_checkpoints([tmp_path], tmp_path / "out", **{"evaluate": first_weight} | options)
    assert piece in str(caught.value)
    assert isinstance(caught.value, ConfigError)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("content", ["nonsense: [", "model: {lr: 3}", "[]", "model: {class_path: no.such.Class}", "\0"])
def test_a_configuration_that_names_no_classes_is_refused(tmp_path, content):
    values(tmp_path, (100, 200))
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(PretrainMergeError, match=r"config\.yaml"):
        sweep_checkpoints([tmp_path], tmp_path / "out", str(tmp_path / "config.yaml"), views=["sma"])
    assert not (tmp_path / "out").exists()


def test_checkpoints_without_steps_or_with_one_twice_are_refused(tmp_path):
    places = [tmp_path / "run/a.pt", tmp_path / "run/b.pt"]
    (tmp_path / "run").mkdir()
    for place in places:
        torch.save({"w": torch.ones(2)}, place)
    with pytest.raises(ConfigError, match=r"a\.pt is of step None"):
        sweep_checkpoints(places, tmp_path / "out", first_weight)
    with pytest.raises(ConfigError, match="both of step 5"):
        sweep_checkpoints(places, tmp_path / "out", first_weight, steps=[5, 5])
    with pytest.raises(ConfigError, match="of step -5"):
        sweep_checkpoints(places, tmp_path / "out", first_weight, steps=[-5, 5])
    with pytest.raises(CheckpointError, match="exists"):
        sweep_checkpoints(places, tmp_path, first_weight, steps=[4, 5])
