"""Merged models on disk: their weights as safetensors and the provenance of every number in them.

This module knows the folder layout; what of a module is saved is `state`, how tensors get into files and back is
`whole_weights`. It knows no windows and no trainers: whatever weights are in the module when it is called are the ones
written. No pickle is written or read. On several ranks every rank calls its functions at the same point.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pretrain_merge import _version
from pretrain_merge.errors import CheckpointError
from pretrain_merge.files.folders import published
from pretrain_merge.merged_models import hugging_face, whole_weights
from pretrain_merge.merged_models.loading import load_merged
from pretrain_merge.merged_models.provenance import FORMAT, read_provenance, write_provenance
from pretrain_merge.merged_models.state import SavedState, dtype_name, refuse_unsavable
from pretrain_merge.merged_models.whole_weights import LARGEST_FILE
from pretrain_merge.parameters import is_sharded
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import logger

__all__ = ["holds_weights_of", "load_merged", "read_provenance", "save_merged", "try_saving"]

_RECORDED_VERSIONS = ("torch", "lightning", "safetensors")


def try_saving(module: nn.Module) -> None:
    """Find out before training what would keep a merged model from being saved, or from being saved whole.

    Raises:
        UnsupportedModelError: A tensor of the module cannot be written; names it and the way out.
    """
    refuse_unsavable(module)
    if ranks.rank() == 0:
        hugging_face.try_configuration(module)  # it alone writes config.json


def save_merged(
    module: nn.Module, target: str | Path, provenance: Mapping[str, Any], *, largest_file: int = LARGEST_FILE
) -> None:
    """Write the weights that are in the module now, with their provenance, as a folder that appears whole.

    Every rank calls it: where the module is sharded each writes its shards, else rank 0 writes for all. Either way the
    folder holds whole tensors for one process to read. Where the module wraps one Hugging Face model and nothing else,
    as its class builds it, names lose the wrapper's prefix and the model's `config.json` is added, so that
    `from_pretrained(target)` works.

    Args:
        module: The model; its whole state dict is written: merged parameters, frozen ones, buffers, and extra state
            (`get_extra_state`) that is a tensor.
        target: The folder to be made.
        provenance: Plain JSON values: steps, coefficients, configuration, metrics.
        largest_file: Bytes after which the weights go on in another file, with an index beside them.

    Raises:
        CheckpointError: The folder exists, or cannot be written.
        UnsupportedModelError: A tensor cannot be written.
        RankError: That happened on another rank.
    """
    target = Path(target)
    prefix, model = hugging_face.wrapped_model(module)
    state = SavedState.of(module, prefix)
    if left_out := [name for name, value in module.state_dict().items() if not isinstance(value, Tensor | None)]:
        logger.warning(
            f"{target} is saved without {', '.join(left_out)}: extra state that is not a tensor could be written as a "
            f"pickle only. Return a tensor from get_extra_state."
        )
    about = {
        **provenance,
        "format": FORMAT,
        "model": type(module).__name__,
        "prefix": prefix,
        "ties": state.ties,
        "as_integers": state.as_integers,
        "dtypes": sorted({dtype_name(tensor.dtype) for tensor in state.tensors.values()}),
        "versions": {"pretrain-merge": _version.__version__} | {name: version(name) for name in _RECORDED_VERSIONS},
    }
    with _published_by_rank_0(target) as folder:
        # ranks of a replicated model hold the same, so one of them writes
        is_writer = ranks.rank() == 0 or is_sharded(module)
        with ranks.all_or_none(f"write {target}"):
            written = whole_weights.write(folder, state.tensors, largest_file=largest_file) if is_writer else []
        with ranks.all_or_none(f"read {target} back"):
            # read back now, while the weights are still in the model and another folder can be named
            if is_writer and not whole_weights.hold(folder, state.tensors):
                raise CheckpointError(f"{target}: what was read back is not what was written. Check that disk.")
            sums = ranks.gather(whole_weights.checksums(folder, written))
        if ranks.rank() == 0:
            whole_weights.remove_parts(folder)
            # P30: the order of safetensors' own metadata differs from run to run, so provenance is a file of its own
            about["files"] = {name: values for of_rank in sums for name, values in of_rank.items()}
            write_provenance(folder, about)
            if model is not None:
                hugging_face.save_configuration(model, folder)


def holds_weights_of(module: nn.Module, target: Path) -> bool:
    """Whether a merged model on disk is, bit for bit, what is in the module now; the same answer on every rank."""
    prefix, _ = hugging_face.wrapped_model(module)
    state = SavedState.of(module, prefix)
    is_reader = ranks.rank() == 0 or is_sharded(module)
    # one shard that differs is enough; and ranks that disagree would write apart
    return not ranks.any_rank(is_reader and not whole_weights.hold(target, state.tensors))


@contextmanager
def _published_by_rank_0(target: Path) -> Iterator[Path]:
    """`published` on rank 0; the others get its temporary folder to write in."""
    with ranks.all_or_none(f"save {target}"), ExitStack() as publishing:
        with ranks.all_or_none(f"make a folder for {target}"):
            own = publishing.enter_context(published(target)) if ranks.rank() == 0 else None
        try:
            yield ranks.gather(own)[0] or target
        except OSError as error:
            # a CheckpointError is an OSError too, and says more already
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"cannot write {target}: {error}. Free space there, or choose another folder."
            ) from error
