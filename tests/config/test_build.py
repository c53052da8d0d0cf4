"""One schema, whatever the door: what is accepted, and one clear error for everything else."""

import dataclasses
import inspect
import math
from contextlib import suppress

import pytest
from harness import strategies
from harness.configs import message_of
from hypothesis import given, settings
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import DictConfig, OmegaConf

from pretrain_merge import ModelMerging, RollingMerger
from pretrain_merge.config import (
    MergeConfig,
    WindowConfig,
    build,
    did_you_mean,
    parse_views,
)
from pretrain_merge.errors import ConfigError

YAML = """
window: 6
every: 8B tokens
start: 100B tokens
merge_every: 40B tokens
views: [sma, {name: cos4, kind: decay, shape: cosine, last: 4}]
average: block
sample_every: 5
lr_tolerance: 0.01
breaks: {lr: off}
merge_buffers: ["*.router.bias"]
batch_norm: live
tokens_per_batch: 65536
save: {every: 100B tokens, keep: 3, best: val_loss, mode: max, at_end: true}
validate: false
name: long
"""


def test_the_callback_has_exactly_the_keys_and_defaults_of_the_schema():
    parameters = inspect.signature(ModelMerging).parameters
    keys = {item.name for item in dataclasses.fields(MergeConfig)}
    assert set(parameters) - {"evaluators", "options"} == keys
    assert ModelMerging().config == MergeConfig()
    for item in dataclasses.fields(MergeConfig):
        given_default, default = parameters[item.name].default, getattr(MergeConfig(), item.name)
        if not isinstance(default, list | dict) and not dataclasses.is_dataclass(default):  # () and None there
            assert given_default == default, item.name


def test_the_callback_documents_every_key():
    for item in dataclasses.fields(MergeConfig):
        assert f"\n        {item.name}: " in ModelMerging.__doc__


def test_every_key_is_documented_in_its_schema():
    for schema in (WindowConfig, MergeConfig):
        own = set(schema.__annotations__)
        assert {name for name in own if f"\n        {name}: " in schema.__doc__} == own


