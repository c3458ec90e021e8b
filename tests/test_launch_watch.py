"""What a run tells about itself: copies that drifted are named, and every second has its part."""

import json
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from loom_jax.core import LoomError, read_heartbeats
from loom_jax.parallel import make_mesh
from loom_jax.train import DriftCheck, Goodput, Watch, odd_copies


def placed(array: np.ndarray, sharding: NamedSharding, spoil: dict[int, Any] | None = None) -> jax.Array:
    """An array on a mesh; `spoil` maps numbers of devices to what is added to the first element of their part."""
    parts = []
    for device, place in sharding.addressable_devices_indices_map(array.shape).items():
        part = np.array(array[place])
        part.reshape(-1)[0] += (spoil or {}).get(device.id, 0)
        parts.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def state(spoil: dict[int, Any] | None = None, where: str = "kernel") -> Any:
    mesh = make_mesh("hsdp")  # data 2, fsdp 4
    rng = np.random.default_rng(0)
    arrays = {
        "kernel": (rng.standard_normal((12, 5)).astype(np.float32), P("fsdp")),
        "scale": (rng.standard_normal(7).astype(jnp.bfloat16), P()),
        "count": (np.arange(8, dtype=np.int32), P("data")),
    }
    return mesh, {
        name: placed(array, NamedSharding(mesh, spec), spoil if name == where else None)
        for name, (array, spec) in arrays.items()
    }


def test_equal_copies_pass():
    mesh, tree = state()
    check = DriftCheck(mesh, every=4)
    assert [step for step in range(1, 10) if check.due(step)] == [4, 8]
    check.check(4, tree)
    assert not DriftCheck(make_mesh("single"), every=1).due(1) and not DriftCheck(mesh, every=0).due(1)


@pytest.mark.parametrize(
    ("where", "spoil", "devices"),
    [("scale", {5: 1}, "5"), ("kernel", {2: 1e-6}, "2, 6"), ("count", {3: 1}, "3")],
)
def test_the_device_that_drifted_is_named(where, spoil, devices):
    mesh, tree = state(spoil, where)
    message = rf"step 8: 1 arrays .* first {where}: process 0 \(device {devices}\) holds other bits"
    with pytest.raises(LoomError, match=message):
        DriftCheck(mesh, every=4).check(8, tree)


def test_elements_that_changed_places_are_seen():
    mesh, tree = state()
    sharding = tree["count"].sharding
    parts = [np.array(shard.data) for shard in tree["count"].addressable_shards]
    parts[1] = parts[1][::-1]
    devices = [shard.device for shard in tree["count"].addressable_shards]
    tree["count"] = jax.make_array_from_single_device_arrays(
        (8,), sharding, [jax.device_put(part, device) for part, device in zip(parts, devices, strict=True)]
    )
    with pytest.raises(LoomError, match="first count"):
        DriftCheck(mesh, every=1).check(1, tree)


def test_the_minority_is_odd_and_of_two_copies_both():
    hashes = np.array([[1, 1], [1, 2], [9, 1], [1, 2]], np.uint32)
    assert odd_copies(hashes, [["a", "a", "a", "a"], ["a", "b", "a", "b"]]) == {0: [2]}
    assert odd_copies(hashes, [["a", "b", "a", "b"]]) == {0: [0, 2]}


def test_every_second_has_its_part():
    clock = Goodput()
    time.sleep(0.1)
    clock.begin(repeat_until=4)
    with clock.part("data"):
        time.sleep(0.15)
    with clock.part("save"):
        jax.jit(lambda x: jnp.sin(x) @ x.T + time.time())(jnp.ones((3, 5))).block_until_ready()
    time.sleep(0.2)
    clock.stepped(4)  # done before, and lost
    time.sleep(0.3)
    clock.stepped(5)
    shares = clock.shares()
    clock.close()
    assert sum(shares.values()) == pytest.approx(1, abs=0.02)
    assert shares["compile"] > 0 and shares["measure"] == 0
    assert shares["step"] / shares["data"] == pytest.approx(2, rel=0.3)
    assert shares["restart"] / shares["data"] == pytest.approx(2, rel=0.5)


def test_a_run_writes_how_it_ended(tmp_path):
    lines: list[dict[str, Any]] = []
    config: Any = SimpleNamespace(total_steps=3, watch=SimpleNamespace(drift_every=0))
    log: Any = SimpleNamespace(event=lambda step, name, values: lines.append({"step": step, "event": name, **values}))

    def run(first: int, last: int) -> str:
        with Watch(tmp_path, config).begin(first, make_mesh("single"), log) as watch:
            for step in range(first + 1, last + 1):
                watch.stepped(step, {})
        return read_heartbeats(tmp_path)[0].state

    assert run(0, 2) == "stopped" and run(2, 3) == "finished"
    assert [line["step"] for line in lines] == [2, 3] and lines[0]["event"] == "goodput"
    assert set(lines[0]) == {"step", "event"} | {
        f"goodput/{part}" for part in ("step", "compile", "data", "save", "measure", "restart")
    }
    json.dumps(lines)
    with pytest.raises(ZeroDivisionError), Watch(tmp_path, config).begin(0, make_mesh("single"), log):
        raise ZeroDivisionError
    assert read_heartbeats(tmp_path)[0].state == "failed" and len(lines) == 2
