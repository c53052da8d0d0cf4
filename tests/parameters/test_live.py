"""Which tensors of a module are merged, and what is refused because it could not be merged exactly."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from pretrain_merge.errors import UnsupportedModelError
from pretrain_merge.parameters import Trained, all_finite, copy_, mergeable_tensors

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Model(nn.Module):
    """A bit of everything that is not a plain weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight  # tied
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.register_buffer("router_bias", torch.zeros(4))


def refusal(module, **options):
    with pytest.raises(UnsupportedModelError) as caught:
        mergeable_tensors(module, **options)
    return str(caught.value)


def with_weight(parameter):
    module = nn.Linear(2, 2, bias=False)
    module.weight = parameter
    return module


def test_p22_trainable_float_parameters_are_merged_each_once_and_nothing_else():
    assert list(mergeable_tensors(Model())) == ["embed.weight"]


def test_two_parameters_over_one_storage_are_tied_too():
    module = nn.ModuleDict({"a": nn.Linear(3, 4, bias=False), "b": nn.Linear(3, 4, bias=False)})
    module["b"].weight.data = module["a"].weight.data
    assert module["b"].weight is not module["a"].weight
    assert list(mergeable_tensors(module)) == ["a.weight"]


def test_parameters_that_are_equal_or_empty_are_not_tied():
    module = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in ((3,), (3,), (0,), (0,))])
    assert len(mergeable_tensors(module)) == 4


def test_they_share_memory_with_the_live_model():
    module = nn.Linear(2, 2)
    mergeable_tensors(module)["weight"].fill_(5.0)
    assert module.weight.tolist() == [[5.0, 5.0], [5.0, 5.0]]


def test_writing_into_them_needs_no_gradient_and_leaves_no_graph():
    module = nn.Linear(2, 2)
    assert not any(tensor.requires_grad for tensor in mergeable_tensors(module).values())
    mergeable_tensors(module)["weight"].mul_(2)
    assert module.weight.is_leaf
    assert module.weight.grad_fn is None


def test_writing_into_the_live_model_shows_in_their_version():
    module = nn.Linear(2, 2)
    tensor = mergeable_tensors(module)["weight"]
    before = tensor._version
    with torch.no_grad():
        module.weight.mul_(2)
    assert tensor._version > before


@pytest.mark.parametrize("make", [lambda x: x.to(memory_format=torch.channels_last), lambda x: x.transpose(0, 1)])
def test_weights_with_other_strides_are_merged_in_the_order_of_their_memory(make):
    weight = nn.Parameter(make(torch.randn(4, 3, 2, 2)))
    tensor = mergeable_tensors(with_weight(weight))["weight"]
    assert tensor.is_contiguous()
    assert tensor.data_ptr() == weight.data_ptr()
    tensor.copy_(torch.arange(48.0).view(tensor.shape))
    assert sorted(weight.flatten().tolist()) == list(range(48))


def test_weights_with_gaps_in_memory_are_refused():
    message = refusal(with_weight(nn.Parameter(torch.randn(4, 6)[:, ::2])))
    assert "'weight' has gaps or overlaps in memory" in message
    assert ".clone()" in message


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_float_dtype_that_trains_is_merged(dtype):
    assert mergeable_tensors(nn.Linear(2, 2, dtype=dtype))["weight"].dtype == dtype


def test_names_are_free_of_what_torch_compile_adds():
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    partly = nn.Sequential(torch.compile(plain[0], backend="eager"), plain[1])
    compiled = torch.compile(partly, backend="eager")
    assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
    assert list(mergeable_tensors(compiled)) == list(mergeable_tensors(plain))


def test_parts_that_a_user_named_as_wrappers_are_named_are_merged_like_others():
    module = nn.Module()
    for name in ("_forward_module", "net_orig_mod", "head"):
        module.add_module(name, nn.Linear(1, 1, bias=False))
    assert list(mergeable_tensors(module)) == ["weight", "net_orig_mod.weight", "head.weight"]


def test_two_parameters_of_one_name_without_wrappers_are_refused_and_not_merged_as_one():
    module = nn.Module()
    for name in ("_forward_module", "_orig_mod"):
        module.add_module(name, nn.Linear(1, 1, bias=False))
    with pytest.raises(UnsupportedModelError, match=r"two tensors are both called 'weight'.*Rename the submodule"):
        mergeable_tensors(module)


def test_float_buffers_are_merged_by_pattern_after_the_parameters():
    assert list(mergeable_tensors(Model(), merge_buffers=["router_*"])) == ["embed.weight", "router_bias"]


def test_a_buffer_matched_by_two_patterns_is_merged_once():
    assert len(mergeable_tensors(Model(), merge_buffers=["router_*", "*bias"])) == 2


@pytest.mark.parametrize("pattern", ["step*", "mask", "*"])
def test_integer_and_bool_buffers_are_never_merged(pattern):
    message = refusal(Model(), merge_buffers=[pattern])
    assert f"merge_buffers: {pattern!r} matches" in message
    assert "Allowed: patterns of float buffers" in message
    assert "router_bias" in message


