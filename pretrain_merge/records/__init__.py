"""What was measured: records, their lines of JSON, and where they are shown."""

from pretrain_merge.records.jsonl import append_late, append_record, keep_records_until, read_records
from pretrain_merge.records.late import PUBLISHED, Late
from pretrain_merge.records.record import (
    EVALUATION,
    FORECAST,
    GAP_CLOSED,
    RAW,
    SPAN,
    Choice,
    Expected,
    MergeRecord,
    Metrics,
    Recipe,
    gaps_closed,
    is_plain,
    metric_name,
    span_of,
)

__all__ = [
    "EVALUATION",
    "FORECAST",
    "GAP_CLOSED",
    "PUBLISHED",
    "RAW",
    "SPAN",
    "Choice",
    "Expected",
    "Late",
    "MergeRecord",
    "Metrics",
    "Recipe",
    "append_late",
    "append_record",
    "gaps_closed",
    "is_plain",
    "keep_records_until",
    "metric_name",
    "read_records",
    "span_of",
]
