"""The one runner of the benchmarks, and those that no other test file runs."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.__main__ import BENCHMARKS, main
from tests.sources import ROOT, tracked


def test_every_benchmark_is_listed_and_has_help(capsys):
    names = {name.removeprefix("benchmarks/").removesuffix(".py") for name in tracked("benchmarks")}
    assert set(BENCHMARKS) == names - {"__init__", "__main__", "report", "accelerator_peer", "cpu_step_peer"}
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in BENCHMARKS)
    for name in BENCHMARKS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert f"python -m benchmarks {name}" in capsys.readouterr().out


def test_an_unknown_benchmark_is_named(capsys):
    assert main(["speed"]) == 2
    assert "'speed'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("accelerator", "work"),
        ("attention", "backend"),
        ("compilation", "layers"),
        ("packing", "data"),
        ("remat", "remat"),
        ("sampling", "way"),
        ("training", "what"),
    ],
)
def test_a_benchmark_runs(name, column, tmp_path):
    out = tmp_path / "new" / "figures.json"
    command = [sys.executable, "-m", "benchmarks", name, "--smoke", "--out", str(out)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())
    assert figures["device"] and figures["date"] and figures["rows"]
    assert all(str(row[column])[:8] in done.stdout for row in figures["rows"])
