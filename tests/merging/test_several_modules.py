"""Several modules under one merger: pipeline stages, a GAN, a generator and its average."""

import copy

import pytest
import torch
from torch import nn

from pretrain_merge import RollingMerger
from pretrain_merge.errors import UnsupportedModelError


class Stage(nn.Module):
    """Part of a pipeline, as torchtitan cuts them: global names, and a table of its own that is not saved."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleDict({str(number): nn.Linear(3, 3) for number in layers})
        self.register_buffer("rope", torch.zeros(2), persistent=False)

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


def fill(module, step):
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.fill_(step + number / 8)


def test_pipeline_stages_keep_the_names_of_the_one_model_that_they_are():
    stages = [Stage([0, 1]), Stage([2])]
    merger = RollingMerger(window=3, every=1)
    for step in range(1, 4):
        for stage in stages:
            fill(stage, step)
        merger.observe(stages, step)
    assert sorted(merger.tensors(stages)) == [
        f"layers.{number}.{name}" for number in range(3) for name in ("bias", "weight")
    ]
    with merger.merged(stages, "sma"):
        assert stages[1].layers["2"].weight[0, 0] == 2.0
        assert stages[0].layers["1"].bias[0] == 2.0 + 3 / 8
    assert stages[1].layers["2"].weight[0, 0] == 3.0


def test_parts_that_share_names_get_their_position_or_the_names_that_they_are_given():
    parts = [nn.Linear(2, 1), nn.Linear(2, 1)]
    merger = RollingMerger(window=3, every=1)
    assert list(merger.tensors(parts)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    named = {"generator": parts[0], "critic": parts[1]}
    assert list(merger.tensors(named)) == ["generator.weight", "generator.bias", "critic.weight", "critic.bias"]


def test_a_filter_by_name_leaves_a_part_raw():
    parts = {"generator": nn.Linear(2, 1), "critic": nn.Linear(2, 1)}
    merger = RollingMerger(window=3, every=1, parameters={"exclude": ["critic.*"]})
    for step in range(1, 4):
        for part in parts.values():
            fill(part, step)
        merger.observe(dict(parts), step)  # another mapping of the same modules
    with merger.merged(parts, "sma"):
        assert parts["generator"].weight[0, 0] == 2.0
        assert parts["critic"].weight[0, 0] == 3.0


def test_an_average_that_the_loop_moves_itself_is_merged_where_it_is_named():
    generator = nn.Linear(2, 1)
    average = copy.deepcopy(generator).requires_grad_(False)
    parts = {"generator": generator, "average": average}
    merger = RollingMerger(window=3, every=1)
    merger.watch(parts, also=["average.*"])
    for step in range(1, 4):
        fill(generator, step)
        fill(average, 10 * step)
        merger.observe(parts, step)
    with merger.merged(parts, "sma"):
        assert generator.weight[0, 0] == 2.0
        assert average.weight[0, 0] == 20.0
    assert average.weight[0, 0] == 30.0
    with pytest.raises(UnsupportedModelError, match=r"also: 'averge\.\*' matches no parameter"):
        merger.watch(parts, also=["averge.*"])


def test_a_gan_whose_halves_are_frozen_by_turns_is_merged_whole_and_resumes(tmp_path):
    def run(steps, merger=None, state=None):
        torch.manual_seed(0)
        parts = {"generator": nn.Linear(2, 2), "critic": nn.Linear(2, 1)}
        optimizers = {name: torch.optim.SGD(part.parameters(), lr=0.1) for name, part in parts.items()}
        merger = RollingMerger(window=4, every=1, window_folder=tmp_path)
        merger.watch(parts, optimizers.values())
        if state is not None:
            merger.load_state_dict(state["merger"])
            for name, part in parts.items():
                part.load_state_dict(state[name])
        for step in steps:
            torch.manual_seed(step)
            trains = ("generator", "critic")[step % 2]
            for name, part in parts.items():
                part.requires_grad_(name == trains)
            optimizers[trains].zero_grad()
            parts["critic"](parts["generator"](torch.randn(8, 2))).mean().backward()
            optimizers[trains].step()
            merger.observe(parts, step, lr=[0.1, 0.1])
        with merger.merged(parts, "sma") as recipe:
            merged = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        state = {"merger": merger.state_dict()} | {name: part.state_dict() for name, part in parts.items()}
        merger.close()
        return merged, recipe, state

    merged, recipe, _ = run(range(1, 9))
    _, _, state = run(range(1, 6))
    again, recipe_again, _ = run(range(6, 9), state=state)
    assert recipe == recipe_again
    assert recipe.steps == (5, 6, 7, 8)
    for name in merged:
        assert all(torch.equal(merged[name][key], again[name][key]) for key in merged[name])
    assert merged["generator"].keys() == {"weight", "bias"}


@pytest.mark.parametrize("given", [[], {}, "model", [nn.Linear(1, 1), 3], {1: nn.Linear(1, 1)}], ids=str)
def test_what_is_no_module_is_refused_with_what_is_allowed(given):
    with pytest.raises(UnsupportedModelError, match="Allowed: a module, or a sequence of modules or a mapping"):
        RollingMerger(window=3, every=1).observe(given, 1)


def test_wrappers_of_each_part_do_not_change_its_names():
    model = nn.Linear(2, 1)
    merger = RollingMerger(window=3, every=1)
    compiled = torch.compile(model, backend="eager")
    assert list(merger.tensors({"a": compiled})) == list(merger.tensors({"a": model})) == ["a.weight", "a.bias"]
