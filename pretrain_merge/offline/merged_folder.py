"""What a merged folder has besides its weights: an index, the model's companions, and where all of it came from.

This module knows names and plain values. The weights were written when it is asked.
"""

import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pretrain_merge._version import __version__
from pretrain_merge.files import atomic
from pretrain_merge.kernels.spread import Spread
from pretrain_merge.merged_models.provenance import FORMAT, PROVENANCE, provenance_text
from pretrain_merge.offline import agreement, shards
from pretrain_merge.offline.decision import Decision
from pretrain_merge.offline.files import Files, size_of
from pretrain_merge.offline.shards import Written
from pretrain_merge.offline.tensors import Source


def complete(
    folder: Path,
    decision: Decision,
    about: Mapping[str, Any],
    *,
    write: Callable[[Path, bytes], object] = atomic.write,
) -> None:
    """Write everything that is not weights.

    Args:
        folder: Where the weights are.
        decision: What was merged.
        about: The provenance.
        write: Makes a file.

    Raises:
        CheckpointError: A companion cannot be read.
        OSError: The disk refuses.
    """
    # with a single file there is no index, as in Hugging Face's own folders
    for stem in ("model", "optimizer"):
        of_stem = [shard for shard in decision.shards if shard.file.startswith(stem)]
        if len(of_stem) > 1:
            write(folder / shards.INDEX.replace("model", stem), shards.index_of(of_stem).encode())
    newest = decision.recipe.sources[-1]
    with Files() as files:
        for companion in newest.companions:
            # bytes as they are: a tokenizer that was parsed and written anew is another one for its checksum
            content = files.read(companion, 0, size_of(companion) or 0)
            write(folder / companion.rpartition("/")[2], content)
    write(folder / PROVENANCE, provenance_text(about).encode())


def provenance(decision: Decision, written: Mapping[str, Written]) -> dict[str, Any]:
    """All that went in, and what came out, as plain values.

    Args:
        decision: What was merged.
        written: What is known of each file of weights.
    """
    newest = decision.recipe.sources[-1]
    spread = Spread(
        # states of optimizers are in files of their own, and their spread says nothing of the model
        math.fsum(written[shard.file].distance for shard in decision.shards if shard.file.startswith("model")),
        math.fsum(written[shard.file].norm for shard in decision.shards if shard.file.startswith("model")),
    )
    copied = {name: item.origin for name, item in decision.outputs.items() if item.origin is not None}
    places = [source.place for source in decision.recipe.sources] + [decision.base.place if decision.base else ""]
    dtypes = {item.kind.dtype.name for item in decision.outputs.values()}
    # of a merge of merges the newest one says how far the run was
    inherited = {key: newest.about[key] for key in ("samples", "tokens", "prefix", "model") if key in newest.about}
    return {
        "model": "",
        "prefix": "",
        "samples": 0,
        "tokens": 0,
        **inherited,
        **decision.recipe.to_plain(),
        "format": FORMAT,
        "step": newest.step or 0,
        "sources": [_described(source) for source in decision.recipe.sources],
        "base": decision.base.place if decision.base else None,
        "spread": spread.relative_rms,
        "policy": dict(decision.policy),
        "copied": {name: places[origin] for name, origin in sorted(copied.items())},
        "ties": dict(agreement.common_ties(decision.recipe.sources)),
        "dtypes": sorted(dtypes),
        # every dtype that can be read here can be written, so none goes in as integers
        "as_integers": {},
        "files": {name: [item.num_bytes, item.crc32] for name, item in sorted(written.items())},
        "versions": {"pretrain-merge": __version__, "torch": version("torch")},
    }


def _described(source: Source) -> dict[str, Any]:
    plain: dict[str, Any] = {"place": source.place, "format": source.format, "step": source.step}
    return plain | ({"provenance": dict(source.about)} if source.about else {})
