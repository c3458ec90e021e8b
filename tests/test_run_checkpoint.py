"""Checkpoints of a run: saved in the background, kept by policy, restored onto any mesh, never half there."""

import asyncio
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loom_jax.checkpoint import (
    RunCheckpoints,
    read_run,
    read_run_params,
    saved_steps,
    start_run,
    stored_params,
)
from loom_jax.core import CheckpointError, ConfigError, LoomError
from loom_jax.parallel import PreemptionNotice, flatten_params, make_mesh, shardings_for, state_shardings
from tests.flags import xla_flags
from tests.reference import CKPT
from tests.tiny import CONFIG

ROOT = Path(__file__).resolve().parents[1]


class State(NamedTuple):
    """As loom_jax.train.TrainState, which this folder may not know."""

    step: jax.Array
    trainable: nnx.State
    frozen: nnx.State
    ema: nnx.State | None
    optimizer: Any


def ramp(*shape: int, dtype: Any = jnp.float32) -> nnx.Param:
    return nnx.Param(jnp.arange(np.prod(shape)).reshape(shape).astype(dtype))


def state_of(optimizer: optax.GradientTransformation, ema: bool = True) -> State:
    trainable = nnx.State(
        {
            "lm_head": {"kernel": ramp(160, 24)},
            "decoder": {
                "norm": {"und": {"scale": ramp(160)}},
                "layers": {"und": {"gate_proj": {"kernel": ramp(3, 160, 136)}, "input_norm": {"scale": ramp(3, 160)}}},
            },
        }
    )
    frozen = nnx.State({"vit": {"layers": {"fc1": {"bias": ramp(2, 40, dtype=jnp.bfloat16)}}}})
    average = jax.tree.map(lambda a: a + 0.5, trainable) if ema else None
    updates, moments = optimizer.update(
        jax.tree.map(lambda a: 0.1 * a, trainable), optimizer.init(trainable), trainable
    )
    return State(jnp.int32(7), jax.tree.map(jnp.add, trainable, updates), frozen, average, moments)


ADAMW, ADAFACTOR = optax.adamw(0.01), optax.chain(optax.clip_by_global_norm(1.0), optax.adafactor(0.01))


def on_mesh(state: State, preset: str) -> tuple[Any, Any]:
    """Shardings of a state, and the state there."""
    where = state_shardings(state, (state.trainable, state.frozen), make_mesh(preset), preset)
    return where, jax.device_put(state, where)


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(flatten_params(left)[0].items(), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)


@pytest.mark.parametrize("optimizer", [ADAMW, ADAFACTOR], ids=["adamw", "adafactor"])
@pytest.mark.parametrize(("before", "after"), [("fsdp", "fsdp+tensor"), ("hsdp", "single")])
def test_a_state_comes_back_on_another_mesh(tmp_path, optimizer, before, after):
    state = state_of(optimizer)
    _, placed = on_mesh(state_of(optimizer), before)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(7, placed, {"row": 3, "rest": [1, 2]}, {"mesh": {"fsdp": 8}})
        for leaf in jax.tree.leaves(placed):
            leaf.delete()  # as donation does
    where, _ = on_mesh(state, after)
    restored = RunCheckpoints(tmp_path).restore(jax.eval_shape(lambda: state), where)
    assert restored.step == 7 and restored.own_data() == {"row": 3, "rest": [1, 2]}
    assert restored.meta["mesh"] == {"fsdp": 8}
    assert_same(state, restored.state)
    for array, sharding in zip(jax.tree.leaves(restored.state), jax.tree.leaves(where), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)


def test_there_is_one_leaf_a_layer_on_disk(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(ADAMW))
    stored = stored_params(tmp_path / "checkpoints" / "1")
    assert stored["optimizer/0/mu/decoder/layers/2/und/gate_proj/kernel"].shape == (160, 136)
    assert stored["frozen/vit/layers/1/fc1/bias"].dtype == jnp.bfloat16
    assert not any(leaf.shape[:1] == (3,) for leaf in stored.values())


def test_moments_lie_as_their_parameters_do():
    state = state_of(ADAFACTOR)
    mesh = make_mesh("fsdp+tensor")
    leaves, _ = flatten_params(state_shardings(state, (state.trainable, state.frozen), mesh, "fsdp+tensor"))
    kernel = "decoder/layers/und/gate_proj/kernel"
    assert leaves[f"trainable/{kernel}"].spec == jax.P(None, ("fsdp",), ("tensor",))
    assert leaves[f"ema/{kernel}"].spec == leaves[f"trainable/{kernel}"].spec
    factored = flatten_params(state)[0]
    rows = next(path for path in leaves if path.endswith(f"v_row/{kernel}"))
    columns = next(path for path in leaves if path.endswith(f"v_col/{kernel}"))
    specs = {factored[path].shape: leaves[path].spec for path in (rows, columns)}
    assert specs == {(3, 160): jax.P(None, ("fsdp",)), (3, 136): jax.P(None, ("tensor",))}
    assert all(not any(leaves[path].spec) for path in leaves if path.endswith("count") or path == "step")


