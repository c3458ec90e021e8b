"""From a checkpoint of a training run to a folder for inference, some tensors at a time."""

from __future__ import annotations

import dataclasses
import datetime
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loom_jax import __version__
from loom_jax.checkpoint import (
    WENT_ON,
    ParamWriter,
    RunFolder,
    StoredParam,
    autoencoder_origin,
    began_with,
    check_shapes,
    named,
    param_sources,
    portable,
    read_meta,
    read_params,
    read_run,
    step_path,
    stored_params,
    write_record,
)
from loom_jax.converters.stream import BATCH_BYTES, Advance
from loom_jax.converters.tables import autoencoder_entries, model_entries
from loom_jax.core import CheckpointError
from loom_jax.train import check_autoencoder

_ADAPTER = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class RunWeights:
    """The weights of one checkpoint of a run, checked but not read.

    Attributes:
      run: its folder.
      path: the checkpoint.
      weights: `ema` or `params`.
      stored: shapes and dtypes of the checkpoint's leaves.
      sources: path of each parameter -> path of its leaf.
      adapters: path of a kernel -> paths of the leaves of its adapter.
    """

    run: RunFolder
    path: Path
    weights: str
    stored: Mapping[str, StoredParam]
    sources: Mapping[str, str]
    adapters: Mapping[str, tuple[str, str]]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of the transformer."""
        return sum(self.stored[source].nbytes for source in self.sources.values())


def open_run(path: Path, step: int | None, weights: str, merge_lora: bool) -> RunWeights:
    """Opens a checkpoint of a run.

    Args:
      step: which; None for the newest.
      weights: `ema` or `params`.
      merge_lora: whether adapters may be added to their kernels.

    Raises:
      CheckpointError: the run or the checkpoint is not there or incomplete; there is no moving average; or there are
        adapters and `merge_lora` is false.
    """
    run = read_run(path)
    at = step_path(path.absolute(), step)
    stored = stored_params(at)
    sources = param_sources(at, stored, weights)
    adapters = {}
    for name in sources:
        if name.endswith("/lora_a"):
            module = name.removesuffix("/lora_a")
            adapters[f"{module}/kernel"] = (sources[f"{module}/lora_a"], sources[f"{module}/lora_b"])
    if adapters and not merge_lora:
        raise CheckpointError(
            f"{path} trained {len(adapters)} low-rank adapters, which the exported form cannot hold: give --merge-lora "
            "to add them to the weights"
        )
    sources = {name: source for name, source in sources.items() if name.rsplit("/", 1)[-1] not in _ADAPTER}
    shapes = {name: stored[source].shape for name, source in sources.items()}
    expected = {entry.path: entry.param_shape for entry in model_entries(run.config)}
    check_shapes(str(at), shapes, expected, "run.json and the checkpoint belong to different runs")
    return RunWeights(run, at, weights, stored, sources, adapters)


def write_run(opened: RunWeights, folder: Path, dtype: np.dtype | None, vae: Path | None, advance: Advance) -> None:
    """Writes the weights as a converted model into an empty folder.

    Args:
      dtype: of the transformer's weights; None keeps each one's.
      vae: finished run of an autoencoder to be taken in place of the run's own; its encoder must be the same.
      advance: gets the bytes that were read.

    Raises:
      CheckpointError: a file cannot be read, the run lacks one that its record lists, or `vae` makes other latents.
    """
    run = opened.run
    vae_weights = _vae_weights(run, vae)
    provenance = {
        "tool": f"loom_jax {__version__}",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": f"{run.path.resolve().name} step {opened.path.name}",
        "weights": opened.weights,
        "merged_adapters": len(opened.adapters),
        "cast": None if dtype is None else dtype.name,
        "trained": _trained(opened),
    }
    if vae is not None:
        provenance["autoencoder"] = autoencoder_origin(vae)
    scale = _adapter_scale(run) if opened.adapters else 0.0
    with ParamWriter(folder / "model") as writer:
        for batch in _batches(opened):
            writer.write(_read(opened, batch, scale), dtype)
            advance(sum(opened.stored[opened.sources[name]].nbytes for name in batch))
    shutil.copytree(vae_weights, folder / "vae")
    for name in run.files:
        if not (run.path / name).is_file():
            raise CheckpointError(f"{run.path} lacks {name}, which its record lists: put it back")
        shutil.copyfile(run.path / name, folder / name)
    write_record(folder, run.config, portable(provenance), run.files)


def _trained(opened: RunWeights) -> dict[str, Any]:
    """How the weights came about, back to where they began; of a run without an origin, as its paths tell now."""
    run, given, meta = opened.run, opened.run.train, read_meta(opened.path)
    settings = {
        "seed": given.get("seed"),
        "data_seed": given.get("data", {}).get("seed"),
        "step": int(opened.path.name),
        # of the process that wrote the checkpoint: it may have gone on for more steps than the run was begun for
        "total_steps": meta.get("total_steps", given.get("total_steps")),
    }
    origin = run.origin or began_with(given.get("init_from"), given.get("vae_from"))
    later = {WENT_ON: meta[WENT_ON]} if meta.get(WENT_ON) else {}
    return {"tool": run.created_by, **settings, **origin, **later}


def _vae_weights(run: RunFolder, vae: Path | None) -> Path:
    """Returns where the weights of the run's autoencoder lie, or of the other one that is to be taken."""
    weights = run.path / "vae" if vae is None else check_autoencoder(vae, run.config.vae)
    shapes = {name: leaf.shape for name, leaf in stored_params(weights).items()}
    expected = {entry.path: entry.param_shape for entry in autoencoder_entries(run.config.vae)}
    check_shapes(str(weights), shapes, expected, "its record and the autoencoder belong to different runs")
    if vae is not None:
        own, other = _encoder(run.path / "vae"), _encoder(weights)
        changed = [name for name in own if not np.array_equal(own[name], other[name])]
        if changed:
            raise CheckpointError(
                f"{vae} encodes pictures otherwise than the autoencoder that {run.path} was trained with "
                f"({named(changed)}): give one whose decoder alone was trained on from that, with keep_encoder"
            )
    return weights