def test_a_pattern_that_matches_no_buffer_is_refused_with_those_there_are():
    message = refusal(Model(), merge_buffers=["*.gate"])
    assert "'*.gate' matches no buffer" in message
    assert "['cache', 'router_bias']" in message


NORMS = [nn.BatchNorm1d(3), nn.SyncBatchNorm(3), nn.InstanceNorm1d(3, affine=True, track_running_stats=True)]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_running_statistics_are_refused_with_the_reason_and_the_choices(norm):
    message = refusal(nn.Sequential(nn.Linear(3, 3), norm))
    assert "'1.running_mean' and 1 more" in message
    assert "belong to the raw weights" in message
    assert "batch_norm='live'" in message
    assert "'merge'" in message


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_running_statistics_stay_live_or_are_merged_as_chosen(norm):
    module = nn.Sequential(norm)
    parameters = ["0.weight", "0.bias"]
    statistics = ["0.running_mean", "0.running_var"]
    assert list(mergeable_tensors(module, batch_norm="live")) == parameters
    assert list(mergeable_tensors(module, batch_norm="merge")) == parameters + statistics


def test_norms_without_running_statistics_need_no_choice():
    module = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3), nn.InstanceNorm1d(3))
    assert len(mergeable_tensors(module)) == 4


class Subclass(nn.Parameter):
    pass


class WrappedTensor(torch.Tensor):
    pass


def deepspeed_parameter():
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_id = 0  # how ZeRO-3 marks a partitioned parameter
    return parameter


@pytest.mark.parametrize(
    ("parameter", "pieces"),
    [
        (Subclass(torch.zeros(2, 2)), ["is a Subclass, a subclass of Parameter", "Allowed: plain parameters", "FSDP2"]),
        (nn.Parameter(torch.zeros(2).as_subclass(WrappedTensor)), ["is a WrappedTensor", "Allowed: plain parameters"]),
        (deepspeed_parameter(), ["cannot be read and written in place", "DeepSpeed ZeRO-3"]),
        (nn.UninitializedParameter(), ["is a UninitializedParameter", "before its first forward", "Run one batch"]),
        (nn.Parameter(torch.eye(2).to_sparse()), ["is sparse or packed (torch.sparse_coo)", ".to_dense()", "exclude"]),
        (nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn)), ["dtype torch.float8_e4m3fn", "Allowed: float64"]),
        (nn.Parameter(torch.zeros(2, dtype=torch.complex64)), ["dtype torch.complex64", "bfloat16, float16"]),
        (nn.Parameter(torch.zeros(2, device="meta")), ["meta device and holds no values", "configure_model"]),
    ],
    ids=["subclass", "tensor subclass", "ZeRO-3", "lazy", "sparse", "float8", "complex", "meta"],
)  # fmt: skip
def test_parameters_that_cannot_be_merged_exactly_are_refused_by_name(parameter, pieces):
    message = refusal(nn.Sequential(nn.Linear(2, 2), with_weight(parameter)))
    assert message.startswith("parameter '1.weight' ")
    for piece in pieces:
        assert piece in message


def test_p19_a_module_wrapped_in_fsdp1_is_refused_whatever_its_parameters_look_like():
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # a real one asks for a process group
    nn.Module.__init__(wrapped)
    message = refusal(nn.Sequential(nn.Linear(2, 2), wrapped))
    for piece in ("module '1' is wrapped in FSDP1", "use_orig_params=True", "fully_shard"):
        assert piece in message


def test_a_frozen_parameter_may_be_of_any_kind():
    frozen = nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False)
    assert list(mergeable_tensors(nn.Sequential(nn.Linear(2, 2), with_weight(frozen)))) == ["0.weight", "0.bias"]


def test_a_name_that_no_file_can_hold_is_refused():
    module = nn.Linear(2, 2)
    module.register_parameter("__metadata__", nn.Parameter(torch.ones(1)))
    assert "'__metadata__', which safetensors keeps for itself" in refusal(module)


@pytest.mark.parametrize(
    "share",
    [lambda weight: weight[:4], lambda weight: weight.view(2, 16), lambda weight: weight[2:]],
    ids=["the first rows", "another shape", "the last rows"],
)
def test_memory_that_two_parameters_share_in_part_or_under_two_shapes_is_refused_with_both_names(share):
    module = nn.ModuleDict({"e": nn.Linear(4, 8, bias=False), "h": nn.Linear(4, 4, bias=False)})
    module["h"].weight = nn.Parameter(share(module["e"].weight.detach()))
    message = refusal(module)
    for piece in (
        "'e.weight' (8, 4)",
        "'h.weight'",
        "share memory",
        "Allowed: tied parameters of one shape",
        ".clone()",
    ):
        assert piece in message


def test_parameters_side_by_side_in_one_storage_are_merged():
    storage = torch.zeros(24)
    module = nn.ParameterList([nn.Parameter(storage[:12].view(3, 4)), nn.Parameter(storage[12:].view(4, 3))])
    assert len(mergeable_tensors(module)) == 2


