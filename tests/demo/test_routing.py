"""Where a mixture of experts sends its tokens, against counts by hand."""

import math

import pytest
import torch

from pretrain_merge.demo.models import build_model
from pretrain_merge.demo.report import routers
from pretrain_merge.demo.routing import compare, drift, read_routers, statistics

# two tokens and four experts in one layer: the first takes experts 0 and 1, the second 0 and 3
LOGITS = torch.tensor([[[5.0, 4.0, 1.0, 0.0], [5.0, 0.0, 1.0, 4.0]]])


def test_the_load_counts_choices_and_an_even_one_is_balanced():
    found = statistics(LOGITS, 2)
    assert found.load == ((0.5, 0.25, 0.0, 0.25),)
    assert found.balance == pytest.approx((0.5 * math.log(2) + 2 * 0.25 * math.log(4)) / math.log(4))
    assert statistics(torch.cat([LOGITS[:, :1], -LOGITS[:, :1]], dim=1), 2).balance == pytest.approx(1.0)


def test_the_entropy_is_that_of_a_tokens_probabilities():
    assert statistics(torch.zeros(2, 3, 4), 2).entropy == pytest.approx(1.0)
    assert statistics(1e4 * LOGITS, 2).entropy == pytest.approx(0.0)  # and no NaN where a probability is 0


def test_the_drift_is_the_share_of_chosen_experts_that_another_would_not_choose():
    other = LOGITS.clone()
    other[0, 1] = torch.tensor([0.0, 5.0, 1.0, 4.0])  # of four choices one is exchanged
    assert drift(LOGITS, other, 2) == drift(other, LOGITS, 2) == 0.25
    assert drift(LOGITS, LOGITS * 2 + 1, 2) == 0.0


def test_the_routers_of_a_model_are_read_from_every_layer_and_token():
    model = build_model("moe", seed=0).eval()
    blocks = [torch.randint(0, 256, (3, 8), generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    logits = read_routers(model, blocks)
    assert logits.shape == (2, 2 * 3 * 8, 4)
    assert torch.equal(logits[:, :24], torch.stack(model(input_ids=blocks[0], output_router_logits=True).router_logits))


def test_what_is_said_names_both_models_and_training_itself():
    said = routers(compare(LOGITS, LOGITS, -LOGITS, 2))
    for part in ("raw model: 0% to 50%", "merged model", "exchanges 0.0%", "exchanged 100.0%"):
        assert part in said
