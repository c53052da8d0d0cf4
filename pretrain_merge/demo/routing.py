"""Where a mixture of experts sends its tokens: load, entropy, and how far two models differ in it.

This module knows router logits, of Hugging Face's models that give them out. It knows neither merges nor trainers.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Router:
    """How one model routes.

    Attributes:
        load: Share of all choices that fall on each expert, by layer; each layer's sum to 1.
        balance: Entropy of the load as a share of the largest possible, mean over layers; 1 is an even load.
        entropy: Entropy of a token's router probabilities as a share of the largest, mean over tokens and layers;
            0 is a router that is sure.
    """

    load: tuple[tuple[float, ...], ...]
    balance: float
    entropy: float


@dataclass(frozen=True)
class Routing:
    """What a merge does to the routers, beside what training does to them over the stretch that is merged.

    Attributes:
        raw: Of the live model.
        merged: Of the merge.
        drift: Share of a token's experts that the merge exchanges, mean over tokens and layers.
        drift_of_training: The same between the models at both ends of the stretch.
    """

    raw: Router
    merged: Router
    drift: float
    drift_of_training: float


@torch.no_grad()
def read_routers(model: Any, blocks: Iterable[Tensor]) -> Tensor:
    """Router logits of all tokens.

    Args:
        model: A Hugging Face mixture of experts, in evaluation mode.
        blocks: Token ids, each of shape `(batch, length)`.

    Returns:
        Float32, shape `(layers, tokens, experts)`.
    """
    logits = [torch.stack(model(input_ids=ids, output_router_logits=True).router_logits) for ids in blocks]
    # float32: choices are ranked by differences that 8 bits of a bfloat16 logit hide
    return torch.cat(logits, dim=1).float()


def compare(raw: Tensor, merged: Tensor, oldest: Tensor, num_chosen: int) -> Routing:
    """What a merge did.

    Args:
        raw: Logits of the live model, as `read_routers` gives them, as are the next two, of the same tokens.
        merged: Of the merge.
        oldest: Of the oldest snapshot in it.
        num_chosen: Experts per token.
    """
    return Routing(
        statistics(raw, num_chosen),
        statistics(merged, num_chosen),
        drift(raw, merged, num_chosen),
        drift(oldest, raw, num_chosen),
    )


def statistics(logits: Tensor, num_chosen: int) -> Router:
    """Load and entropies.

    Args:
        logits: As `read_routers` gives them.
        num_chosen: Experts per token.
    """
    num_experts = logits.shape[-1]
    # what is chosen, not how likely: an even router that is sure differs from one that cannot decide
    load = _chosen(logits, num_chosen).mean(dim=1) / num_chosen
    probabilities = logits.double().softmax(dim=-1)
    return Router(
        load=tuple(tuple(layer) for layer in load.tolist()),
        balance=float(_entropy(load).mean()) / math.log(num_experts),
        entropy=float(_entropy(probabilities).mean()) / math.log(num_experts),
    )


def drift(logits: Tensor, other: Tensor, num_chosen: int) -> float:
    """Share of a token's experts that another model would not have chosen, mean over tokens and layers."""
    common = _chosen(logits, num_chosen) * _chosen(other, num_chosen)
    return 1.0 - float(common.sum(dim=-1).mean()) / num_chosen


def _chosen(logits: Tensor, num_chosen: int) -> Tensor:
    """1 where an expert is one of the token's, else 0."""
    return torch.zeros_like(logits, dtype=torch.float64).scatter(-1, logits.topk(num_chosen, dim=-1).indices, 1.0)


def _entropy(probabilities: Tensor) -> Tensor:
    # xlogy: an expert that is never chosen adds 0, not NaN
    summands: Tensor = torch.special.xlogy(probabilities, probabilities)
    return -summands.sum(dim=-1)
