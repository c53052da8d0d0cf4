"""Merge snapshots of a pre-training run as it trains, and measure the merged model beside the raw one.

This module knows the public names and where they live. It loads a name's module when the name is first used, so that
`import pretrain_merge` pulls in no trainer, logger, plotting library or compiler.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pretrain_merge import errors as errors
from pretrain_merge._version import __version__ as __version__

if TYPE_CHECKING:
    from pretrain_merge.callbacks import ModelMerging as ModelMerging
    from pretrain_merge.callbacks import SpikeRecovery as SpikeRecovery
    from pretrain_merge.forecast import forecast_anneal as forecast_anneal
    from pretrain_merge.merged_models.merged import load_merged as load_merged
    from pretrain_merge.merged_models.merged import save_merged as save_merged
    from pretrain_merge.merged_models.starting import start_from_merged as start_from_merged
    from pretrain_merge.merging.rolling_merger import RollingMerger as RollingMerger
    from pretrain_merge.offline.merge import merge_checkpoints as merge_checkpoints
    from pretrain_merge.offline.sweep import sweep_checkpoints as sweep_checkpoints
    from pretrain_merge.runtime.evaluating import is_evaluating_merge as is_evaluating_merge

_MODULE_OF = {
    "ModelMerging": "pretrain_merge.callbacks",
    "SpikeRecovery": "pretrain_merge.callbacks",
    "RollingMerger": "pretrain_merge.merging.rolling_merger",
    "load_merged": "pretrain_merge.merged_models.merged",
    "merge_checkpoints": "pretrain_merge.offline.merge",
    "save_merged": "pretrain_merge.merged_models.merged",
    "start_from_merged": "pretrain_merge.merged_models.starting",
    "sweep_checkpoints": "pretrain_merge.offline.sweep",
    "forecast_anneal": "pretrain_merge.forecast",
    "is_evaluating_merge": "pretrain_merge.runtime.evaluating",
}

__all__ = [
    "ModelMerging",
    "RollingMerger",
    "SpikeRecovery",
    "errors",
    "forecast_anneal",
    "is_evaluating_merge",
    "load_merged",
    "merge_checkpoints",
    "save_merged",
    "start_from_merged",
    "sweep_checkpoints",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