@pytest.mark.parametrize("lost", ["meta", "state/d"])
def test_a_damaged_checkpoint_can_be_removed_to_go_on(tmp_path, lost):
    state = {"trainable": {"lm_head": {"kernel": jnp.ones((4, 3))}}}
    with RunCheckpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / lost)
    with pytest.raises(CheckpointError, match="checkpoints/2 .*remove it to go on from an older step"):
        RunCheckpoints(tmp_path).restore(state)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    restored = RunCheckpoints(tmp_path).restore(state)
    assert restored is not None and restored.step == 1


def test_policies_keep_the_newest_and_the_round_ones(tmp_path):
    state = {"trainable": {"lm_head": {"kernel": jnp.ones((4, 3))}}}
    checkpoints = RunCheckpoints(tmp_path, every=5, keep_last=2, keep_every=15)
    assert checkpoints.latest() is None and checkpoints.restore(state) is None
    assert [step for step in range(12) if checkpoints.due(step)] == [5, 10]
    for step in (5, 10, 15, 20, 25, 30, 35):
        checkpoints.save(step, state)
    checkpoints.save(35, state)  # again: nothing to do
    checkpoints.wait()
    assert saved_steps(tmp_path) == [15, 30, 35]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["15", "30", "35"]
    assert checkpoints.restore(state, step=15).step == 15
    with pytest.raises(CheckpointError, match="no checkpoint of step 20: there are 15, 30, 35"):
        checkpoints.restore(state, step=20)
    again = RunCheckpoints(tmp_path, every=5, keep_last=2, keep_every=15)
    with pytest.raises(CheckpointError, match="holds step 35, later than step 30: remove what is later"):
        again.save(30, state)
    again.save(35, jax.tree.map(lambda a: 2 * a, state), b"\x00\xff")
    again.wait()
    restored = again.restore(state)
    assert np.asarray(jax.tree.leaves(restored.state)[0]).max() == 2 and restored.own_data() == b"\x00\xff"
    with pytest.raises(ConfigError, match="save.keep_last=0"):
        RunCheckpoints(tmp_path, keep_last=0)


def test_weights_alone(tmp_path):
    state = state_of(ADAMW)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state)
    params = nnx.merge_state(state.trainable, state.frozen)
    abstract = jax.eval_shape(lambda: params)
    shardings = shardings_for(abstract, make_mesh("fsdp"), "fsdp")
    raw = read_run_params(tmp_path, abstract, shardings, weights="params")
    assert_same(params, raw)
    assert raw["lm_head"]["kernel"][...].sharding.shard_shape((160, 24)) == (20, 24)
    average = checkpoints.restore_params(abstract, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(
        np.asarray(average["lm_head"]["kernel"][...]), state.ema["lm_head"]["kernel"][...].astype(jnp.bfloat16)
    )
    more = nnx.merge_state(params, nnx.State({"vae2llm": {"bias": ramp(5)}}))
    with pytest.raises(CheckpointError, match="1 parameters missing: vae2llm/bias"):
        read_run_params(tmp_path, more)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state_of(ADAMW, ema=False))
    with pytest.raises(CheckpointError, match="holds no moving average .*: ask for weights `params`"):
        read_run_params(tmp_path, abstract)
    with pytest.raises(CheckpointError, match="weights 'model' are not one of"):
        read_run_params(tmp_path, abstract, weights="model")


def test_another_state_is_named(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state_of(ADAMW))
    with pytest.raises(
        CheckpointError, match=r"missing: optimizer/1/0/count, optimizer/1/0/v_row/.*give its own configuration"
    ):
        checkpoints.restore(jax.eval_shape(lambda: state_of(ADAFACTOR)))
    with pytest.raises(CheckpointError, match="8 unknown: ema/decoder/layers/0/und/gate_proj/kernel, "):
        checkpoints.restore(jax.eval_shape(lambda: state_of(ADAMW, ema=False)))
    with pytest.raises(CheckpointError, match="empty holds no complete checkpoint"):
        read_run_params(tmp_path / "empty", {})


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
import jax.numpy as jnp
from loom_jax.checkpoint import RunCheckpoints
state = {"trainable": {"lm_head": {"kernel": jnp.full((2048, 4096), 3.0)}}}
checkpoints = RunCheckpoints(Path(sys.argv[1]))
checkpoints.save(1, state, {"row": 1})
checkpoints.wait()
def kill_when_begun():
    while not list(Path(sys.argv[1], "checkpoints").glob("2.*/state/**/d/*")):
        time.sleep(0.0002)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill_when_begun, daemon=True).start()
