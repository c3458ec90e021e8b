"""Putting a training job together: mesh, weights, state, compiled step, data, checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loom_jax.checkpoint import ModelFolder, read_folder, restore_component
from loom_jax.core import ConfigError, LoomConfig, to_mapping
from loom_jax.data import RECIPES, DataConfig, Pipeline, Tables, make_pipeline
from loom_jax.data.world import build_tokenizer
from loom_jax.document import LOOM_TOKENS, Encoder, Tokenizer, make_encoder
from loom_jax.models import Autoencoder, LoomModel, add_lora
from loom_jax.nn import REMAT_POLICIES, Purpose, choose_attention, make_key
from loom_jax.parallel import (
    DATA_AXES,
    batch_sharding,
    make_constrain,
    make_mesh,
    row_range,
    shard_attend,
    shardings_for,
    state_shardings,
)
from loom_jax.train.autoencoder import restore_autoencoder
from loom_jax.train.config import TrainConfig
from loom_jax.train.optimizer import learning_rate, make_optimizer
from loom_jax.train.state import TrainState, check_frozen, init_state, parameter_names, split_model
from loom_jax.train.step import StepParts, make_train_step

NEEDED = {
    "init_from": "a converted folder, such as `loom convert from-run RUN FOLDER` makes of an earlier run",
    "vae_from": "the folder of a finished autoencoder, which configs/world_autoencoder.py trains",
}
"""What to give for a key of TrainConfig.needs."""


@dataclasses.dataclass
class Job:
    """A training job, ready to run.

    Attributes:
      parts: structures and functions of the step.
      step: the jitted `step(state, vae_params, batch) -> (state, metrics)`; the state is donated.
      abstract_state, shardings: shapes and places of the state.
      source: the converted folder that the job starts from, if any.
      names: trained parameters, in the order of `Metrics.finite`.
    """

    config: TrainConfig
    mesh: Mesh
    parts: StepParts
    step: Any
    abstract_state: TrainState
    shardings: TrainState
    vae_params: Any
    encoder: Encoder
    source: ModelFolder | None

    @property
    def names(self) -> list[str]:
        """Paths of the trained parameters."""
        return parameter_names(self.abstract_state.trainable)

    def summary(self) -> str:
        """Says in one line how large the job is and where it lies."""
        trained, frozen = (
            sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
            for tree in (self.abstract_state.trainable, self.abstract_state.frozen)
        )
        axes = ", ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        return (
            f"{trained / 1e6:,.1f} M of {(trained + frozen) / 1e6:,.1f} M parameters trained, on "
            f"{self.mesh.size} {self.mesh.devices.flat[0].device_kind} ({axes}), "
            f"{self.config.param_dtype} computed in {compute_dtype(self.config)}"
        )

    def new_state(self) -> TrainState:
        """Returns the state before the first step, on the mesh: weights of the source folder, or from the seed."""
        config = self.config
        build = _builder(config)
        optimizer = self.parts.optimizer
        if self.source is None:

            def draw() -> TrainState:
                _, trainable, frozen = split_model(build(), config)
                return init_state(trainable, frozen, optimizer, config.ema)

            return jax.jit(draw, out_shardings=self.shardings)()
        base = nnx.eval_shape(lambda: _build_model(config))
        graphdef, abstract = nnx.split(base, nnx.Param)
        stored = restore_component(
            self.source,
            "model",
            abstract,
            mesh=self.mesh,
            preset=config.mesh.preset,
            dtype=jnp.dtype(config.param_dtype),
        )

        def begin(params: Any) -> TrainState:
            model = nnx.merge(graphdef, params)
            _add_adapters(model, config)
            _, trainable, frozen = split_model(model, config)
            return init_state(trainable, frozen, optimizer, config.ema)

        return jax.jit(begin, out_shardings=self.shardings, donate_argnums=0)(stored)

    def open_data(self, config: DataConfig | None = None) -> Pipeline:
        """Returns the batches of this process."""
        config = config or self.config.data
        begin, end = row_range(self.mesh, config.rows)
        count = config.rows // (end - begin)
        return make_pipeline(config, self.encoder, Tables.of(self.config.model), begin // (end - begin), count)


def build_job(config: TrainConfig) -> Job:
    """Puts a job together; allocates the autoencoder alone.

    Raises:
      ConfigError: the configuration contradicts itself or the folder it starts from.
      CheckpointError: that folder cannot be used.
    """
    _check_needs(config)
    mesh = make_mesh(dict(zip(config.mesh.axes, config.mesh.sizes, strict=True)) or config.mesh.preset)
    source = None if config.init_from is None else read_folder(config.init_from)
    if source is not None:
        _check_same(source.config, config.model, config.init_from)
    _check_rows(config, mesh)
    draft = draft_step(config, mesh)
    encoder = make_encoder(config.model, _tokenizer(config, source))
    vae_params = _autoencoder(config, source, draft.vae, mesh)
    step = draft.step if jax.process_count() == 1 else _compiled_together(draft.step)
    return Job(config, mesh, draft.parts, step, draft.state, draft.shardings, vae_params, encoder, source)


def _compiled_together(step: Any) -> Any:
    """Returns a step that no process begins for the first time before all of them have compiled it.

    Between CPUs processes that have not met in a collective before must come to it within half a minute; compiling may
    take one of them longer than another, which finds the step in its cache.
    """
    compiled = None

    def run(*arguments: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = step.lower(*arguments).compile()
            multihost_utils.sync_global_devices("step compiled")
        return compiled(*arguments)

    return run


@dataclasses.dataclass(frozen=True)
class Draft:
    """A training step that can be compiled, on devices that need not be there: nothing is allocated.

    Attributes:
      parts, step, shardings: as in Job.
      state, vae: shapes, `vae` with places.
    """

    parts: StepParts
    step: Any
    state: TrainState
    shardings: TrainState
    vae: Any


def draft_step(config: TrainConfig, mesh: Mesh | AbstractMesh) -> Draft:
    """Returns the jitted step of a job and the shapes and places of what it takes.

    On an AbstractMesh the step cannot be called or compiled, but shapes and places are those of real devices.

    Raises:
      ConfigError: the configuration contradicts itself, or does not fit the mesh.
    """
    if config.remat not in REMAT_POLICIES:
        raise ConfigError(f"remat={config.remat!r} is not one of {', '.join(REMAT_POLICIES)}")
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
    attend = shard_attend(choose_attention(config.attention, platform), mesh)
    optimizer = make_optimizer(config.optimizer, config.total_steps, mesh)
    vae_graphdef, vae = nnx.split(nnx.eval_shape(lambda: _new_autoencoder(config)), nnx.Param)
    vae_shardings = shardings_for(vae, mesh, config.mesh.preset)
    model = nnx.eval_shape(_builder(config))
    graphdef, trainable, frozen = split_model(model, config)
    check_frozen(config, nnx.state(model, nnx.Param))
    if not jax.tree.leaves(trainable):
        raise ConfigError(f"nothing is trained: frozen={config.frozen} covers every parameter")
    abstract = jax.eval_shape(lambda t, f: init_state(t, f, optimizer, config.ema), trainable, frozen)
    shardings = state_shardings(abstract, (trainable, frozen), mesh, config.mesh.preset)
    rate = learning_rate(config.optimizer, config.total_steps)
    parts = StepParts(graphdef, vae_graphdef, optimizer, rate, config, attend, make_constrain(mesh))
    step = jax.jit(
        make_train_step(parts),
        in_shardings=(shardings, vae_shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )
    placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), vae, vae_shardings)
    return Draft(parts, step, abstract, shardings, placed)


def _check_needs(config: TrainConfig) -> None:
    """Raises ConfigError where a recipe is not given the weights that it goes on from."""
    for key in config.needs:
        if getattr(config, key) is None:
            raise ConfigError(
                f"this recipe goes on from weights that are there, and {key} is not given: add --config.{key}=DIR, "
                f"{NEEDED[key]}"
            )


def _check_rows(config: TrainConfig, mesh: Mesh) -> None:
    """Raises ConfigError where batches cannot be cut for this mesh, or processes have no part in it."""
    if len({device.process_index for device in mesh.devices.flat}) < jax.process_count():
        raise ConfigError(
            f"mesh.preset={config.mesh.preset!r} leaves some of {jax.process_count()} processes without a device of "
            "the mesh: take a preset that uses all of them, such as fsdp"
        )
    groups = math.prod(mesh.shape.get(axis, 1) for axis in DATA_AXES)
    parts = {"data": config.microbatches, "held_out": 1}
    for name, data in (("data", config.data), ("held_out", config.held_out)):
        if data is not None and data.rows % (groups * parts[name]):
            raise ConfigError(
                f"{name}.rows={data.rows} on a mesh of {dict(mesh.shape)} with microbatches={parts[name]}: make it a "
                f"multiple of {groups * parts[name]} (devices that share a batch, times micro-batches)"
            )


def _builder(config: TrainConfig) -> Any:
    """Returns a function that builds the model with its adapters."""

    def build() -> LoomModel:
        model = _build_model(config)
        _add_adapters(model, config)
        return model

    return build


def _build_model(config: TrainConfig) -> LoomModel:
    rngs = nnx.Rngs(params=make_key(config.seed, Purpose.INIT))
    return LoomModel(config.model, rngs=rngs, dtype=compute_dtype(config), param_dtype=jnp.dtype(config.param_dtype))


def _add_adapters(model: LoomModel, config: TrainConfig) -> None:
    if config.lora.rank:
        rngs = nnx.Rngs(params=make_key(config.seed, Purpose.ADAPTERS))
        add_lora(model, config.lora.rank, config.lora.alpha, config.lora.targets, rngs)


def compute_dtype(config: TrainConfig) -> Any:
    """Returns the dtype of the forward and backward pass."""
    if config.compute_dtype != "auto":
        return jnp.dtype(config.compute_dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def _new_autoencoder(config: TrainConfig) -> Autoencoder:
    return Autoencoder(config.model.vae, rngs=nnx.Rngs(params=make_key(config.seed, Purpose.INIT, 1)))


def _autoencoder(config: TrainConfig, source: ModelFolder | None, abstract: Any, mesh: Mesh) -> Any:
    """Returns the parameters of the frozen autoencoder, on the mesh: those of `vae_from` before those of the source."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    if config.vae_from is not None:
        return restore_autoencoder(Path(config.vae_from), config.model.vae, abstract, shardings)
    if source is not None:
        return restore_component(source, "vae", abstract, mesh=mesh, preset=config.mesh.preset, dtype=jnp.float32)
    return jax.jit(lambda: nnx.split(_new_autoencoder(config), nnx.Param)[1], out_shardings=shardings)()


