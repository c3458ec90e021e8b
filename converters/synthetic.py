"""Random releases of any size, in the layout of the real one: for tests of other dimensions, and for benchmarks."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from loom_jax.converters.release import AUTOENCODER, POSITION_TABLES, TOKENIZER_FILES, config_files
from loom_jax.converters.tables import Entry, autoencoder_entries, model_entries
from loom_jax.converters.tensors import DTYPES, TensorFileWriter
from loom_jax.core import LoomConfig
from loom_jax.nn import sincos_2d_table

_DRAWN = 2**22
"""Values that are drawn for one tensor; a larger one repeats them, which is faster."""

FLOAT32, BFLOAT16 = DTYPES["F32"], DTYPES["BF16"]


def write_synthetic_release(
    path: Path,
    config: LoomConfig,
    *,
    seed: int = 0,
    dtype: Callable[[str], np.dtype] = lambda key: FLOAT32 if key in POSITION_TABLES else BFLOAT16,
    tokenizer: Path | None = None,
    leave_out: tuple[str, ...] = (),
) -> None:
    """Writes a release with random weights that give activations of order one.

    Args:
      path: a folder, made if needed.
      config: sizes of the networks.
      dtype: key of a tensor of the transformer -> its dtype; the autoencoder is float32.
      tokenizer: a folder whose tokenizer files are copied; without it the release has none.
      leave_out: keys of tensors that are not written.
    """
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    model = [entry for entry in model_entries(config) if entry.key not in leave_out]
    _write(path / "ema.safetensors", model, dtype, rng)
    _write(path / AUTOENCODER, autoencoder_entries(config.vae), lambda _: FLOAT32, rng)
    for name, content in config_files(config).items():
        (path / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    for name in TOKENIZER_FILES if tokenizer else ():
        if tokenizer and (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, path / name)


def _write(path: Path, entries: list[Entry], dtype: Callable[[str], np.dtype], rng: np.random.Generator) -> None:
    with TensorFileWriter(path, {entry.key: (entry.shape, dtype(entry.key)) for entry in entries}) as writer:
        for entry in entries:
            writer.write(entry.key, _values(entry, rng, dtype(entry.key)))


def _values(entry: Entry, rng: np.random.Generator, dtype: np.dtype) -> np.ndarray:
    """Position tables as they must be; norms around one; kernels by fan-in; embeddings and biases small."""
    rows, width = entry.shape[0], math.prod(entry.shape[1:])
    if entry.key in POSITION_TABLES:
        return sincos_2d_table(width, math.isqrt(rows)).astype(dtype)
    drawn = rng.standard_normal(min(entry.size, _DRAWN), np.float32)
    name = entry.path.rsplit("/", 1)[-1]
    if name == "scale":
        drawn = 1 + 0.2 * drawn
    else:
        drawn *= {"bias": 0.1, "embedding": 0.6}.get(name, width**-0.5)
    return np.resize(drawn.astype(dtype), entry.shape)
