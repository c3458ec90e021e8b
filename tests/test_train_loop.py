"""Runs from beginning to end: the log, exact resume after a signal or a kill, bad steps, held-out loss, replay."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loom_jax.checkpoint import RunCheckpoints, load_module, read_folder, read_meta, saved_steps
from loom_jax.converters import to_orbax
from loom_jax.core import CheckpointError, ConfigError, InputError, LoomError
from loom_jax.models import LoomModel
from loom_jax.parallel import flatten_params
from loom_jax.train import HeldOut, Metrics, TrainLog, build_job, replay, train
from tests import training
from tests.reference import CKPT

ROOT = Path(__file__).resolve().parents[1]
WATCHED = ("watch.profile_start=2", "watch.profile_steps=2")


class After:
    """A hook that does something after one step."""

    def __init__(self, step, action):
        self._step, self._action = step, action

    def due(self, step):
        return step == self._step

    def run(self, step, state):
        self._action()


def after(step, action):
    return lambda job, workdir: [After(step, action)]


def lines_of(workdir, name="metrics.jsonl"):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def steps_of(workdir):
    """Lines of the log that say how a step went, without what depends on the clock."""
    timed = ("second", "share", "flops")
    return [{k: v for k, v in line.items() if not any(word in k for word in timed)} for line in lines_of(workdir)]


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run of six steps without a break, and its last state."""
    workdir = tmp_path_factory.mktemp("whole")
    state = jax.device_get(train(training.config(*WATCHED), workdir))
    return workdir, state


def copy_of(whole, tmp_path, *steps):
    """A copy of the run that has only some of its checkpoints."""
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    for step in saved_steps(workdir):
        if step not in steps:
            shutil.rmtree(workdir / "checkpoints" / str(step))
    return workdir


