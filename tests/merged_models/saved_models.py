"""Names of the models that a run left."""

from pathlib import Path

from pretrain_merge.merged_models.choosing import BEST


def saved(folder: Path) -> list[str]:
    merged = folder / "merged"
    return sorted(path.name for path in merged.iterdir() if path.name != BEST) if merged.exists() else []
