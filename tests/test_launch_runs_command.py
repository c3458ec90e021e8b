"""`loom runs` and `loom sweep`: what they read from run folders, and the commands that a sweep runs."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loom_jax import cli
from loom_jax.commands import runs, sweep
from loom_jax.commands.runs_plot import read_series
from loom_jax.core import HEARTBEATS, HeartbeatFile, InputError, LoomError


def make_run(folder: Path, steps: int, state: Any = "running", **train: Any) -> Path:
    """Writes the files of a run that `loom runs` reads."""
    folder.mkdir(parents=True)
    config = {"total_steps": 9, "seed": 1, "mixture": [{"weight": 2.0}], **train}
    (folder / "run.json").write_text(json.dumps({"schema_version": 1, "train": config}))
    lines = [{"step": step, "loss": 1 / step} for step in range(1, steps + 1)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 8, "lo')
    (folder / "events.ndjson").write_text('{"step": 7, "event": "goodput"}\n')
    for step in (2, 4):
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    (folder / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    for process in range(2):
        HeartbeatFile(folder, process, 9).beat(steps + process, state)
    return folder


def test_runs_are_listed_with_how_they_stand(tmp_path, capsys):
    make_run(tmp_path / "a", 5)
    make_run(tmp_path / "deep" / "b", 9, "finished", total_steps=10)
    hung = make_run(tmp_path / "deep" / "hung", 4)
    for file in (hung / HEARTBEATS).glob("*.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "time": time.time() - 4000, "host": "node7"}))
    (tmp_path / "other").mkdir()
    assert cli.main(["runs", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["run", "state", "step", "saved", "loss", "note"]
    assert lines[1] == ["a", "running", "6/9", "4", "0.2000"]
    assert lines[2] == ["deep/b", "finished", "10/10", "4", "0.1111"]
    assert lines[3][:5] == ["deep/hung", "hangs", "5/9", "4", "0.2500"]
    assert " ".join(lines[3][5:]) == "process 0 on node7 is at step 4"
    assert cli.main(["runs", str(tmp_path / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["saved"], found["loss"]) == ("a", 4, 0.2)


def test_a_folder_without_runs_and_a_spoilt_one(tmp_path, capsys):
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert f"no runs in {tmp_path}" in capsys.readouterr().out
    assert cli.main(["runs", str(tmp_path / "none")]) == 2
    (tmp_path / "spoilt").mkdir()
    (tmp_path / "spoilt" / "run.json").write_text("{")
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert "cannot be read" in capsys.readouterr().out


def test_the_losses_of_runs_are_drawn(tmp_path, capsys):
    with_parts = make_run(tmp_path / "a", 3)
    lines = [{"step": step, "loss": 3 / step, "ce": 1 / step, "mse": 2 / step} for step in range(1, 121)]
    (with_parts / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out = {"step": 50, "event": "held_out", "held_out/ce": 0.5, "held_out/mse": 0.7}
    (with_parts / "events.ndjson").write_text(json.dumps(held_out) + "\n")
    make_run(tmp_path / "b", 5)
    series = read_series(with_parts)
    assert set(series) == {"ce", "mse", "held_out/ce", "held_out/mse"}
    assert series["mse"][0][-1] == 120 and series["held_out/mse"][1].tolist() == [0.7]
    assert cli.main(["runs", str(tmp_path), "--plot", str(tmp_path / "new" / "curves.svg")]) == 0
    drawn = (tmp_path / "new" / "curves.svg").read_text()
    assert drawn.count('<g id="axes_') == 3  # text, pictures, and a run that logs neither
    assert capsys.readouterr().out.endswith("curves.svg\n")


def test_an_autoencoder_is_a_run_too(tmp_path, capsys):
    run = tmp_path / "vae"
    run.mkdir()
    (run / "autoencoder.json").write_text(json.dumps({"config": {"total_steps": 40, "seed": 2}}))
    lines = [{"step": step, "loss": 3 / step, "mse": 2 / step, "pixel_error": 1 / step} for step in range(1, 41)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert set(read_series(run)) == {"pixel_error"}  # its mse is not that of a velocity
    assert cli.main(["runs", str(tmp_path), "--plot", str(tmp_path / "curves.svg")]) == 0
    assert "finished  40/40" in capsys.readouterr().out
    assert (tmp_path / "curves.svg").read_text().count('<g id="axes_') == 1


@pytest.mark.parametrize(("file", "message"), [("curves.txt", "must end in"), ("run.json/curves.png", "cannot be")])
def test_a_picture_that_cannot_be_drawn_is_refused(file, message, tmp_path, capsys):
    run = make_run(tmp_path / "a", 3)
    assert cli.main(["runs", str(run), "--plot", str(run / file)]) == 2
    assert message in capsys.readouterr().err


def test_two_runs_are_compared_by_key(tmp_path, capsys):
    left = make_run(tmp_path / "a", 3)
    right = make_run(tmp_path / "b", 3, seed=2, mixture=[{"weight": 2.0, "name": "x"}])
    assert cli.main(["runs", "diff", str(left), str(right)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["key", str(left), str(right)], ["seed", "1", "2"], ["mixture.0.name", "-", "'x'"]]
    assert cli.main(["runs", "diff", str(left), str(left)]) == 0
    assert "the same" in capsys.readouterr().out
    assert cli.main(["runs", "diff", str(left), str(tmp_path)]) == 2
    assert "is not a training run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=1e-4,3e-4", ["1e-4", "3e-4"]),
        ("a=[1,2],(3,4),{'b': 1, 'c': 2}", ["[1,2]", "(3,4)", "{'b': 1, 'c': 2}"]),
        ("a='x,y',z=1", ["'x,y'", "z=1"]),
    ],
)
def test_values_of_a_sweep(text, values):
    assert sweep.parse_values(text) == (text.partition("=")[0], values)


@pytest.mark.parametrize("text", ["a", "a=", "=1"])
def test_values_that_are_none(text):
    with pytest.raises(InputError, match="expected KEY=A,B"):
        sweep.parse_values(text)


def test_all_combinations_are_run_each_in_its_folder(tmp_path, capsys):
    base = ["--config", "c.py", "--workdir", str(tmp_path), "--config.total_steps=3"]
    argv = [*base, "--set", "optimizer.learning_rate=1e-4,3e-4", "--set", "data.seed=1,2", "--set", "seed=5"]
    assert sweep.main([*argv, "--dry-run"]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [command[:4] for command in commands] == [[sys.executable, "-m", "loom_jax.cli", "train"]] * 4
    assert commands[1][4:] == [
        *("--config", "c.py", "--workdir", str(tmp_path / "learning_rate=1e-4,data.seed=2,seed=5")),
        *("--config.total_steps=3", "--config.optimizer.learning_rate=1e-4", "--config.data.seed=2", "--config.seed=5"),
    ]
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="--set seed: given twice"):
        sweep.main([*base, "--set", "seed=1", "--set", "seed=2"])
    with pytest.raises(InputError, match="'seed=1': give each value once"):
        sweep.main([*base, "--set", "seed=1,1"])
    with pytest.raises(InputError, match="needs --config FILE and at least one --set"):
        sweep.main(base)


STOPPING = """
import signal, sys, time
from pathlib import Path
workdir = Path(sys.argv[sys.argv.index("--workdir") + 1])
asked = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: asked.append(1))
(workdir / "begun").touch()
while not asked:
    time.sleep(0.02)
