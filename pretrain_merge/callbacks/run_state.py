"""What a Lightning checkpoint holds of ours, and whether it is there. This module knows no files and no hooks."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pretrain_merge.cadence import Progress
from pretrain_merge.errors import CheckpointError
from pretrain_merge.merged_models.retention import SavedModels
from pretrain_merge.resume.manifest import sealed, unsealed


@dataclass(frozen=True)
class RunState:
    """What a Lightning checkpoint holds of ours, as plain values (P11, P12).

    Attributes:
        progress: Counters.
        pending: Samples and tokens of a rank that are not yet in `progress`.
        lr: Learning rates of the last step, by optimizer.
        run_folder: Where the records are.
        window_folder: Where the files of the window are.
        window: Its manifest; None where it was not kept.
        lost: Why it was not kept.
        saved: Which merged models are on disk for which reason; None where the run ended before it found out.
        last_merge: Step of the last merge that was recorded; 0 before the first.
        identity: That of the run, by which it finds its files again; empty where it is not known.
    """

    progress: Progress
    pending: Mapping[str, int] = field(default_factory=dict)
    lr: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    run_folder: str = ""
    window_folder: str = ""
    window: Mapping[str, Any] | None = None
    lost: str = ""
    saved: SavedModels | None = None
    last_merge: int = 0
    identity: str = ""

    def to_plain(self) -> dict[str, Any]:
        """As Lightning's checkpoints take it."""
        return sealed(asdict(self))

    @classmethod
    def from_plain(cls, plain: object) -> "RunState":
        """The inverse of `to_plain`.

        Raises:
            CheckpointError: It is damaged.
        """
        return unsealed(cls, plain, check=_refuse_impossible)


def _refuse_impossible(state: RunState) -> None:
    if not all(index.isascii() and index.isdigit() for index in state.lr):
        raise ValueError(f"its learning rates are of optimizers {', '.join(state.lr)}")


def refuse_unclaimed_state(states: Mapping[str, object], wanted: str, callbacks: Iterable[Any]) -> None:
    """Tell a checkpoint that never had a state of ours from one that has it under another key (P21).

    Args:
        states: What the checkpoint holds of callbacks.
        wanted: The key of ours.
        callbacks: All of the Trainer's.

    Raises:
        CheckpointError: Nothing is there under that key, and a state of our form is there that no callback asks for.
    """
    claimed = {callback.state_key for callback in callbacks}
    lost = [key for key, value in states.items() if key not in claimed and _has_our_form(value)]
    if wanted not in states and lost:
        raise CheckpointError(
            f"the checkpoint has nothing under {wanted!r}, and under {lost[0]!r} a state of ModelMerging that no "
            f"callback asks for: `name` was changed, or the checkpoint is damaged. Set the name back, or resume from "
            f"another checkpoint."
        )


def _has_our_form(value: object) -> bool:
    return isinstance(value, Mapping) and {"format", "crc32", "values"} == value.keys()
