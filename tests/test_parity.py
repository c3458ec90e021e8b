"""The parity command on the recorded set, and on sets that are broken."""

import json
import shutil

import numpy as np
import pytest

from loom_jax.converters.parity.__main__ import EXCUSED, main
from loom_jax.converters.parity.report import compare
from loom_jax.core import run_command
from tests.reference import SET

needs_records = pytest.mark.skipif(not SET.exists(), reason="../shared/reference/bagel_tiny is not beside the checkout")


def run(*argv: str) -> int:
    return run_command("parity", main, list(argv))


@needs_records
def test_every_recorded_array_is_met_or_excused_by_name(tmp_path):
    path = tmp_path / "report.json"
    assert run(str(SET), "--report", str(path)) == 0
    report = json.loads(path.read_text())
    assert all(entry["ok"] for entry in report["arrays"])
    assert {"file", "array", "shape", "max_abs", "max_rel", "ref_rms", "tolerance", "ok"} == set(report["arrays"][0])
    named = [(e["file"], e["array"]) for kind in ("arrays", "inputs", "uncovered") for e in report[kind]]
    recorded = {
        (path.name, name)
        for path in (SET / "golden").iterdir()
        for name in (np.load(path).files if path.suffix == ".npz" else json.loads(path.read_text()))
    }
    assert len(named) == len(set(named)) and set(named) == recorded
    assert {entry["reason"] for entry in report["uncovered"]} <= set(EXCUSED.values())


@needs_records
def test_a_changed_weight_is_noticed(tmp_path):
    changed = tmp_path / "set"
    shutil.copytree(SET, changed)
    for path in changed.rglob("*"):
        path.chmod(0o755)
    arrays = dict(np.load(SET / "golden" / "time.npz"))
    arrays["embed"] = arrays["embed"] + 1e-3
    np.savez(changed / "golden" / "time.npz", **arrays)
    path = tmp_path / "report.json"
    assert run(str(changed), "--report", str(path), "--only", "time") == 1
    report = json.loads(path.read_text())
    assert [entry["array"] for entry in report["arrays"] if not entry["ok"]] == ["embed"]


@needs_records
def test_an_array_that_no_check_knows_is_an_error(tmp_path):
    changed = tmp_path / "set"
    shutil.copytree(SET, changed)
    for path in changed.rglob("*"):
        path.chmod(0o755)
    np.savez(changed / "golden" / "time.npz", **np.load(SET / "golden" / "time.npz"), novel=np.zeros(3))
    assert run(str(changed), "--report", str(tmp_path / "r.json"), "--only", "time.npz") == 1
    assert "no check covers it" in (tmp_path / "r.json").read_text()


def test_bad_usage_is_one_line(tmp_path, capsys):
    assert run(str(tmp_path / "absent"), "--report", str(tmp_path / "r.json")) == 2
    assert run() == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("parity: ") for line in lines)


def test_comparison_by_kind():
    picture = np.full((50, 60, 3), 7, np.uint8)
    off = picture.copy()
    off.flat[:9] += 1
    assert compare(off, picture, 0).ok
    off.flat[:10] += 1
    assert not compare(off, picture, 0).ok
    assert not compare(np.arange(3), np.asarray([0, 1, 3]), 1.0).ok
    assert not compare(np.zeros((2, 3)), np.zeros((3, 2)), 1.0).ok
    holes = np.asarray([1.0, np.nan, 3.0])
    assert compare(holes + 1e-6, holes, 1e-4).ok
    assert not compare(np.nan_to_num(holes), holes, 1e-4).ok
