"""What the benchmarks share: flags, timing in turns, a table and a JSON file."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

GIB, MIB = 2**30, 2**20


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the figures as JSON")
    return parser


def best_and_median(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Returns the least and the median seconds of each call.

    They take turns, so that a busy machine slows all of them; the first turn compiles and does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                times[name].append(time.perf_counter() - begin)
    return {name: (min(found), float(np.median(found))) for name, found in times.items()}


def report(
    out: Path | None, title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, **facts: Any
) -> None:
    """Prints rows as a table, and writes them with the facts and the machine to `out`.

    Args:
      columns: which of a row are printed; by default all of the first.
    """
    table = Table(title=title)
    chosen = list(columns or rows[0])
    for column in chosen:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in chosen))
    Console(width=160).print(table)
    if out is not None:
        machine = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "device": jax.devices()[0].device_kind,
            "cpus": os.cpu_count(),
            "jax": jax.__version__,
        }
        text = json.dumps({"title": title, **machine, **facts, "rows": list(rows)}, indent=1)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
