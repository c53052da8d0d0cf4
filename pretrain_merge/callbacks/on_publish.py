"""What the user wants done with each model that is published: started beside training, its numbers brought home.

Each folder is handed over once: what came of it is noted in the folder, so that a run that goes on from an earlier
checkpoint, or was killed, neither does it again nor forgets it. Rank 0 alone does it. This module knows folders, the
note in them and where numbers go; processes are the business of `runtime.errands`.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from pretrain_merge.callbacks.fit import Fit
from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic, untrusted
from pretrain_merge.merged_models.provenance import read_provenance
from pretrain_merge.records import Late
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.errands import Errand, Errands, Outcome, refuse_missing_program
from pretrain_merge.runtime.log import logger

NOTE, LOG = "on_publish.json", "on_publish.log"
_ASKED_EVERY = 0.2  # seconds, at the end of a run


class OnPublish:
    """The errands of one run.

    Args:
        fit: With what is to be done, and how long it may take.
        show: Called with numbers as they come, on rank 0.

    Raises:
        ConfigError: There is no such program on this host.
    """

    def __init__(self, fit: Fit, show: Callable[[Late], None]) -> None:
        self._fit, self._show = fit, show
        self._timeout = fit.config.on_publish_timeout
        self._known: list[Late] = []  # to be shown once the loggers can be reached, which an evaluation hides
        self._errands: Errands | None = None  # on rank 0, where there is something to be done
        if fit.on_publish is not None and ranks.rank() == 0:
            refuse_missing_program(fit.on_publish)
            self._errands = Errands(fit.on_publish, self._timeout, lambda errand: errand.folder / LOG)

    def published(self, folder: Path, view: str, step: int) -> None:
        """A model is whole on disk; hand it over unless that was done before, and never wait."""
        if self._errands is None:
            return
        note = _read_note(folder)
        if note is None:
            self._errands.add(Errand(folder, step, view))
        elif note:  # the record of this step is written anew
            self._known.append(Late(self._fit.config.name, step, view, note))

    def go_on(self, folders: Iterable[Path]) -> None:
        """Hand over what the run before had published and did not come to."""
        for folder in folders if self._errands is not None else ():
            if _read_note(folder) is None:
                try:
                    about = read_provenance(folder)
                except CheckpointError:
                    continue
                self.published(folder, str(about.get("view")), int(about.get("step", 0)))

    def is_using(self, folder: Path) -> bool:
        """Whether it must stay, since it waits or is being worked on."""
        return self._errands is not None and any(errand.folder == folder for errand in self._errands.open)

    def collect(self) -> None:
        """Show the numbers that have come, and say of what failed so, once."""
        known, self._known = self._known, []
        for late in known:
            self._show(late)
        for outcome in self._errands.ended() if self._errands is not None else ():
            step, view = outcome.errand.step, outcome.errand.view
            _write_note(outcome)
            if outcome.numbers:
                self._show(Late(self._fit.config.name, step, view, outcome.numbers))
            if outcome.failure:
                self._fit.notices.warn(
                    "on_publish",
                    f"on_publish failed for {outcome.errand.folder}: {outcome.failure}. Training goes on; "
                    f"later failures are noted as {NOTE} in their folders, and what was said is in {LOG} there.",
                )

    def finish(self) -> None:
        """Training has ended: wait for what is left, as long as one errand may take. Collective."""
        left = len(self._errands.open) if self._errands is not None else 0
        until = time.monotonic() + self._timeout
        if left:
            logger.info(f"waits for on_publish of {left} folders, {self._timeout:g} seconds at most.")
        # all ranks ask again and again, since none of them may stay away from the others for so long
        while ranks.any_rank(self._errands is not None and bool(self._errands.open) and time.monotonic() < until):
            time.sleep(_ASKED_EVERY)
            self.collect()
        self.collect()

    def close(self) -> None:
        """End what is under way."""
        if self._errands is None:
            return
        self.collect()
        if left := self._errands.open:
            self._fit.notices.warn(
                "on_publish left",
                f"on_publish did not come to its end for {', '.join(item.folder.name for item in left)}. A run that is "
                f"resumed hands these over again.",
            )
        self._errands.close()


def _read_note(folder: Path) -> Mapping[str, float] | None:
    """The numbers that came of a folder; None where it was not handed over, or not to its end."""
    try:
        found = untrusted.read_json(folder / NOTE)
    except (OSError, ValueError):
        return None
    numbers = found.get("numbers") if isinstance(found, dict) else None
    if not isinstance(numbers, dict) or not all(isinstance(value, int | float) for value in numbers.values()):
        return None
    return {str(name): float(value) for name, value in numbers.items()}


def _write_note(outcome: Outcome) -> None:
    note = {key: value for key, value in asdict(outcome).items() if key != "errand"}
    try:
        atomic.write(outcome.errand.folder / NOTE, json.dumps(note, indent=2, sort_keys=True, default=str) + "\n")
    except OSError as error:  # a full disk: the numbers are shown all the same, and would be asked for again
        logger.warning(f"cannot write {outcome.errand.folder / NOTE}: {error}.")