checkpoints.save(2, state, {"row": 2})
checkpoints.wait()
time.sleep(1)
print("SURVIVED")
"""

ABSTRACT = {"trainable": {"lm_head": {"kernel": jax.ShapeDtypeStruct((2048, 4096), jnp.float32)}}}


def test_a_kill_in_the_middle_of_a_save_leaves_the_step_before(tmp_path):
    done = run_python(KILLED, str(tmp_path))
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert len(left) == 2 and "1" in left and "2" not in left, left
    checkpoints = RunCheckpoints(tmp_path)
    restored = checkpoints.restore(ABSTRACT)
    assert restored.step == 1 and restored.own_data() == {"row": 1}
    assert float(jax.tree.leaves(restored.state)[0].min()) == 3
    checkpoints.save(2, restored.state, {"row": 2})
    checkpoints.wait()
    assert checkpoints.restore(ABSTRACT).step == 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


FULL = """
import resource, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from loom_jax.checkpoint import RunCheckpoints
from loom_jax.core import InputError, LoomError
small = {"trainable": {"lm_head": {"kernel": jnp.full((4, 3), 3.0)}}}
large = {"trainable": {"lm_head": {"kernel": jax.random.normal(jax.random.key(0), (2048, 4096))}}}
checkpoints = RunCheckpoints(Path(sys.argv[1]))
checkpoints.save(1, small)
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, large)
    checkpoints.wait()
except LoomError as error:
    assert not isinstance(error, InputError)
    print("SAID", error)
assert checkpoints.latest() == 1
assert float(jax.tree.leaves(checkpoints.restore(small).state)[0].max()) == 3
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.save(2, large)
checkpoints.wait()
print("THEN", checkpoints.latest(), sorted(path.name for path in Path(sys.argv[1], "checkpoints").iterdir()))
"""


def test_a_full_disk_is_reported_and_the_step_before_restores(tmp_path):
    done = run_python(FULL, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    said = next(line for line in done.stdout.splitlines() if line.startswith("SAID"))
    assert "the checkpoint of step 2 could not be written" in said
    assert said.endswith("(File too large); step 1 is the last good one: make room or mend the place, and start again")
    assert "Traceback" not in done.stdout
    assert "THEN 2 ['1', '2']" in done.stdout


def forget_a_failure(place: str) -> None:
    """A task that fails, from code of this file, which nobody waits for."""
    code: dict[str, Any] = {}
    exec(compile("async def write():\n    raise ValueError('File too large')", place, "exec"), code)

    async def forget() -> None:
        task = asyncio.ensure_future(code["write"]())
        await asyncio.wait([task])
        del task
        gc.collect()

    asyncio.run(forget())


def test_the_arrays_that_fail_after_the_first_say_nothing_of_it(tmp_path, caplog):
    RunCheckpoints(tmp_path)
    forget_a_failure("/libraries/orbax/checkpoint/handlers.py")
    assert not caplog.records
    forget_a_failure("/libraries/another.py")
    (record,) = caplog.records
    assert record.name == "asyncio" and "/libraries/another.py" in record.getMessage()


def test_a_failure_shows_at_the_next_check(tmp_path):
    class Failed:
        def result(self, timeout: float | None) -> None:
            raise OSError(28, "No space left on device")

    checkpoints = RunCheckpoints(tmp_path)
    checkpoints._pending = 5, Failed()
    with pytest.raises(
        LoomError, match=r"step 5 .* \(\[Errno 28\] No space left on device\); there is no earlier one: make room"
    ):
        checkpoints.check()
    checkpoints.check()  # said once


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT])
def sent(request):
    """A signal, and those of its kind that come through."""
    heard = []
    before = signal.signal(request.param, lambda *_: heard.append(1))
    yield request.param, heard
    signal.signal(request.param, before)


def test_a_signal_asks_to_stop_and_its_echo_says_nothing_new(sent, capfd):
    number, heard = sent
    with PreemptionNotice() as notice:
        assert not notice.agreed()
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert notice.agreed() and notice.agreed() and not heard
    os.kill(os.getpid(), number)
    assert heard == [1]
    assert capfd.readouterr().err.count("saves after this step") == (number == signal.SIGINT)


def test_a_later_signal_acts_as_ever(sent):
    number, heard = sent
    with PreemptionNotice(echo_seconds=0.0) as notice:
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert notice.agreed() and heard == [1, 1]


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it runs in the background
    try:
        with PreemptionNotice() as notice:
            os.kill(os.getpid(), signal.SIGINT)
            assert not notice.agreed()
            os.kill(os.getpid(), signal.SIGTERM)
            assert notice.agreed()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_folder_is_made_once_and_says_what_it_is(tmp_path):
    import dataclasses

    vae = {"encoder": {"conv_in": {"bias": jnp.ones(6)}}}
    arguments = ({"seed": 3}, CKPT, ("tokenizer.json",), vae, "loom_jax 1")
    run = start_run(tmp_path / "run", CONFIG, *arguments)
    assert run == read_run(tmp_path / "run") and run.config == CONFIG and run.train == {"seed": 3}
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (CKPT / "tokenizer.json").read_bytes()
    assert list(stored_params(tmp_path / "run" / "vae")) == ["encoder/conv_in/bias"]
    assert start_run(tmp_path / "run", CONFIG, *arguments) == run
    with pytest.raises(CheckpointError, match="run of another model .max_latent_size is 7, given 8"):
        start_run(tmp_path / "run", dataclasses.replace(CONFIG, max_latent_size=8), *arguments)
    with pytest.raises(CheckpointError, match="is not a training run: it holds no run.json"):
        read_run(tmp_path)
    (tmp_path / "run" / "run.json").write_text('{"schema_version": 2}')
    with pytest.raises(CheckpointError, match="upgrade loom_jax"):
        read_run(tmp_path / "run")


TWO_PROCESSES = """
import os, signal, sys
from pathlib import Path
import jax
from loom_jax.parallel import PreemptionNotice, global_batch, make_mesh, row_range, start_distributed, state_shardings
assert start_distributed(sys.argv[2], 2, int(sys.argv[1]), heartbeat_seconds=20)
import jax.numpy as jnp, numpy as np
from loom_jax.checkpoint import RunCheckpoints, start_run
from tests.reference import CKPT
from tests.tiny import CONFIG
mesh = make_mesh("hsdp")
params = {"decoder": {"layers": {"und": {"gate_proj": {"kernel": jax.ShapeDtypeStruct((3, 64, 48), jnp.float32)}}}},
          "lm_head": {"kernel": jax.ShapeDtypeStruct((64, 40), jnp.bfloat16)}}
