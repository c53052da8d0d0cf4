"""A merge with everything decided: what is merged how, what is copied from where, and over which files it goes.

This module knows options and what must agree before a byte is written. It reads no tensor.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pretrain_merge._version import __version__
from pretrain_merge.errors import ConfigError
from pretrain_merge.offline import agreement, shards
from pretrain_merge.offline.agreement import OnMissing, Output
from pretrain_merge.offline.options import refuse_text, refuse_unknown
from pretrain_merge.offline.partial import fingerprint
from pretrain_merge.offline.recipe import Recipe, ViewLike, make_recipe
from pretrain_merge.offline.shards import LARGEST_FILE, Shard
from pretrain_merge.offline.tensors import MERGED_DTYPES, Source

Optimizer = Literal["drop", "newest", "average"]
_DTYPES = {dtype.name: dtype for dtype in MERGED_DTYPES}


@dataclass(frozen=True)
class Decision:
    """All that a merge of opened checkpoints needs.

    Attributes:
        recipe: What is merged.
        base: Gives what the sources lack.
        outputs: Every tensor that is written.
        shards: Over which files.
        policy: Options that decide what is written, for provenance.
    """

    recipe: Recipe
    base: Source | None
    outputs: Mapping[str, Output]
    shards: tuple[Shard, ...]
    policy: Mapping[str, Any]

    @classmethod
    def of(
        cls, sources: Sequence[Source], view: ViewLike, *, steps: Sequence[int] | None = None,
        base: Source | None = None, dtype: str | None = None, newest: Sequence[str] = (),
        average: Sequence[str] = (), on_missing: OnMissing = "error", optimizer: Optimizer = "drop",
        largest_file: int = LARGEST_FILE,
    ) -> "Decision":  # fmt: skip
        """Compare the sources and choose; the options are those of `merge_checkpoints`.

        Raises:
            PretrainMergeError: As `merge_checkpoints` says.
        """
        refuse_text(newest=newest, average=average)
        refuse_unknown("dtype", dtype, (None, *_DTYPES))
        refuse_unknown("on_missing", on_missing, ("error", "newest"))
        refuse_unknown("optimizer", optimizer, ("drop", "newest", "average"))
        if not largest_file > 0:
            raise ConfigError(f"largest_file is {largest_file}; it must be above 0 bytes. Leave it at its default.")
        recipe = make_recipe(sources, view, steps)
        # after the recipe: of sources that a view leaves out nothing is asked
        for source in recipe.sources:
            agreement.check_readable(source)
        outputs = agreement.agree(
            recipe.sources, dtype=None if dtype is None else _DTYPES[dtype], newest=newest, average=average,
            on_missing=on_missing, base=base,
        )  # fmt: skip
        agreement.refuse_idle([*outputs], newest=newest, average=average)
        states = _optimizer_outputs(recipe, optimizer)
        agreement.check_writable(outputs | states)
        # in the order of the newest source, which is mostly that of its layers: reads go forward in each file
        divided = shards.divide({name: output.kind for name, output in outputs.items()}, largest_file)
        if states:
            # in files of their own, which loaders of weights do not look into
            divided += shards.divide({name: item.kind for name, item in states.items()}, largest_file, "optimizer")
        policy = {
            "dtype": dtype, "newest": list(newest), "average": list(average), "on_missing": on_missing,
            "optimizer": optimizer,
        }  # fmt: skip
        return cls(recipe, base, outputs | states, tuple(divided), policy)

    @property
    def everyone(self) -> list[Source]:
        """All that is read: the sources, then the base."""
        return [*self.recipe.sources, *([self.base] if self.base is not None else [])]

    def bytes_read(self, shard: Shard) -> int:
        """Of all sources, for one file."""
        return sum(self._bytes_read(name, self.outputs[name]) for name in shard.kinds)

    def identity(self) -> dict[str, Any]:
        """What must be the same for finished files to be kept: the sources, as their files are now, and the recipe."""
        files = {file: fingerprint(file) for source in self.everyone for file in source.files}
        # a digest, since a large model has 100,000 names
        names = hashlib.sha256(
            repr([(name, str(item.kind), item.origin) for name, item in self.outputs.items()]).encode()
        )
        layout = [(shard.file, shard.num_bytes) for shard in self.shards]
        about = [__version__, list(self.recipe.coefficients), dict(self.policy), names.hexdigest(), layout]
        return {"files": files, "about": about}

    def _bytes_read(self, name: str, output: Output) -> int:
        if output.origin is not None:
            return output.kind.num_bytes
        # by each source's own dtype: they may differ
        return sum(source.kind(name).num_bytes for source in self.recipe.sources)


def _optimizer_outputs(recipe: Recipe, optimizer: Optimizer) -> dict[str, Output]:
    if optimizer == "drop":
        return {}
    sources = recipe.sources
    if not all(source.optimizer for source in sources):
        lacking = next(source.place for source in sources if not source.optimizer)
        raise ConfigError(
            f"optimizer={optimizer!r} needs Lightning checkpoints with optimizer states, and {lacking} has none. Leave "
            f"it at 'drop'."
        )
    if optimizer == "average":
        agreement.refuse_negative_moments(recipe.coefficients)
        of_states = [replace(source, tensors=source.optimizer, ties={}) for source in sources]
        # counters of steps, which some optimizers keep as floats, are of the newest
        return agreement.agree(of_states, dtype=None, newest=["*/step"], average=["*"], on_missing="error", base=None)
    return {name: Output(kind, len(sources) - 1) for name, kind in sources[-1].optimizer.items()}
