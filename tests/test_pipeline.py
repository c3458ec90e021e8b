"""From a configuration to batches: the same ones however they are read, and the very next row after a restart."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from loom_jax.core import ConfigError, InputError, LoomError, from_mapping
from loom_jax.data import (
    Address,
    DataConfig,
    MixtureEntry,
    Reader,
    SyntheticRows,
    make_pipeline,
    merge_states,
    t2i,
    write_moments,
)
from loom_jax.data.order import Order
from loom_jax.document import ImageTokens, Method, unit_range
from tests.data import TABLES, data_config, encoder, pipeline
from tests.reference import CKPT

ROOT = Path(__file__).resolve().parents[1]


def take(source, count):
    return list(itertools.islice(source, count))


def flat(value):
    """Returns the arrays of nested tuples."""
    return [a for item in value for a in flat(item)] if isinstance(value, tuple) else [] if value is None else [value]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        for a, b in zip(flat(one), flat(other), strict=True):
            np.testing.assert_array_equal(a, b)


def read(config, count, state=None, **options):
    """Returns `count` batches and the state after them."""
    p = pipeline(config, **options)
    if state is not None:
        p.set_state(json.loads(json.dumps(state)))
    batches = take(p, count)
    out = batches, p.get_state()
    p.close()
    return out


@pytest.fixture(scope="module")
def whole():
    return read(data_config(), 6)[0]


def test_batches_have_static_shapes(whole):
    shapes = [[a.shape for a in flat(batch)] for batch in whole]
    assert all(s == shapes[0] for s in shapes)
    first = whole[0]
    assert first.batch.streams.und.document.shape == (2, 1024) and first.latent_index.shape == (2, 448)
    (canvas,) = first.canvases
    assert canvas.pixels.shape == (2, 16, 128, 128, 3) and canvas.pixels.dtype == np.uint8 and first.moments is None


def test_restart_goes_on_at_the_very_next_row(whole):
    for k in (0, 1, 4):
        batches, state = read(data_config(), k)
        rest, _ = read(data_config(), 6 - k, state)
        assert_same(batches + rest, whole)
    assert len(json.dumps(state)) < 1000, "a state is positions, not pixels"


def test_a_state_can_be_set_again_and_counts_no_row_twice():
    p = pipeline(data_config())
    first = take(p, 2)
    state, rows = p.get_state(), p.stats["rows"]
    later = take(p, 2)
    p.set_state(state)
    assert p.get_state() == state
    assert_same(take(p, 2), later)
    assert p.stats["rows"] > rows
    after = p.get_state()
    p.close()
    assert after == read(data_config(), 4)[1] and first


def test_worker_processes_change_nothing(whole):
    batches, state = read(data_config(workers=2), 2)
    rest, _ = read(data_config(workers=1), 1, state)
    assert_same(batches + rest, whole[:3])


WITH_WORKERS = """
import itertools, multiprocessing, os, signal, sys, threading
from loom_jax.parallel import PreemptionNotice
from tests.data import data_config, pipeline
if __name__ == "__main__":
    p = pipeline(data_config(workers=2))
    with PreemptionNotice() as notice:
        next(p)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        if sys.argv[1] == "start":
            later = threading.Timer(float(sys.argv[2]), lambda: os.killpg(0, signal.SIGTERM))
            later.start()
            list(itertools.islice(pipeline(data_config(workers=2)), 2))
            later.join()
            print(notice.agreed(), flush=True)
        elif sys.argv[1] == "stop":
            os.killpg(0, signal.SIGTERM)
            list(itertools.islice(p, 40))
            print(notice.agreed(), flush=True)
            p.close()
        else:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def with_workers(tmp_path, *how):
    """Runs the script above in a group of its own; returns the numbers of its workers and what it said last."""
    script = tmp_path / "with_workers.py"  # workers import the script that began them
    script.write_text(WITH_WORKERS)
    run = subprocess.run(
        [sys.executable, str(script), *how],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )
    assert run.stdout, run.stderr[-3000:]
    first, *others = run.stdout.splitlines()
    return [int(number) for number in first.split()], others, run.returncode


def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_process_that_trains(tmp_path):
    workers, said, status = with_workers(tmp_path, "stop")
    assert len(workers) == 2 and said == ["True"] and status == 0