def test_patterns_choose_among_the_parameters_that_train():
    module = Model()
    module.lora = nn.Linear(3, 3)
    assert list(mergeable_tensors(module, include=["lora.*"])) == ["lora.weight", "lora.bias"]
    assert list(mergeable_tensors(module, exclude=["embed.*", "*.bias"])) == ["lora.weight"]
    assert list(mergeable_tensors(module, include=["lora.*"], exclude=["*.bias"])) == ["lora.weight"]


def test_a_filter_never_merges_what_is_frozen_and_one_name_of_a_tie_leaves_it_out():
    module = Model()
    module.lora = nn.Linear(3, 3)
    assert list(mergeable_tensors(module, exclude=["head.weight"])) == ["lora.weight", "lora.bias"]
    assert "frozen.weight" not in mergeable_tensors(module, include=["*", "frozen.*"])


def test_what_cannot_be_merged_may_be_left_out():
    module = nn.Sequential(nn.Linear(2, 2), with_weight(nn.Parameter(torch.eye(2).to_sparse())))
    assert list(mergeable_tensors(module, exclude=["1.*"])) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("options", "pieces"),
    [
        (
            {"exclude": ["embed.weigth"]},
            ["parameters.exclude: 'embed.weigth' matches no parameter", "did you mean 'embed.weight'"],
        ),
        ({"include": ["layers.*"]}, ["parameters.include: 'layers.*' matches no parameter", "'frozen.bias'"]),
        ({"exclude": ["*"]}, ["parameters: all 2 trainable parameters of Model are left out", "Narrow `exclude`"]),
        ({"include": ["frozen.*"]}, ["parameters: all 2 trainable parameters", "such as 'embed.weight'"]),
    ],
)
def test_patterns_that_leave_nothing_or_match_nothing_are_refused(options, pieces):
    message = refusal(Model(), **options)
    for piece in pieces:
        assert piece in message


def test_p36_what_trained_once_stays_in_the_set_whatever_is_frozen_at_the_moment():
    module, trained = nn.ModuleDict({"g": nn.Linear(2, 2), "d": nn.Linear(2, 2)}), Trained()
    module["g"].requires_grad_(False)
    assert list(trained.tensors(module)) == ["d.weight", "d.bias"]
    module["g"].requires_grad_(True)
    module["d"].requires_grad_(False)
    assert list(trained.tensors(module)) == ["g.weight", "g.bias", "d.weight", "d.bias"]


def test_p36_what_an_optimizer_has_stepped_is_in_the_set_although_it_is_frozen_again():
    module, trained = nn.ModuleDict({"g": nn.Linear(2, 2), "d": nn.Linear(2, 2), "never": nn.Linear(2, 2)}), Trained()
    optimizer = torch.optim.AdamW(module.parameters())
    module["g"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    module["g"].requires_grad_(False)
    module["never"].requires_grad_(False)
    trained.watch(module, [optimizer])
    assert list(trained.tensors(module)) == ["g.weight", "g.bias", "d.weight", "d.bias"]


def test_p36_a_run_that_goes_on_merges_what_the_run_before_did():
    module, trained = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)}), Trained()
    module["backbone"].requires_grad_(False)
    trained.remember(["backbone.weight", "head.weight"])
    assert list(trained.tensors(module)) == ["backbone.weight", "head.weight", "head.bias"]


def test_a_model_with_nothing_to_merge_is_refused():
    message = refusal(nn.Sequential(nn.Linear(2, 2).requires_grad_(False)))
    assert "Sequential has no trainable float parameters" in message
    assert "requires_grad=True" in message


def test_a_copy_converts_as_torch_does_and_leaves_its_source():
    sources = [torch.randn(3, 4), torch.randn(5, dtype=torch.float64)]
    before = copy.deepcopy(sources)
    targets = [torch.empty(3, 4, dtype=torch.bfloat16), torch.empty(5)]
    copy_(targets, sources)
    assert torch.equal(targets[0], sources[0].bfloat16())
    assert torch.equal(targets[1], sources[1].float())
    assert all(torch.equal(a, b) for a, b in zip(sources, before, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype, value):
    for index in (0, 2, -1):
        tensors = [torch.ones(3, dtype=dtype), torch.ones(7, dtype=dtype), torch.ones(0, dtype=dtype)]
        assert all_finite(tensors)
        tensors[1][index] = value
        assert not all_finite(tensors)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_largest_finite_values_are_finite(dtype):  # although their squares overflow
    assert all_finite([torch.full((100,), torch.finfo(dtype).max, dtype=dtype)])


def test_dtypes_may_be_mixed_and_nothing_is_finite():
    tensors = [torch.ones(3, dtype=dtype) for dtype in FLOATS]
    assert all_finite(tensors)
    tensors[-1][0] = float("inf")
    assert not all_finite(tensors)
    assert all_finite([])
