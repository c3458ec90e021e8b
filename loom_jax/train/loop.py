"""The training loop, from the first step or the last checkpoint to the end."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

import loom_jax
from loom_jax.checkpoint import WENT_ON, RunCheckpoints, RunFolder, began_with, goes_on, run_origin, start_run
from loom_jax.core import CheckpointError, to_mapping
from loom_jax.parallel import PreemptionNotice, global_batch
from loom_jax.train.config import TrainConfig
from loom_jax.train.held_out import HeldOut
from loom_jax.train.job import Job, build_job
from loom_jax.train.log import TrainLog
from loom_jax.train.profile import ProfileWindow
from loom_jax.train.state import TrainState
from loom_jax.train.watch import Watch


class Hook(Protocol):
    """Something to be done between steps, such as drawing sample pictures."""

    def due(self, step: int) -> bool:
        """Whether it is to be done after `step`."""
        ...

    def run(self, step: int, state: TrainState) -> None:
        """Does it; the state must not be kept."""
        ...


Hooks = Callable[[Job, Path], Sequence[Hook]]


def train(config: TrainConfig, workdir: Path, hooks: Hooks | None = None, recipe: Sequence[str] = ()) -> TrainState:
    """Trains until `config.total_steps`, going on where `workdir` stopped; returns the last state.

    A SIGTERM or Ctrl-C ends the run after the step at hand, with a checkpoint. `recipe` goes into the record of a new
    run, and into the checkpoints of one that goes on by another: the file that `config` was read from, and what was
    changed in it (`KEY=VALUE`).

    Raises:
      ConfigError: the configuration cannot be used.
      CheckpointError: `workdir` belongs to another run.
      LoomError: the run had to stop: too many bad rows, steps that are not finite, a disk that is full.
    """
    watch = Watch(workdir, config)
    job = build_job(config)
    data = job.open_data()
    origin = run_origin(recipe, f"{job.mesh.size} {job.mesh.devices.flat[0].device_kind}")
    run = _start_folder(job, workdir, origin)
    checkpoints = RunCheckpoints(workdir, config.save.every, config.save.keep_last, config.save.keep_every)
    restored = checkpoints.restore(job.abstract_state, job.shardings)
    if restored is None:
        state, first, before = job.new_state(), 0, ()
    else:
        state, first, before = restored.state, restored.step, restored.meta.get(WENT_ON, ())
        data.set_state(restored.own_data())
    remembered = {"total_steps": config.total_steps, WENT_ON: goes_on(before, run.origin, first, origin)}
    folder = workdir if jax.process_index() == 0 else None
    held_out, others = HeldOut(job), hooks(job, workdir) if hooks else ()
    window = ProfileWindow(workdir, config.watch.profile_start, config.watch.profile_steps)
    log = TrainLog(folder, config, job.names, first)
    log.say(f"{job.summary()}; {'starts anew' if first == 0 else f'goes on after step {first}'}")

    with (
        PreemptionNotice() as notice,  # until the last checkpoint is written
        contextlib.closing(data),
        log,
        watch.begin(first, job.mesh, log),
        checkpoints,
        window as profile,
    ):
        for step in range(first + 1, config.total_steps + 1):
            began = time.perf_counter()
            with watch.part("data"):
                batch = next(data)
            log.waited_for_data(time.perf_counter() - began)
            with profile.step(step):
                state, metrics = job.step(state, job.vae_params, global_batch(batch, job.mesh))
            profile.end(step, metrics)
            log.put(step, metrics, data.stats)
            watch.stepped(step, state)
            with watch.part("measure"):
                if held_out.due(step):
                    log.event(step, "held_out", held_out.measure(state))
                for hook in others:
                    if hook.due(step):
                        hook.run(step, state)
            stop = step == config.total_steps or notice.agreed()
            if stop or checkpoints.due(step):
                log.flush()
                with watch.part("save"):
                    meta = {"preempted": step < config.total_steps and stop, **remembered}
                    checkpoints.save(step, state, data.get_state(), meta)
            checkpoints.check()
            if stop:
                log.say(f"stopped after step {step} of {config.total_steps}, with a checkpoint")
                break
    return state


def _start_folder(job: Job, workdir: Path, origin: Mapping[str, Any]) -> RunFolder:
    """Makes the run folder, or checks the one that is there; it holds all that an export needs."""
    with tempfile.TemporaryDirectory(prefix="loom_run_") as scratch:
        files = Path(scratch)
        if job.source is not None:
            for name in job.source.files:
                shutil.copyfile(job.source.path / name, files / name)
        job.encoder.tokenizer.save(files)
        names = tuple(sorted(path.name for path in files.iterdir()))
        created_by = f"loom_jax {loom_jax.__version__}"
        mapping = to_mapping(job.config)
        begins = {**origin, **began_with(job.config.init_from, job.config.vae_from)}
        run = start_run(workdir, job.config.model, mapping, files, names, job.vae_params, created_by, begins)
    begun, given = run.train.get("vae_from"), job.config.vae_from
    if (begun and Path(begun).resolve()) != (given and Path(given).resolve()):
        raise CheckpointError(
            f"{workdir} was begun with vae_from={begun!r}, not {given!r}, and holds that autoencoder: give the same, "
            "or choose another folder"
        )
    return run
