"""Raw comes back from a swap, whatever an evaluator exchanged: the same objects, memory, bits and versions."""

import copy

import pytest
import torch
from harness import oracles
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from pretrain_merge import RollingMerger
from pretrain_merge.errors import UnsupportedModelError, WindowNotReadyError


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2


def run(steps=range(1, 9), *, lr=0.1, build=lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)), **options):
    """A trained model, its merger, and the weights of every step in float64."""
    torch.manual_seed(0)
    module = build()
    merging = RollingMerger(**{"window": 3, "every": 2} | options)
    return module, merging, train(module, merging, steps)


def train(module, merging, steps):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    trajectory = {}
    for step in steps:
        optimizer.zero_grad()
        module(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        merging.observe(module, step, lr=0.1)
        trajectory[step] = {name: p.detach().double().numpy().copy() for name, p in module.named_parameters()}
    return trajectory


def facts(module):
    """Everything that optimizers, CUDA graphs, FSDP and graphs that are kept alive hold on to."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {
        name: (id(t), t.data_ptr(), t.dtype, t.shape, t.stride(), t._version, t.detach().clone().view(-1).tolist())
        for name, t in named
    }


def assert_is_mean(module, trajectory, steps):
    for name, parameter in module.named_parameters():
        snapshots = [trajectory[step][name] for step in steps]
        error = abs(parameter.detach().double().numpy() - oracles.merged(snapshots, [1 / len(steps)] * len(steps)))
        assert (error <= oracles.merge_tolerance(snapshots, [1 / len(steps)] * len(steps), "float32")).all(), name


def round_trip(module):
    module.double()
    module.float()


def exchange(module):
    for parameter in module.parameters():
        parameter.data = torch.round(parameter.data * 8) / 8


def exchange_and_put_copies_back(module):
    old = [parameter.data.clone() for parameter in module.parameters()]
    exchange(module)
    for parameter, values in zip(module.parameters(), old, strict=True):
        parameter.data = values


def replace(module):
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            setattr(part, name, nn.Parameter(parameter.detach() * 3))


def assign(module):
    module.load_state_dict({name: value.clone() + 1 for name, value in module.state_dict().items()}, assign=True)


def swap_tensors(module):
    for parameter in module.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().clone() + 1))


def transpose(module):
    module[0].weight.data = module[0].weight.data.t().contiguous().t()


def in_another_shape(module):
    module[0].weight.data = torch.ones(7, 7)


def free(module):
    for parameter in module.parameters():
        parameter.untyped_storage().resize_(0)


EXCHANGES = [
    round_trip, nn.Module.double, nn.Module.half, exchange, exchange_and_put_copies_back, replace, assign, swap_tensors,
    transpose, in_another_shape,
]  # fmt: skip


@pytest.mark.parametrize("exchanging", EXCHANGES)
@pytest.mark.parametrize("last_step", [8, 9], ids=["raw is a slot", "raw is a copy"])
def test_p33_what_an_evaluator_exchanges_is_undone_and_the_next_view_is_in_the_live_model(exchanging, last_step):
    module, merging, trajectory = run(range(1, last_step + 1), views=["sma", "sma2"])
    before = facts(module)
    with merging.swap(module) as merge_view:
        exchanging(module)  # while raw is measured
        for view, steps in (("sma", (4, 6, 8)), ("sma2", (6, 8))):
            merge_view(view)
            assert_is_mean(module, trajectory, steps)
            exchanging(module)
    assert facts(module) == before


@pytest.mark.parametrize("exchanging", [*EXCHANGES, free])
def test_p33_the_run_goes_on_as_without_the_evaluation(exchanging):
    def weights(evaluated):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
        merging, optimizer = RollingMerger(window=3, every=2), torch.optim.AdamW(module.parameters(), lr=0.1)
        for step in range(1, 13):
            optimizer.zero_grad()
            module(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            merging.observe(module, step)
            if evaluated and merging.merge_is_due():
                optimizer.zero_grad()  # a gradient has the dtype of its parameter
                with merging.merged(module, "sma"):
                    exchanging(module)
        return [parameter.tolist() for parameter in module.parameters()]

    assert weights(True) == weights(False)


def test_a_chosen_buffer_that_is_replaced_comes_back():
    def build():
        module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
        module.register_buffer("router_bias", torch.ones(3))
        return module

    module, merging, _ = run(build=build, merge_buffers=["router_bias"])
    before = facts(module)
    with merging.merged(module, "sma"):
        module.router_bias = torch.zeros(3)
    assert facts(module) == before


def test_a_parametrization_that_an_evaluator_leaves_behind_trains_on_from_raw_and_is_the_users_own():
    module, merging, _ = run()
    raw, weight = module[0].weight.detach().clone(), module[0].weight
    with merging.merged(module, "sma"):
        parametrize.register_parametrization(module[0], "weight", Doubled())
    assert module[0].parametrizations.weight.original is weight
    assert torch.equal(weight, raw)


def test_a_module_that_is_parametrised_meanwhile_and_back_is_raw():
    module, merging, _ = run()
    before = facts(module)
    with merging.merged(module, "sma"):
        parametrize.register_parametrization(module[0], "weight", Doubled())
        parametrize.remove_parametrizations(module[0], "weight", leave_parametrized=True)
    after = facts(module)
    assert {name: values[-1] for name, values in after.items()} == {name: item[-1] for name, item in before.items()}


def rebuilt_from_merged_weights(module):
    module[0] = copy.deepcopy(module[0])


def weight_normed(module):
    parametrizations.weight_norm(module[0])


def deleted(module):
    del module[0].weight


@pytest.mark.parametrize("replacing", [rebuilt_from_merged_weights, weight_normed, deleted])
def test_what_cannot_be_undone_ends_the_run_instead_of_training_merged_weights(replacing):
    module, merging, _ = run()
    with (
        pytest.raises(UnsupportedModelError, match=r"parameter '0\..*' and . more were replaced"),
        merging.merged(module, "sma"),
    ):
        replacing(module)
    assert merging.observe(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)), 10)  # and the merger is not stuck


def test_tensors_are_merged_by_name_whatever_their_order():
    module, merging, trajectory = run()
    first = module[0].weight
    del module[0]._parameters["weight"]
    module[0].register_parameter("weight", first)  # after the bias now
    with merging.merged(module, "sma"):
        assert_is_mean(module, trajectory, (4, 6, 8))


def test_what_is_frozen_since_the_snapshots_is_merged_into_its_own_place():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.g, self.d = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.d(self.g(x))

    module, merging, trajectory = run(build=Two)
    module.d.requires_grad_(False)
    with merging.merged(module, "sma"):
        assert_is_mean(module, trajectory, (4, 6, 8))


def test_what_trains_only_since_the_last_snapshot_stays_raw():
    module, merging, _ = run()
    module.append(nn.Linear(1, 1))
    raw = module[2].weight.item()
    with merging.merged(module, "sma"):
        assert module[2].weight.item() == raw


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.double(), "'0.bias' and 3 more are of another"),
        (lambda m: m.pop(1), "'1.bias' and 1 more are gone"),
    ],
)
def test_a_model_that_is_another_one_by_now_is_refused_by_name(change, said):
    module, merging, _ = run()
    change(module)
    raw = [parameter.tolist() for parameter in module.parameters()]
    with (
        pytest.raises(WindowNotReadyError, match=f"not the one that was observed: {said}"),
        merging.merged(module, "sma"),
    ):
        pass
    assert [parameter.tolist() for parameter in module.parameters()] == raw


def test_a_pruned_layer_keeps_its_zeros_after_pruning_was_made_permanent():
    def build():
        module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
        prune.l1_unstructured(module[0], "weight", 0.5)
        return module

    module, merging, trajectory = run(build=build)
    prune.l1_unstructured(module[0], "weight", 0.5)
    prune.remove(module[0], "weight")
    zeros = module[0].weight == 0
    before = facts(module)
    with merging.merged(module, "sma"):
        assert torch.equal(module[0].weight == 0, zeros)
        mean = sum(trajectory[step]["0.weight_orig"] for step in (4, 6, 8)) / 3
        assert torch.allclose(module[0].weight[~zeros].double(), torch.from_numpy(mean)[~zeros])
    assert facts(module) == before


def test_a_graph_that_is_kept_alive_across_a_merge_works_as_without_us():
    def gradients(evaluated):
        module, merging, _ = run()
        loss = module(torch.ones(2, 4)).square().sum()
        loss.backward(retain_graph=True)
        if evaluated:
            with merging.merged(module, "sma"), torch.no_grad():
                module(torch.ones(2, 4))
        loss.backward()
        return [parameter.grad.tolist() for parameter in module.parameters()]

    assert gradients(True) == gradients(False)


def test_a_graph_of_weights_that_the_user_changed_is_refused_by_torch_as_ever():
    module, merging, _ = run()
    loss = module(torch.ones(2, 4)).square().sum()
    with torch.no_grad():
        module[1].weight.add_(1)
    with merging.merged(module, "sma"):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
