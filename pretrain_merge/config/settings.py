"""A checked configuration with every word of it parsed, once: cadences, views and forecasts as values.

What asks for a configuration takes one of these and parses nothing itself.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain_merge.cadence import Cadence
from pretrain_merge.config.schema import ForecastConfig, MergeConfig, WindowConfig
from pretrain_merge.config.views import View


@dataclass(frozen=True)
class WindowSettings:
    """Which snapshots are taken, kept and merged. All that `RollingMerger` needs.

    Attributes:
        config: The keys that are values as they stand.
        cadence: When snapshots are due.
        merge_cadence: When merges are due; that of snapshots where none was given.
        views: Named merges.
    """

    config: WindowConfig
    cadence: Cadence
    merge_cadence: Cadence
    views: tuple[View, ...]


@dataclass(frozen=True)
class Forecast:
    """One forecast of an annealed metric.

    Attributes:
        config: Its keys, with defaults filled in.
        num_intervals: Length of its anneal as a number of intervals between snapshots; None: nobody asked for a length,
            and it is what the longest mean spans at each merge point.
    """

    config: ForecastConfig
    num_intervals: float | None


@dataclass(frozen=True)
class Settings(WindowSettings):
    """All that `ModelMerging` needs.

    Attributes:
        config: As above, and what YAML says of evaluation, files and names.
        save_cadence: When merged models are saved periodically; None: never.
        forecasts: By name.
    """

    config: MergeConfig
    save_cadence: Cadence | None
    forecasts: Mapping[str, Forecast]

    @property
    def cadences(self) -> list[Cadence]:
        """Everything that is due at some time, that of snapshots first."""
        return [self.cadence, self.merge_cadence, *([self.save_cadence] if self.save_cadence is not None else [])]

    def window_in(self, folder: Path, more_views: Iterable[View] = ()) -> WindowSettings:
        """Those of the window of a run.

        Args:
            folder: Of the run; a disk store writes there unless a folder was given.
            more_views: Views that are measured besides.
        """
        store_folder = Path(self.config.store_folder or folder / "window").absolute()  # for good, should the run chdir
        # a copy: the configuration itself is saved with merged models as the user wrote it
        config = replace(self.config, store_folder=str(store_folder))
        return WindowSettings(config, self.cadence, self.merge_cadence, (*self.views, *more_views))