state = {"step": jax.ShapeDtypeStruct((), jnp.int32), "trainable": params}
where = state_shardings(state, params, mesh, "hsdp")
make = jax.jit(lambda: jax.tree.map(lambda a: jnp.arange(a.size).reshape(a.shape).astype(a.dtype), state),
               out_shardings=where)
folder = Path(sys.argv[3])
start_run(folder, CONFIG, {}, CKPT, (), make()["trainable"], "test")
number = jax.process_index()
begin, end = row_range(mesh, 16)
batch = global_batch({"a": np.arange(begin, end)[:, None] * np.ones((1, 3))}, mesh)
assert batch["a"].shape == (16, 3) and float(jax.jit(jnp.sum)(batch["a"])) == 360, (begin, end)
checkpoints = RunCheckpoints(folder)
with PreemptionNotice() as notice:
    for step in range(1, 20):
        if step == 4 and number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if notice.agreed():
            checkpoints.save(step, make(), {"process": number, "text": "x" * (5 + 9 * number)})
            break
checkpoints.wait()
restored = checkpoints.restore(state, where)
for left, right in zip(jax.tree.leaves(make()), jax.tree.leaves(restored.state)):
    for a, b in zip(left.addressable_shards, right.addressable_shards):
        np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data))
assert restored.own_data()["process"] == number
print("STEP", restored.step, begin, end)
"""


def test_two_processes_stop_save_and_restore_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    started = [start_python(TWO_PROCESSES, str(number), address, str(tmp_path)) for number in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)[-4000:]
    said = [next(line.split() for line in output.splitlines() if line.startswith("STEP")) for output in outputs]
    assert said[0][1] == said[1][1] and said[0][2:] == ["0", "8"] and said[1][2:] == ["8", "16"]
    # One process goes on with the state that two have saved, but not with their data.
    state = {
        "step": jnp.int32(0),
        "trainable": {
            "decoder": {"layers": {"und": {"gate_proj": {"kernel": jnp.zeros((3, 64, 48))}}}},
            "lm_head": {"kernel": jnp.zeros((64, 40), jnp.bfloat16)},
        },
    }
    restored = RunCheckpoints(tmp_path).restore(state)
    np.testing.assert_array_equal(
        np.asarray(jax.tree.leaves(restored.state["trainable"])[0]), np.arange(9216.0).reshape(3, 64, 48)
    )
    with pytest.raises(CheckpointError, match="data iterators of 2 processes, this job has 1: go on with 2"):
        restored.own_data()


def start_python(code: str, *arguments: str) -> "subprocess.Popen[str]":
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(4),
    }
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def run_python(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    process = start_python(code, *arguments)
    output, _ = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output, "")


@pytest.mark.slow
def test_restoring_holds_no_more_than_own_shards_and_one_tensor(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "restore", "--smoke", "--out", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["within"] and [process["shards"] for process in report["rows"]] == [report["bytes"] / 2] * 2