time.sleep(1)
(workdir / "saved").touch()
"""


HEARING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in the background ignore
from loom_jax.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_asked_to_stop_lets_its_run_save_first(tmp_path, how):
    (tmp_path / "runner.py").write_text(STOPPING)
    launcher = shlex.join([sys.executable, str(tmp_path / "runner.py")])
    command = [sys.executable, "-c", HEARING, "sweep", "--config", "c.py", "--workdir", str(tmp_path)]
    command += ["--set", "seed=1,2", "--launcher", launcher]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "seed=1" / "begun").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
    else:
        process.send_signal(how)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "asked to stop; the same command goes on" in errors
    assert (tmp_path / "seed=1" / "saved").exists() and not (tmp_path / "seed=2").exists()


RUNNER = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from tests.test_launch_runs_command import make_run
import shutil
workdir = Path(sys.argv[sys.argv.index("--workdir") + 1])
(workdir.parent / "calls").open("a").write(workdir.name + "\\n")
if "seed=2" in workdir.name and not (workdir.parent / "mended").exists(): sys.exit(1)
record = (workdir / "sweep.json").read_text(); shutil.rmtree(workdir)
make_run(workdir, 9, "finished"); (workdir / "sweep.json").write_text(record)
"""


def test_a_sweep_goes_on_and_makes_one_table(tmp_path, capsys):
    (tmp_path / "runner.py").write_text(RUNNER.format(root=str(Path(__file__).resolve().parents[1])))
    launcher = shlex.join([sys.executable, str(tmp_path / "runner.py")])
    argv = ["--config", "c.py", "--workdir", str(tmp_path), "--set", "seed=1,2,3", "--launcher", launcher]
    with pytest.raises(LoomError, match="1 of 3 runs failed: seed=2"):
        sweep.main(argv)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("run ")]
    assert lines[0][:3] == ["seed", "state", "step"]
    assert [line[:2] for line in lines[1:]] == [["1", "finished"], ["2", "unknown"], ["3", "finished"]]
    (tmp_path / "mended").touch()
    assert sweep.main(argv) == 0
    assert (tmp_path / "calls").read_text().split() == ["seed=1", "seed=2", "seed=3", "seed=2"]
    assert sweep.main(["--workdir", str(tmp_path), "--table"]) == 0
    assert runs.main([str(tmp_path)]) == 0
    assert "seed=3" in capsys.readouterr().out
    with pytest.raises(InputError, match="no command 'nothing-like-it'"):
        sweep.main([*argv[:-1], "nothing-like-it", "--set", "data.seed=1"])
