"""What a run writes down: metrics, timers, sinks, rollout records, the curve, the report."""

from tandem.journal.curve import draw
from tandem.journal.journal import Journal, read_metrics
from tandem.journal.metrics import METRICS, document_metrics, repeatable, throughput
from tandem.journal.report import Summary, exported_step, sample_answers, visible
from tandem.journal.timer import Timer

__all__ = [
    "METRICS",
    "Journal",
    "Summary",
    "Timer",
    "document_metrics",
    "draw",
    "exported_step",
    "read_metrics",
    "repeatable",
    "sample_answers",
    "throughput",
    "visible",
]
