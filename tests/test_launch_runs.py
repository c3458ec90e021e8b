"""Training jobs of several processes, for real: killed, stopped and requeued, they end as if nothing had happened."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loom_jax.checkpoint import read_params, step_path, stored_params
from loom_jax.core import read_heartbeats
from loom_jax.launch import JobDescription, LocalJob, Patience, render_job
from tests.flags import xla_flags
from tests.local_slurm import find, local_slurm, missing

ROOT = Path(__file__).resolve().parents[1]
STEPS = 16
SMALL = (
    f"total_steps={STEPS}",
    "save.every=4",
    "save.keep_last=9",
    "model.decoder.num_layers=1",
    "model.vit.num_layers=1",
    "data.budget={'und': 256, 'gen': 160, 'vit': 160}",
    "data.canvases=[{'height': 128, 'width': 128, 'count': 2}]",
    "data.mixture=[{'name': 't2i', 'source': 'synthetic', 'recipe': 't2i', 'weight': 1.0}]",
    "watch.drift_every=5",
)
MINUTES = 60.0
# Only process 0 finds its programs in jax's cache, so compiling should cost little.
ENVIRONMENT = {"XLA_FLAGS": xla_flags(), "PYTHONPATH": str(ROOT)}
pytestmark = pytest.mark.slow


def job(workdir: Path, processes: int = 2) -> JobDescription:
    # Copies of all parts to be compared; but of four processes, groups of two would meet for the first time in a step.
    preset = "hsdp" if processes == 2 else "fsdp"
    overrides = (*SMALL, f"mesh.preset={preset}", f"data.shards={processes}", f"data.rows={processes}")
    config = str(ROOT / "configs" / "tiny.py")
    return JobDescription(
        config=config,
        workdir=str(workdir),
        overrides=overrides,
        accelerator="cpu",
        tasks_per_node=processes,
        python=sys.executable,
        env=ENVIRONMENT,
    )


def run(given: JobDescription, processes: int, say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Runs a job by the local launcher; returns what was said."""
    lines: list[str] = []

    def hear(line: str) -> None:
        lines.append(f"{time.monotonic():.1f} {line}")
        say(line)

    assert LocalJob(given, processes, Patience(), hear).run() == 0, "\n".join(lines)
    return lines


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Returns a function: number of processes -> the folder of a run that nothing happened to."""
    done: dict[int, Path] = {}

    def folder(processes: int) -> Path:
        if processes not in done:
            done[processes] = tmp_path_factory.mktemp(f"reference{processes}")
            run(job(done[processes], processes), processes)
        return done[processes]

    return folder


def assert_same_end(left: Path, right: Path) -> None:
    """Both runs have come to the last step, with the same bits: parameters, averages, optimizer."""
    states = []
    for folder in (left, right):
        path = step_path(folder, STEPS)
        states.append(read_params(path, stored_params(path)))
    assert states[0].keys() == states[1].keys() and any("trainable" in name for name in states[0])
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name], err_msg=name)


def steps_of(folder: Path) -> list[int]:
    """The steps in the log of a run, in order."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def wait_for(what: Callable[[], Any], why: str, minutes: float = 25) -> Any:
    deadline = time.monotonic() + minutes * MINUTES
    while not (found := what()):
        assert time.monotonic() < deadline, why
        time.sleep(0.05)
    return found


def goodput(folder: Path) -> dict[str, float]:
    """The shares at the end of a run."""
    line = json.loads((folder / "events.ndjson").read_text().splitlines()[-1])
    assert line["event"] == "goodput"
    return {name.removeprefix("goodput/"): share for name, share in line.items() if name.startswith("goodput/")}


@pytest.mark.parametrize("processes", [2, 4])
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(uninterrupted, tmp_path, processes):
    expected = uninterrupted(processes)
    pids: dict[int, int] = {}
    killed: list[float] = []

    def note(line: str) -> None:
        if found := re.fullmatch(r"\[launch\] process (\d+) has pid (\d+)", line):
            pids[int(found[1])] = int(found[2])

    def kill() -> None:
        wait_for(lambda: max(steps_of(tmp_path), default=0) >= 6, "the run did not get to step 6")
        killed.append(time.monotonic())
        os.kill(pids[1], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    lines = run(job(tmp_path, processes), processes, note)
    thread.join()
    said = [line.split(" ", 1) for line in lines]
    (again,) = [float(when) for when, text in said if "starts again from the last checkpoint" in text]
    assert any("process 1 was killed by SIGKILL: ending the others" in text for _, text in said)
    assert again - killed[0] < MINUTES, "the others must end within a minute"
    assert any(re.search(r"\[0\] .*goes on after step (4|8)", text) for _, text in said), lines
    assert_same_end(expected, tmp_path)
    assert {beat.state for beat in read_heartbeats(tmp_path)} == {"finished"}
    shares = goodput(tmp_path)
    assert sum(shares.values()) == pytest.approx(1, abs=0.02) and shares["restart"] > 0


def test_slurm_requeues_a_job_that_was_asked_to_stop(uninterrupted, tmp_path):
    if (lack := missing()) is not None:
        pytest.skip(lack)
    expected = uninterrupted(2)
    workdir, script = tmp_path / "run", tmp_path / "job.sbatch"
    script.write_text(render_job("slurm", job(workdir)))
    (tmp_path / "slurm").mkdir()
    with local_slurm(tmp_path / "slurm") as slurm:
        number = slurm("sbatch", "--parsable", f"--chdir={tmp_path}", str(script)).strip()
        log = tmp_path / f"loom-{number}.log"

        def reached(step: int) -> bool:
            state = slurm.job(number)["JobState"]
            assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), f"{state}: {log.read_text()[-5000:]}"
            return max(steps_of(workdir), default=0) >= step

        wait_for(lambda: reached(5), "the job did not get to step 5")
        slurm("scancel", "--signal=TERM", number)
        wait_for(lambda: slurm.job(number)["Restarts"] == "1", f"not requeued: {log.read_text()[-5000:]}", 10)
        stopped = max(steps_of(workdir))
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        wait_for(lambda: slurm.job(number)["JobState"] in ended, f"did not end: {log.read_text()[-5000:]}")
        state = slurm.job(number)["JobState"]
    text = log.read_text()
    assert state == "COMPLETED", text[-5000:]
    assert stopped < STEPS and "the tasks ended with status 75" in text
    assert "requeued, to go on from the last checkpoint" in text
    assert f"0: stopped after step {stopped} of {STEPS}, with a checkpoint" in text
    assert f"goes on after step {stopped}" in text
    assert_same_end(expected, workdir)


def test_mpirun_starts_the_same_job(uninterrupted, tmp_path):
    if find("mpirun") is None:
        pytest.skip("no mpirun on this machine: apt-get install openmpi-bin")
    expected = uninterrupted(2)
    script = tmp_path / "job.sh"
    script.write_text(render_job("openmpi", job(tmp_path / "run")))
    command = ["bash", str(script), "--allow-run-as-root", "--oversubscribe"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        wait_for(lambda: max(steps_of(tmp_path / "run"), default=0) >= 6, "the run did not get to step 6")
        os.kill(read_heartbeats(tmp_path / "run")[1].pid, signal.SIGKILL)
        status = process.wait(timeout=25 * MINUTES)
    text = (tmp_path / "log").read_text()
    assert status == 0, text[-5000:]
    assert "starts again from the last checkpoint" in text
    assert_same_end(expected, tmp_path / "run")