def test_python_yaml_file_dict_and_omegaconf_mean_the_same(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(YAML)
    loaded = OmegaConf.load(path)
    plain = OmegaConf.to_container(loaded)
    wanted = ModelMerging(**plain).config
    assert wanted != MergeConfig()
    for source in (path, str(path), loaded, plain):
        assert ModelMerging.from_config(source).config == wanted


def test_a_branch_of_a_larger_configuration_may_refer_to_the_rest_of_it():
    whole = OmegaConf.create({"batch": 8, "merge": {"tokens_per_batch": "${batch}", "window": 4}})
    assert ModelMerging.from_config(whole.merge).config.tokens_per_batch == 8


def test_p12_no_omegaconf_object_is_left_in_the_configuration():
    views, save = OmegaConf.create(["sma", {"name": "x", "kind": "sma"}]), OmegaConf.create({})
    config = ModelMerging(views=views, save=save).config
    assert all(type(view) in (str, dict) for view in config.views)
    assert not any(isinstance(value, DictConfig) for value in vars(config).values())


def test_a_python_function_may_be_a_shape_and_count_tokens():
    view = {"name": "half", "kind": "decay", "shape": lambda t: 1 - t / 2}
    merging = ModelMerging(views=[view], tokens_per_batch=len)
    assert merging.config.views[0]["shape"](1.0) == 0.5


def test_from_config_takes_what_yaml_cannot_hold():
    assert ModelMerging.from_config({"window": 4}, tokens_per_batch=len, evaluators={}).config.window == 4


def test_rolling_merger_takes_the_keys_of_the_window_and_no_others():
    assert RollingMerger(window=4).window.size == 4
    with pytest.raises(ConfigError, match=r"^save: unknown key"):
        RollingMerger(save={"best": "val_loss"})


def test_tuples_are_lists():
    assert ModelMerging(views=("sma", "wma")).config.views == ["sma", "wma"]


@pytest.mark.parametrize(
    ("values", "pieces"),
    [
        ({"windw": 3}, ["windw: unknown key", "did you mean 'window'?", "Known keys: window, every"]),
        ({"zzz": 3}, ["zzz: unknown key. Known keys:"]),
        ({5: 3}, ["5: unknown key. Known keys:"]),
        ({"save": {"evry": 5}}, ["save.evry: unknown key", "did you mean 'every'?", "keep, best, mode, raw, at_end"]),
        ({"breaks": {"distrust": -1}}, ["breaks.distrust: -1", "0 and up"]),
        ({"breaks": {"rate": False}}, ["breaks.rate: unknown key", "Known keys: lr, spikes, distrust"]),
        ({"save": "best"}, ["save: 'best' is not a mapping", "every, keep, best, mode, raw, at_end"]),
        ({"breaks": False}, ["breaks: False is not a mapping", "Allowed: a mapping with keys of lr, spikes, distrust"]),
        ({"window": "many"}, ["window: ", "'many'", "Integer"]),
        ({"window": 2.5}, ["window: ", "'2.5'", "Integer"]),
        ({"window": True}, ["window: ", "'True'", "Integer"]),
        ({"window": None}, ["window: ", "'None'", "int"]),
        ({"window": math.inf}, ["window: ", "'inf'", "Integer"]),
        ({"window": 1}, ["window: 1 is out of range", "Allowed: an integer from 2 to 10000"]),
        ({"window": 10**9}, ["window: 1000000000 is out of range", "from 2 to 10000"]),
        ({"window": "???"}, ["window: '???' stands for a value that must be given", "drop the key"]),
        ({"window": "${nowhere}"}, ["window: ", "nowhere"]),
        ({"every": "5 parsecs"}, ["every: '5 parsecs' is not a quantity", "'8B tokens'"]),
        ({"every": None}, ["every: None is not a quantity"]),
        ({"every": 0}, ["every: 0 is not a quantity", "at least 1"]),
        ({"start": -1}, ["start: -1 is not a quantity", "at least 0"]),
        ({"merge_every": "0 tokens"}, ["merge_every: '0 tokens' is not a quantity"]),
        ({"save": {"every": "often"}}, ["save.every: 'often' is not a quantity"]),
        ({"save": {"keep": 0}}, ["save.keep: 0 is out of range", "at least 1"]),
        ({"save": {"mode": "lowest"}}, ["save.mode: 'lowest' is out of range", "min or max"]),
        ({"average": "mean"}, ["average: 'mean' is out of range", "last or block"]),
        ({"batch_norm": "drop"}, ["batch_norm: 'drop' is out of range", "refuse or live or merge"]),
        ({"store": "tape"}, ["store: 'tape' is out of range", "auto or device or host or disk"]),
        ({"slot_dtype": "int8"}, ["slot_dtype: 'int8' is out of range", "null or float32 or bfloat16 or float16"]),
        ({"stateful_data": "yes"}, ["stateful_data: 'yes' is out of range", "refuse or iterate"]),
        ({"sample_every": 0}, ["sample_every: 0 is out of range", "at least 1"]),
        ({"lr_tolerance": -0.1}, ["lr_tolerance: -0.1 is out of range", "from 0 to 1"]),
        ({"lr_tolerance": math.nan}, ["lr_tolerance: nan is out of range", "from 0 to 1"]),
        ({"tokens_per_batch": 0}, ["tokens_per_batch: 0 is neither", "at least 1", "callable"]),
        ({"tokens_per_batch": True}, ["tokens_per_batch: True is neither"]),
        ({"name": "a/b"}, ["name: 'a/b' is out of range", "letters, digits"]),
        ({"name": "raw metrics"}, ["name: 'raw metrics' is out of range"]),
        ({"validate": "maybe"}, ["validate: ", "'maybe'", "bool"]),
        ({"views": "sma"}, ["views: 'sma' is not a list", "Allowed: a list, such as ['sma']"]),
        ({"merge_buffers": "*.bias"}, ["merge_buffers: '*.bias' is not a list", "Allowed: a list"]),
        ({"views": []}, ["views: [] must be at least one view"]),
        ({"views": ["sma", "sma"]}, ["views: ['sma', 'sma']", "a name of its own"]),
        ({"views": ["smaa"]}, ["views[0]: 'smaa' is not a view", "did you mean 'sma'?", "Known kinds: sma, wma"]),
        ({"views": ["sma" + "9" * 5000]}, ["views[0]: 'sma999", "is not a view"]),
        ({"views": ["wma", 5]}, ["views[1]: 5 is not a view", "Allowed: a kind ('sma')"]),
        ({"views": [{"kind": "sma"}]}, ["views[0]: ", "is not a view", "a mapping with a `name`"]),
        ({"views": [{"name": "a b", "kind": "sma"}]}, ["views[0]: ", "is not a view", "letters, digits"]),
        ({"views": [{"name": "raw", "kind": "sma"}]}, ["views[0]: the name 'raw' is taken", "choose another"]),
        ({"views": [{"name": "forecast", "kind": "sma"}]}, ["views[0]: the name 'forecast' is taken"]),
        ({"views": [{"name": "x", "kind": "smaa"}]}, ["views[0]: unknown kind: 'smaa'", "sma, wma, ema"]),
        ({"views": [{"name": "x", "kind": "ema", "alhpa": 0.1}]}, ["views[0]: ", "'alhpa'", "alpha"]),
        ({"views": [{"name": "x", "kind": "ema", "alpha": 1.5}]}, ["views[0]: ", "1.5"]),
        ({"views": [{"name": "x", "kind": "decay", "shape": "cosin"}]}, ["views[0]: ", "'cosin'", "cosine"]),
        ({"views": [{"name": "x", "kind": "sma", "last": "4"}]}, ["views[0].last: '4' is not a number", "2 to 10"]),
        ({"views": [{"name": "x", "kind": "sma", "last": True}]}, ["views[0].last: True is not a number"]),
        ({"views": ["sma1"]}, ["views[0]: view 'sma1' needs 1", "Allowed: 2 to 10"]),
        ({"views": ["sma11"]}, ["views[0]: view 'sma11' needs 11 snapshots and the window holds 10", "raise `window`"]),
        ({"views": [{"name": "x", "kind": "custom", "weights": [1, 3]}]}, ["views[0]: ", "sum to 4.0", "[0.25, 0.75]"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_said_with_the_path_of_its_key(values, pieces):
    message = message_of(values)
    assert message.startswith(pieces[0])
    for piece in pieces:
        assert piece in message


@pytest.mark.parametrize(
    "arguments",
    [
        {"windw": 3},
        {"window": 1},
        {"views": "sma"},
        {"views": None},
        {"merge_buffers": "*.bias"},
        {"save": "best"},
        {"save": {"evry": 5}},
        {"breaks": True},
    ],
    ids=str,
)
def test_every_door_gives_the_same_error(arguments):
    message = message_of(arguments)
    for door in (lambda: ModelMerging(**arguments), lambda: ModelMerging.from_config(arguments)):
        with pytest.raises(ConfigError) as caught:
            door()
        assert str(caught.value) == message
    instantiate = pytest.importorskip("hydra.utils").instantiate
    with pytest.raises(Exception, match="Error in call to target") as caught:
        instantiate({"_target_": "pretrain_merge.ModelMerging", **arguments})
    assert str(caught.value.__cause__) == message


@pytest.mark.parametrize("evaluators", [{"norm": 3}, [len], "norm"])
def test_evaluators_that_are_no_functions_by_name_are_refused(evaluators):
    with pytest.raises(ConfigError, match=r"evaluators: .* does not name functions\. Allowed: a mapping from names"):
        ModelMerging(evaluators=evaluators)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"windw": 3}, "windw: unknown key; did you mean 'window'?"),
        ({"window": "five"}, "window: Value 'five' of type 'str' could not be converted"),
        ({"window": 0}, "window: 0 is out of range. Allowed: an integer from 2 to 10000."),
        ({"save": {"bst": "val_loss"}}, "save.bst: unknown key; did you mean 'best'?"),
        ({"views": ["smaa"]}, "views"),
    ],
)
def test_p40_lightning_cli_ends_with_our_sentence_first(tmp_path, capsys, keys, sentence):
    cli = pytest.importorskip("lightning.pytorch.cli")
    callback = {"class_path": "pretrain_merge.ModelMerging", "init_args": keys}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml({"trainer": {"callbacks": [callback]}}))
    with pytest.raises(SystemExit):
        cli.LightningCLI(BoringModel, args=["--config", str(tmp_path / "config.yaml")], run=False)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert f"\nerror: {sentence}" in said