@pytest.mark.parametrize("seconds", ["0.3", "1.2"])
def test_workers_that_are_just_begun_outlive_a_signal_too(tmp_path, seconds):
    _, said, status = with_workers(tmp_path, "start", seconds)
    assert said == ["True"] and status == 0


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    workers, _, status = with_workers(tmp_path, "kill")
    assert len(workers) == 2 and status == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers are left"
        time.sleep(0.1)


def is_running(number):
    """Whether a process is there, and is not one that has ended and waits for somebody to ask."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(number)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_processes_together_make_the_batches_of_one():
    config = data_config(shards=2)
    alone, state = read(config, 3)
    parts = [read(config, 3, process_index=i, process_count=2) for i in range(2)]
    joined = [
        [np.concatenate([a, b]) for a, b in zip(flat(x), flat(y), strict=True)]
        for x, y in zip(parts[0][0], parts[1][0], strict=True)
    ]
    for one, other in zip(alone, joined, strict=True):
        for a, b in zip(flat(one), other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert merge_states([part[1] for part in parts]) == state


def test_restart_with_another_number_of_processes():
    config = data_config(shards=2)
    alone, _ = read(config, 4)
    states = [read(config, 2, process_index=i, process_count=2)[1] for i in range(2)]
    assert_same(read(config, 2, merge_states(states))[0], alone[2:])
    with pytest.raises(InputError, match="lacks shard 1.*merge_states"):
        read(config, 1, states[0])


@pytest.mark.parametrize("change", [{"seed": 7}, {"shards": 2}])
def test_a_state_of_other_data_is_refused(change):
    _, state = read(data_config(), 1)
    with pytest.raises(InputError, match="belongs to other data"):
        read(data_config(**change), 1, state)


class Numbers:
    """Rows that can be told apart by number, in blocks or not."""

    def __init__(self, count, blocks=()):
        self.count, self.blocks, self.bad_files = count, blocks, []

    def __len__(self):
        return self.count


@pytest.mark.parametrize("blocks", [(), (5, 1, 7, 4)])
@pytest.mark.parametrize("shards", [1, 3])
def test_each_row_is_visited_once_an_epoch_in_a_new_order(blocks, shards):
    config = data_config("t2i", shards=shards, rows=3)
    orders = [Order(config, [Numbers(17, blocks)], shard) for shard in range(shards)]
    visits = [order[position] for position in range(3 * 17) for order in orders][: 3 * 17]
    epochs = [[v.row for v in visits if v.epoch == epoch] for epoch in range(3)]
    assert all(sorted(rows) == list(range(17)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(17))


def test_blocks_stay_together():
    order = Order(data_config("t2i"), [Numbers(12, (4, 4, 4))], 0)
    blocks = [order[position].row // 4 for position in range(12)]
    assert len(list(itertools.groupby(blocks))) == 3


def test_mixture_keeps_its_weights_in_every_shard():
    mixture = [
        {"name": n, "source": "synthetic", "recipe": "t2i", "weight": w} for n, w in (("a", 3), ("b", 1), ("c", 0.5))
    ]
    config = data_config(mixture=mixture, shards=2)
    for shard in range(2):
        order = Order(config, [Numbers(1000)] * 3, shard)
        counts = np.bincount([order[position].entry for position in range(900)])
        np.testing.assert_allclose(counts, [600, 200, 100], atol=2)


class Faulty:
    """Synthetic rows, every ninth without captions."""

    blocks, bad_files = (), ()

    def __init__(self):
        self._rows = SyntheticRows("t2i")

    def __len__(self):
        return 900

    def __getitem__(self, index):
        row = self._rows[index]
        return {"image": row["image"]} if index % 9 == 0 else row


def test_bad_rows_are_counted_and_the_run_goes_on():
    config = data_config("t2i", max_bad_share=0.3)
    p = pipeline(config, sources=[Faulty()])
    take(p, 4)
    assert 0 < p.stats["bad_rows"] == p.stats["bad/missing column captions"] < 0.2 * p.stats["rows"]
    p.close()
    with pytest.raises(LoomError, match="missing column captions"):
        take(pipeline(data_config("t2i", max_bad_share=0.05, min_rows=50), sources=[Faulty()]), 20)


def test_both_streams_of_the_tiny_data_are_full():
    p = pipeline(data_config(rows=4, look_ahead=3.0, budget={"und": 1024, "gen": 384, "vit": 640}))
    fills = []
    for _ in range(12):
        next(p)
        fills.append([p.stats["fill/und"], p.stats["fill/gen"]])
    p.close()
    assert (np.mean(fills, 0) >= 0.85).all(), np.mean(fills, 0)


def test_raw_pixels_are_the_others_once_normalised():
    segments = t2i(SyntheticRows("t2i")[0], np.random.default_rng(0))
    plain, raw = encoder().encode(segments)[1], encoder().encode(segments, raw=True)[1]
    assert raw.pixels.dtype == np.uint8
    np.testing.assert_array_equal(unit_range(raw.pixels), plain.pixels)


def test_options_of_documents_reach_them():
    def documents(count=12, **changes):
        entry = {"name": "a", "source": "synthetic", "recipe": "tutorial", **changes.pop("entry", {})}
        config = dataclasses.replace(data_config(), mixture=(from_mapping(MixtureEntry, entry),), **changes)
        reader = Reader(config, [SyntheticRows("tutorial")], encoder())
        return [reader.document(Address(k, 0, 0, k)) for k in range(count)]

    def noisy(documents):
        return [sum(isinstance(s, ImageTokens) and s.role == "noisy" for s in d.segments) for d in documents]

    plain = documents()
    assert noisy(documents(entry={"noisy_copies": 3})) == [3 * count for count in noisy(plain)]
    assert max(noisy(plain)) > 1 and set(noisy(documents(history="none"))) == {1}
    assert set(noisy(documents(entry={"max_frames": 1}))) == {1}
    with pytest.raises(ConfigError, match="recipe 'vlm' has no frames"):
        documents(entry={"max_frames": 1, "recipe": "vlm"})
    shorter = documents(method=Method(planning=False))
    assert all(len(a.segments) < len(b.segments) for a, b in zip(shorter, plain, strict=True))
    with pytest.raises(ConfigError, match="uniform"):
        dataclasses.replace(data_config(), history="evenly")


class WithMoments:
    """Synthetic rows that store latents of 2 * 3 values: [row, column, ...] of each token."""

    blocks, bad_files = (), ()

    def __init__(self):
        self._rows = SyntheticRows("t2i")

    def __len__(self):
        return 64

    def __getitem__(self, index):
        moments = np.arange(4 * 5 * 6, dtype=np.float16).reshape(4, 5, 6) + index
        return {**self._rows[index], "moments": [write_moments(moments)]}


def test_stored_latents_come_in_place_of_canvases():
    p = pipeline(data_config("t2i", latents="moments"), sources=[WithMoments()])
    batch = next(p)
    p.close()
    image, cell = batch.batch.latents
    used = image >= 0
    assert batch.canvases == () and batch.moments.shape == (2, 448, 6) and (image.max() + 1) * 20 <= 448
    offset = batch.moments - (np.arange(6) + 6 * cell[..., None])
    assert not batch.moments[~used].any()
    for b in range(2):
        for number in range(image[b].max() + 1):
            assert np.ptp(offset[b][image[b] == number]) == 0
    with pytest.raises(LoomError, match="no stored latents"):
        take(pipeline(data_config("t2i", latents="moments", min_rows=5)), 1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shards": 3}, "shards=3"),
        ({"mixture": []}, "empty"),
        ({"canvases": [{"height": 100, "width": 128, "count": 1}]}, "100 x 128"),
        ({"mixture": [{"name": "a", "source": "synthetic", "recipe": "t2i", "weight": 0}]}, "weight"),
        ({"mixture": [{"name": "a", "source": "synthetic", "recipe": "riddle"}]}, "riddle"),
        ({"look_back": 1}, "look_back"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(changes, named):
    with pytest.raises(InputError, match=named):
        pipeline(data_config(**changes))


def test_more_processes_than_shards_are_refused():
    with pytest.raises(ConfigError, match="shards=1"):
        pipeline(data_config(), process_index=1, process_count=2)


def test_a_recipe_needs_its_tokens():
    plain = encoder()
    bare = dataclasses.replace(plain, tokenizer=type(plain.tokenizer).from_folder(CKPT))
    with pytest.raises(InputError, match="turn_1"):
        make_pipeline(data_config("tutorial"), bare, TABLES)


def test_defaults_are_those_of_the_training_script():
    entry = {"name": "a", "source": "parquet", "recipe": "edit", "paths": ["x"], "dropout": {}}
    config = from_mapping(DataConfig, {"mixture": [entry], "rows": 1, "budget": {"und": 1, "gen": 1, "vit": 1}})
    assert dataclasses.astuple(config.mixture[0].dropout)[:3] == (0.1, 0.3, 0.3)
