"""One state of a run that a folder holds twice: `last.ckpt`, a copy named `best`, what a second callback saved.

This module knows steps and a few bytes of each tensor. A state that counted twice would weigh double in silence.
"""

from collections.abc import Sequence

from pretrain_merge.errors import CheckpointError
from pretrain_merge.offline.files import Files
from pretrain_merge.offline.tensors import Source
from pretrain_merge.runtime.log import logger

_PROBE = 4096  # bytes of a tensor: a single step of training changes nearly each of them
_MOST_PROBED = 256  # tensors, spread over the model


def without_doubles(sources: Sequence[Source]) -> list[Source]:
    """The checkpoints of a folder, each state once; checkpoints of unknown step stay.

    Raises:
        CheckpointError: Two of one step differ, as where two runs saved into one folder.
    """
    first: dict[int | None, Source] = {}
    # a copy named `last` is the one to leave out: it is of another step tomorrow
    for source in sorted(sources, key=lambda source: _name(source).startswith("last")):
        other = first.setdefault(source.step, source)
        if other is source or source.step is None:
            continue
        if not _are_one(other, source):
            raise CheckpointError(
                f"{other.place} and {source.place} are both of step {source.step}, and their weights differ. A folder "
                f"stands for one run: name the checkpoints that you mean, one by one or with a pattern "
                f"('run/*-v1.ckpt')."
            )
        logger.info(f"{source.place} is left out: {other.place} is of the same step, {source.step}.")
    return [source for source in sources if source.step is None or first[source.step] is source]


def _are_one(one: Source, other: Source) -> bool:
    if one.tensors != other.tensors:
        return False
    names = list(one.tensors)
    with Files() as files:
        probed = names[:: -(-len(names) // _MOST_PROBED) or 1]
        return all(_beginning(one, name, files) == _beginning(other, name, files) for name in probed)


def _beginning(source: Source, name: str, files: Files) -> bytes:
    block, kind = source.locate(name)[0], source.kind(name)
    # one that lies in another order may have fewer bytes than elements
    num_bytes = 0 if block.strides is not None else min(_PROBE, kind.num_bytes)
    return files.read(block.file, block.start, num_bytes) if num_bytes else b""


def _name(source: Source) -> str:
    return source.place.rpartition("/")[2]
