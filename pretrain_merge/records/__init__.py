"""What was measured: records, their lines of JSON, and where they are shown."""

from pretrain_merge.records.jsonl import append_record, keep_records_until, read_records
from pretrain_merge.records.record import (
    FORECAST,
    GAP_CLOSED,
    RAW,
    Expected,
    MergeRecord,
    Metrics,
    Recipe,
    gaps_closed,
    metric_name,
)

__all__ = [
    "FORECAST",
    "GAP_CLOSED",
    "RAW",
    "Expected",
    "MergeRecord",
    "Metrics",
    "Recipe",
    "append_record",
    "gaps_closed",
    "keep_records_until",
    "metric_name",
    "read_records",
]
