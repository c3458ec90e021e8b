"""Evaluation: metrics of the tutorial world with exact truth, suites of held-out requests, judges, reports."""

from loom_jax.evaluate.intervals import Interval, estimate, paired_difference, wilson
from loom_jax.evaluate.judge import (
    ChatJudge,
    Judge,
    Sequenced,
    UnreachableError,
    Verdict,
    WorldJudge,
    fingerprint,
    read_sequences,
    read_verdict,
)
from loom_jax.evaluate.metrics import METRICS, Measurement, Outcome, Score, f1, measure, shows, summarise, values_of
from loom_jax.evaluate.report import MEASUREMENTS, PAGE, SCORES, sample_sheet, write_report
from loom_jax.evaluate.suite import GENERATED_AS, Make, WorldSuite, collect, condition_pictures, run_suite

__all__ = [
    "GENERATED_AS",
    "MEASUREMENTS",
    "METRICS",
    "PAGE",
    "SCORES",
    "ChatJudge",
    "Interval",
    "Judge",
    "Make",
    "Measurement",
    "Outcome",
    "Score",
    "Sequenced",
    "UnreachableError",
    "Verdict",
    "WorldJudge",
    "WorldSuite",
    "collect",
    "condition_pictures",
    "estimate",
    "f1",
    "fingerprint",
    "measure",
    "paired_difference",
    "read_sequences",
    "read_verdict",
    "run_suite",
    "sample_sheet",
    "shows",
    "summarise",
    "values_of",
    "wilson",
    "write_report",
]
