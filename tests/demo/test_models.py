"""The demo's models: real architectures, built without a network, trained on the loss that they claim."""

import math
import socket

import numpy as np
import pytest
import torch

from pretrain_merge.demo.experiment import FAMILIES
from pretrain_merge.demo.models import LanguageModel, build_model, constant_after_warmup, linear_anneal
from pretrain_merge.errors import ConfigError


def batch(rows=8, length=32):
    return {"input_ids": torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(1))}


def module(family):
    return LanguageModel(build_model(family, seed=0), peak_lr=1e-2, lr_factor=constant_after_warmup(2))


def cross_entropy(logits, tokens):
    """Mean next-token loss in float64, from the definition."""
    scores = logits.double().numpy()[:, :-1]
    scores = scores - scores.max(axis=-1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, tokens.numpy()[:, 1:, None], axis=-1).mean()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the demo reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("family", "kind", "size"), [("llama", "LlamaForCausalLM", 123_200), ("moe", "MixtralForCausalLM", 197_440)]
)
def test_a_family_is_a_real_architecture_built_without_a_network(family, kind, size):
    model = build_model(family, seed=0)
    assert type(model).__name__ == kind
    assert model.num_parameters() == size


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_gives_the_same_weights_and_leaves_the_global_random_state(family):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, second, other = (build_model(family, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'gpt'.*llama, moe"):
        build_model("gpt", seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_val_loss_is_the_cross_entropy_alone(family):
    lightning_module, logged, data = module(family), {}, batch()
    lightning_module.log = lambda name, value, **_: logged.update({name: value.item()})
    with torch.no_grad():
        lightning_module.validation_step(data, 0)
        logits = lightning_module.model(**data).logits
    # float32 logits and a float32 mean over 248 tokens
    assert logged["val_loss"] == pytest.approx(cross_entropy(logits, data["input_ids"]), rel=1e-5)
    assert logged["val_loss"] == pytest.approx(math.log(256), rel=0.05)  # it knows nothing yet


def test_a_mixture_of_experts_trains_with_its_balancing_loss_and_llama_without():
    extra = {}
    for family in FAMILIES:
        lightning_module, logged = module(family), {}
        lightning_module.log = lambda name, value, logged=logged, **_: logged.update({name: value.item()})
        lightning_module.training_step(batch(), 0)
        with torch.no_grad():
            lightning_module.validation_step(batch(), 0)
        extra[family] = logged["train_loss"] - logged["val_loss"]
    assert abs(extra["llama"]) < 1e-5
    assert extra["moe"] > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_a_batch_by_heart(family):
    lightning_module, data = module(family), batch()
    lightning_module.log = lambda *_, **__: None
    parts = lightning_module.configure_optimizers()
    optimizer, scheduler = parts["optimizer"], parts["lr_scheduler"]["scheduler"]
    losses = []
    for step in range(30):
        loss = lightning_module.training_step(data, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert scheduler.get_last_lr() == [1e-2]


def test_an_anneal_falls_from_the_peak_to_zero_over_exactly_its_steps():
    factor = linear_anneal(300, 200)
    assert factor(300) == 1.0
    assert factor(400) == 0.5
    assert factor(499) == pytest.approx(1 / 200)
    assert factor(500) == factor(501) == 0.0