def _encoder(path: Path) -> dict[str, np.ndarray]:
    return read_params(path, {name: leaf for name, leaf in stored_params(path).items() if name.startswith("encoder/")})


def _adapter_scale(run: RunFolder) -> float:
    """Factor of an adapter's product: alpha / rank of the run's configuration."""
    lora = run.train.get("lora", {})
    if not lora.get("rank") or "alpha" not in lora:
        raise CheckpointError(f"{run.path / 'run.json'} has no lora.rank and lora.alpha, but the run trained adapters")
    return lora["alpha"] / lora["rank"]


def _batches(opened: RunWeights) -> Iterator[list[str]]:
    """Cuts the parameters into runs of at most BATCH_BYTES."""
    batch: list[str] = []
    total = 0
    for name, source in opened.sources.items():
        size = opened.stored[source].nbytes
        if batch and total + size > BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(name)
        total += size
    yield batch


def _read(opened: RunWeights, names: list[str], scale: float) -> dict[str, np.ndarray]:
    """Reads some parameters, with their adapters added: kernel + alpha / rank (A B), in float32."""
    wanted = [opened.sources[name] for name in names]
    wanted += [leaf for name in names for leaf in opened.adapters.get(name, ())]
    read = read_params(opened.path, {leaf: opened.stored[leaf] for leaf in wanted})
    params = {name: read[opened.sources[name]] for name in names}
    for name in opened.adapters.keys() & params.keys():
        a, b = (read[leaf].astype(np.float32) for leaf in opened.adapters[name])
        kernel = params[name]
        delta = scale * (a @ b.reshape(b.shape[0], math.prod(b.shape[1:]))).reshape(kernel.shape)
        params[name] = (kernel.astype(np.float32) + delta).astype(kernel.dtype)
    return params