def assert_same_state(state, expected):
    """Bit for bit, all of it."""
    found, expected = (flatten_params(jax.device_get(s))[0] for s in (state, expected))
    assert found.keys() == expected.keys() and len(found) > 100
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def test_the_log_tells_what_a_user_wants_to_know(whole):
    workdir, state = whole
    lines = lines_of(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and state.step == 6
    assert list(workdir.rglob("*.jsonl")) == [workdir / "metrics.jsonl"]  # scripts read step and loss of each line
    assert [event["event"] for event in lines_of(workdir, "events.ndjson")] == ["goodput"]
    expected = ("ce", "mse", "grad_norm", "learning_rate", "step_seconds", "data_wait_share", "tflops_per_device")
    expected += ("tokens_per_second", "und_tokens_per_second", "gen_tokens_per_second", "data/fill/und")
    assert all(set(expected) <= set(line) for line in lines)
    assert all(line["loss"] == pytest.approx(line["ce"] + line["mse"]) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert any((workdir / "tensorboard").iterdir())
    assert list((workdir / "profile").rglob("*.xplane.pb"))


def test_checkpoints_are_written_and_kept_as_asked(whole):
    assert saved_steps(whole[0]) == [2, 4, 6]


def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(whole, tmp_path):
    notified = after(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = train(training.config(), tmp_path, notified)
    assert stopped.step == 3 and saved_steps(tmp_path) == [2, 3]
    state = train(training.config(), tmp_path, recipe=("other.py",))
    assert_same_state(state, whole[1])
    assert steps_of(tmp_path) == steps_of(whole[0])
    own = [RunCheckpoints(w).restore(training.base().abstract_state, step=6).own_data() for w in (tmp_path, whole[0])]
    assert own[0] == own[1]


def test_a_checkpoint_remembers_by_what_the_run_went_on(whole, tmp_path):
    def went_on(step):
        return read_meta(workdir / "checkpoints" / str(step))["went_on"]

    workdir = copy_of(whole, tmp_path, 2)
    assert went_on(2) == []
    stops = [after(step, lambda: os.kill(os.getpid(), signal.SIGTERM)) for step in (3, 4)]
    for stop in stops:  # twice by one recipe, which is told once
        train(training.config(), workdir, stop, ("other.py",))
    train(training.config(), workdir, recipe=("other.py", "save.every=3"))
    told = [(entry["after_step"], entry["recipe"], entry["devices"]) for entry in went_on(6)]
    assert told == [(2, ["other.py"], "1 cpu"), (4, ["other.py", "save.every=3"], "1 cpu")]
    assert went_on(4) == went_on(6)[:1]


UNREAD = """
import sys
from pathlib import Path
from loom_jax.train.log import console
for line in range(3):
    console().print("x" * 100_000, highlight=False, soft_wrap=True)
Path(sys.argv[1]).touch()
"""


def test_lines_that_nobody_reads_any_more_do_not_end_a_run(tmp_path):
    """As `loom train ... | tee FILE` where a Ctrl-C has ended tee."""
    command = [sys.executable, "-c", UNREAD, str(tmp_path / "went on")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and (tmp_path / "went on").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from loom_jax.train import train
from tests import training
from tests.test_train_loop import after
train(training.config(), Path(sys.argv[1]), after(5, lambda: os.kill(os.getpid(), signal.SIGKILL)))
"""


def test_a_killed_run_goes_on_bit_for_bit(whole, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert saved_steps(tmp_path)[-1] in (2, 4)  # the last save may have been under way
    begun = [line["step"] for line in steps_of(tmp_path)]
    assert begun == [1, 2, 3, 4]  # and the log knew more than the checkpoint
    state = train(training.config(), tmp_path)
    assert_same_state(state, whole[1])
    assert steps_of(tmp_path) == steps_of(whole[0])


def test_a_finished_run_does_nothing_more(whole):
    before = (whole[0] / "metrics.jsonl").read_bytes()
    state = train(training.config(*WATCHED), whole[0])
    assert_same_state(state, whole[1])
    assert len(steps_of(whole[0])) == 6 and (whole[0] / "metrics.jsonl").read_bytes().startswith(before)


def test_bad_steps_stop_the_run_which_then_goes_on_from_a_good_one(whole, tmp_path):
    workdir = copy_of(whole, tmp_path, 2)
    job = training.base()
    checkpoints = RunCheckpoints(workdir)
    good = checkpoints.restore(job.abstract_state, job.shardings)
    leaves, structure = flatten_params(good.state.trainable)
    broken = structure.unflatten([a * np.nan if n == "llm2vae/bias" else a for n, a in leaves.items()])
    checkpoints.save(3, good.state._replace(trainable=broken, step=jnp.int32(3)), good.own_data())
    checkpoints.wait()
    with pytest.raises(LoomError, match=r"2 steps in a row up to step 5 were not finite, first in \S+/\S+: look at"):
        train(training.config("watch.max_bad_steps=2"), workdir)
    events = [line for line in lines_of(workdir, "events.ndjson") if line["event"] == "skipped"]
    assert [line["step"] for line in events] == [4, 5] and events[0]["not_finite"] in job.names
    assert any(line["loss"] is None for line in lines_of(workdir))
    for step in (3, 4):  # as a user would who sees where it began
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert_same_state(train(training.config(), workdir), whole[1])


def test_held_out_loss_is_the_same_for_the_same_weights(whole):
    given = dataclasses.replace(
        training.config(),
        held_out=training.config("data.seed=7").data,
        watch=dataclasses.replace(training.config().watch, held_out_every=4, held_out_batches=2),
    )
    job = dataclasses.replace(training.base(), config=given)
    measure = HeldOut(job)
    assert [step for step in range(1, 13) if measure.due(step)] == [4, 8, 12]
    first, second = (jax.device_put(s, job.shardings) for s in (whole[1], training.start()))
    found = measure.measure(first)
    assert found == measure.measure(first)  # exactly: the same rows, timesteps and noise
    assert found == measure.measure(first._replace(step=jnp.int32(99)))
    assert found != measure.measure(second) and set(found) == {"held_out/ce", "held_out/mse"}
    longer = dataclasses.replace(given.watch, held_out_batches=1)
    assert found != HeldOut(dataclasses.replace(job, config=dataclasses.replace(given, watch=longer))).measure(first)


def test_a_step_can_be_looked_at_again(whole):
    workdir, _ = whole
    folder = replay(training.config(), workdir, 5)
    found = json.loads((folder / "norms.json").read_text())
    line = steps_of(workdir)[4]
    assert found["step"] == 5 and found["weights_of_step"] == 4
    norm = np.sqrt(sum(value**2 for value in found["gradient_norm"].values()))
    np.testing.assert_allclose(norm, line["grad_norm"], rtol=1e-4)
    np.testing.assert_allclose(found["losses"]["ce"] / found["losses"]["ce_count"], line["ce"], rtol=1e-4)
    assert len(found["und_layer_rms"]) == len(found["gen_layer_rms"]) == 2
    with np.load(folder / "batch.npz") as dumped:
        batch = training.train_batch(training.config(), 5)
        np.testing.assert_array_equal(dumped["batch/streams/token_ids"], batch.batch.streams.token_ids)
        np.testing.assert_array_equal(dumped["canvases/0/pixels"], batch.canvases[0].pixels)
    with pytest.raises(InputError, match="--replay-step 7: the run has steps 1 to 6"):
        replay(training.config(), workdir, 7)
    with pytest.raises(CheckpointError, match="is not a training run"):
        replay(training.config(), workdir / "absent", 5)


@functools.cache
def made_metrics():
    zero = np.float32(0)
    values = dict.fromkeys(Metrics._fields, zero) | {"finite": np.ones(3, bool), "bad_steps": np.int32(0)}
    return Metrics(**values)


def test_metrics_are_read_one_step_late(tmp_path):
    class Unready:
        """An array that must not be looked at yet."""

        def __array__(self, *args, **options):
            raise AssertionError("the log looked at a step that may still be running")

    with TrainLog(tmp_path, training.config(), ["a", "b"]) as log:
        log.put(1, made_metrics()._replace(loss=np.float32(3)), {})
        assert lines_of(tmp_path) == []
        log.put(2, made_metrics()._replace(loss=np.float32(np.nan)), {})
        assert [line["loss"] for line in lines_of(tmp_path)] == [3]
        log.put(3, made_metrics()._replace(loss=Unready()), {})
        assert [line["loss"] for line in lines_of(tmp_path)] == [3, None]  # valid JSON has no NaN
        log._pending = None


def test_lines_are_written_as_often_as_asked(tmp_path):
    with TrainLog(tmp_path, training.config("watch.log_every=3"), ["a", "b"]) as log:
        for step in range(1, 8):
            log.put(step, made_metrics(), {})
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 3, 6]


def test_a_run_that_goes_on_drops_the_lines_that_it_repeats(tmp_path):
    for name in ("metrics.jsonl", "events.ndjson"):
        (tmp_path / name).write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    with TrainLog(tmp_path, training.config(), ["a", "b"], first=2) as log:
        log.put(3, made_metrics(), {})
        log.event(3, "held_out", {"held_out/ce": 1.0})
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]
    expected = [{"step": 1}, {"step": 2}, {"step": 3, "event": "held_out", "held_out/ce": 1.0}]
    assert lines_of(tmp_path, "events.ndjson") == expected


def test_a_job_begins_at_the_weights_of_a_folder(tmp_path):
    folder = tmp_path / "converted"
    to_orbax(CKPT, folder)
    model = read_folder(folder).config
    given = dataclasses.replace(training.config(f"init_from='{folder}'"), model=model)
    with pytest.raises(ConfigError, match=r"model.max_latent_size=\d+, but .* holds a model with \d+: give that value"):
        build_job(dataclasses.replace(given, model=dataclasses.replace(model, max_latent_size=5)))
    job = build_job(given)
    state = job.new_state()
    stored = load_module(read_folder(folder), "model", lambda c: LoomModel(c, rngs=nnx.Rngs(0)))
    expected = flatten_params(nnx.state(stored))[0]
    found = flatten_params(state.trainable)[0] | flatten_params(state.frozen)[0]
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].dtype == jnp.float32
        np.testing.assert_array_equal(found[name], np.asarray(leaf, np.float32), err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.trainable)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)  # or the step could not donate them