def test_blocks_that_no_sample_falls_into_are_refused():
    assert message_of({"average": "block", "every": 10, "sample_every": 11}) == (
        "sample_every: 11 steps, and a block has 10 (`every`), so most would be empty. Allowed: 1 to 10."
    )
    assert build(MergeConfig, {"average": "block", "every": "10 tokens", "sample_every": 11}).sample_every == 11


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("- sma\n- wma\n", ["is not a mapping of keys to values"]),
        ("window: [", ["merge.yaml: not YAML", "Give a YAML file"]),
        ("window: 4\nwindow: 5\n", ["merge.yaml: not YAML", "duplicate key"]),
        ("window: ${save.keep\n", ["window"]),
        ("window: 4\nsave:\n", ["save: None is not a mapping"]),
        ("window: !!python/object/apply:os.getpid []\n", ["merge.yaml: not YAML"]),  # no code is run
        ("views: &a [*a]\n", ["merge.yaml: a value contains itself"]),
    ],
)
def test_a_file_that_is_no_configuration_says_so(tmp_path, text, pieces):
    path = tmp_path / "merge.yaml"
    path.write_text(text)
    message = message_of(path)
    for piece in pieces:
        assert piece in message


def test_a_missing_file_a_folder_and_bytes_are_named(tmp_path):
    binary = tmp_path / "model.ckpt"
    binary.write_bytes(b"\x80\x02\xff\x00")
    for path in (tmp_path / "nowhere.yaml", tmp_path, binary):
        assert str(path) in message_of(path)


def test_an_empty_file_means_all_defaults(tmp_path):
    (tmp_path / "merge.yaml").touch()
    assert build(MergeConfig, tmp_path / "merge.yaml") == MergeConfig()


def test_a_value_that_contains_itself_says_so():
    endless = []
    endless.append(endless)
    for values in ({"views": endless}, {"save": {"every": endless}}, {"tokens_per_batch": endless}):
        assert "a value contains itself" in message_of(values)


@settings(max_examples=60, deadline=None)
@given(strategies.configs)
def test_no_configuration_raises_an_error_that_is_not_ours(values):
    try:
        config = build(MergeConfig, values)
    except ConfigError:
        return
    assert config.window >= 2
    assert len(parse_views(config)) == len(config.views)


@settings(max_examples=50, deadline=None)
@given(strategies.anything)
def test_no_object_raises_an_error_that_is_not_ours_when_taken_for_a_configuration(value):
    if not isinstance(value, str):  # text is a path, see above
        with suppress(ConfigError):
            build(MergeConfig, value)


def test_the_nearest_name_is_offered_only_where_one_is_near():
    assert did_you_mean("windw", ["window", "every"]) == "; did you mean 'window'?"
    assert did_you_mean("zzz", ["window", "every"]) == "."