def _tokenizer(config: TrainConfig, source: ModelFolder | None) -> Tokenizer:
    """The tokenizer of the source folder, or the one configured; with Loom's tokens where a recipe writes some."""
    if source is not None:
        tokenizer = Tokenizer.from_folder(source.path)
    else:
        tokenizer = build_tokenizer() if config.tokenizer == "world" else Tokenizer.of_bytes()
    needed = any(RECIPES[entry.recipe].tokens for entry in config.data.mixture if entry.recipe in RECIPES)
    return tokenizer.with_tokens(LOOM_TOKENS) if needed else tokenizer


def _check_same(found: LoomConfig, expected: LoomConfig, folder: Any) -> None:
    """Raises ConfigError, naming the first key, where a folder holds another model than the configuration says."""

    def flat(mapping: Mapping[str, Any], where: str = "model") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in mapping.items():
            out |= flat(value, f"{where}.{key}") if isinstance(value, Mapping) else {f"{where}.{key}": value}
        return out

    stored, asked = flat(to_mapping(found)), flat(to_mapping(expected))
    for key in ("model.timestep_shift",):  # a setting of the job, not a size
        stored.pop(key, None), asked.pop(key, None)
    for key, value in asked.items():
        if stored[key] != value:
            raise ConfigError(f"{key}={value!r}, but {folder} holds a model with {stored[key]!r}: give that value")
