"""Which of the merged models of a run is meant by "best" and "last". This module knows folders and their names."""

from pathlib import Path
from typing import Literal, get_args

from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.files import untrusted
from pretrain_merge.merged_models.provenance import PROVENANCE, WITHDRAWN, read_provenance
from pretrain_merge.records import RAW

Which = Literal["best", "last"]
BEST = "best.json"


def chosen(run: Path, which: Which) -> Path:
    """The folder of a run's best or last merged model.

    Args:
        run: The run's folder, or its `merged/`.
        which: 'best', as the run noted it, or 'last', by its step.

    Raises:
        ConfigError: `which` is something else.
        CheckpointError: The run has none, or its note is damaged.
    """
    if which not in get_args(Which):
        raise ConfigError(f"which: {which!r} is not known. Allowed: 'best', 'last'.")
    folder = run / "merged" if (run / "merged").is_dir() else run
    if which == "best":
        return _best(folder)
    about = {path: read_provenance(path) for path in folder.glob("step-*") if (path / PROVENANCE).is_file()}
    merges = {path: item for path, item in about.items() if item.get("view") != RAW}  # `save.raw` lies beside them
    found = {path: item for path, item in merges.items() if not item.get(WITHDRAWN)}
    if merges and not found:
        why = next(iter(merges.values()))[WITHDRAWN]
        raise CheckpointError(
            f"every merged model in {folder} was withdrawn ({why}). Name one of these folders to load it all the same."
        )
    if not found:
        raise CheckpointError(
            f"{folder} holds no merged model. Name the folder of a run that saved some (`save: {{at_end: true}}`)."
        )
    return max(found, key=lambda path: (int(found[path].get("step", 0)), path.stat().st_mtime_ns))


def _best(folder: Path) -> Path:
    note = folder / BEST
    try:
        found = untrusted.read_json(note)
        name = found.get("folder")
        if not isinstance(name, str):
            withdrawn = "".join(f"; {name} was withdrawn: {why}" for name, why in found.get(WITHDRAWN, {}).items())
            raise ValueError(f"it names no folder{withdrawn}")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{note} does not say which merged model is the best ({error}). `save: {{best: val_loss}}` keeps it; "
            f"without it, take which='last', or name the folder."
        ) from error
    return folder / name
