"""Parity: recompute every recorded array of the PyTorch original with this framework, and say how far off each is."""

from loom_jax.converters.parity.records import Checked, Records
from loom_jax.converters.parity.report import compare, measure, write_report

__all__ = ["Checked", "Records", "compare", "measure", "write_report"]
