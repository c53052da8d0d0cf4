"""What merging does to the routers of a mixture of experts: read from the demo's own function."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.ablations.merges import WINDOW, Merge
from pretrain_merge.demo.routing import compare, read_routers

if TYPE_CHECKING:
    from benchmarks.ablations.training import Scale


@torch.no_grad()
def routing_at(scale: "Scale", models: Mapping[int, Tensor], merges: Sequence[Merge]) -> dict[str, Any]:
    """Routers of the raw model and of the mean of ten, and how far the merge moved them.

    The yardstick of the drift is how far training itself moved them over the same span: from the oldest snapshot of the
    merge to the raw model.
    """
    merge = next((item for item in merges if item.kind == "sma" and item.every == 0 and item.asked == WINDOW), None)
    if merge is None:
        return {}
    blocks = scale.halves[1]
    found = []
    for item in (merges[0], merge, Merge("raw", 0, 1, 1, merge.steps[:1], (1.0,))):
        scale.put(models, item)
        found.append(read_routers(scale.model, [blocks]))
    return asdict(compare(*found, scale.model.config.num_experts_per_tok))
