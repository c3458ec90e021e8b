"""Checks of what follows a gradient: AdamW with clipping, the moving average, schedules, and counting FLOPs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from loom_jax.configs import bagel_7b
from loom_jax.converters.parity.port import Port
from loom_jax.converters.parity.records import Checked, Records
from loom_jax.converters.parity.report import MANY_STEPS
from loom_jax.converters.parity.training import build_pack, by_release_key, loss_and_gradients
from loom_jax.core import DecoderConfig, from_mapping
from loom_jax.train import (
    ALWAYS_FROZEN,
    OptimizerConfig,
    apply_updates,
    flop_coefficients,
    learning_rate,
    make_optimizer,
    update_ema,
)

SETTINGS = OptimizerConfig(learning_rate=1e-4, warmup_steps=0)
"""Of the recorded steps; the rest are the original's defaults, which are ours."""

ABOVE_ROUNDING = 1e-6
"""Clipped gradients up to here are rounding noise, whose sign AdamW with eps 1e-15 turns into a whole step."""

DECAYS = {"ema": 0.9999, "ema5": 0.5}
"""Recorded moving averages."""


SLOW_SCALE = 2.0**-21 / MANY_STEPS
"""In two steps the average of decay 0.9999 moves by less than float32 resolves: some roundings of numbers near one."""


def check_optim(records: Records, port: Port) -> Checked:
    """Two steps on the recorded pack. Parameters are compared against the rate, where the record says they can be."""
    r = records.arrays("optim")
    out = Checked(computed=_schedules())
    start = nnx.state(port.model)
    params, averages = start, dict.fromkeys(DECAYS, start)
    optimizer = make_optimizer(SETTINGS, total_steps=500_000)
    move, average_of = jax.jit(lambda *args: _move(optimizer, *args)), jax.jit(update_ema, static_argnums=2)
    state = jax.jit(optimizer.init)(start)
    pack = build_pack(records, port)
    rounding = jax.random.key(0)  # of which float32 has no need
    comparable: dict[str, np.ndarray] = {}
    for step in (1, 2, 3):
        loss, gradients = loss_and_gradients(port, pack, params)
        out.computed[f"loss_{step}"] = loss
        if step == 3:
            break
        gradients = _without_fixed(gradients)
        params, state, norm = move(gradients, state, params, rounding)
        out.computed[f"total_norm_{step}"] = norm
        for key, gradient in by_release_key(port, gradients).items():
            clipped = gradient * min(1.0, SETTINGS.clip_norm / (float(norm) + 1e-6))
            comparable[key] = comparable.get(key, True) & (np.abs(clipped) > ABOVE_ROUNDING)
        averages = {name: average_of(average, params, DECAYS[name], rounding) for name, average in averages.items()}
        out.computed |= _named(f"p{step}", by_release_key(port, params), r)
    for name, average in averages.items():
        out.computed |= _named(name, by_release_key(port, average), r)
    out.computed |= _named("mask_ok", comparable, r)
    for name in out.computed:
        kind, _, key = name.partition(".")
        if key and kind != "mask_ok":
            out.scales[name] = SLOW_SCALE if kind == "ema" else SETTINGS.learning_rate
            if f"mask_ok.{key}" in r:
                out.masks[name] = r[f"mask_ok.{key}"]
    return out


def _move(
    optimizer: optax.GradientTransformation, gradients: nnx.State, state: Any, params: nnx.State, rounding: jax.Array
) -> tuple[nnx.State, Any, jax.Array]:
    """Returns (parameters, state, norm of the gradients) after one step."""
    updates, state = optimizer.update(gradients, state, params)
    return apply_updates(params, updates, rounding), state, optax.tree.norm(gradients)


def _named(kind: str, values: dict[str, np.ndarray], recorded: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{kind}.{key}": value for key, value in values.items() if f"{kind}.{key}" in recorded}


def _without_fixed(gradients: nnx.State) -> nnx.State:
    """The original has no gradients of its position tables."""
    flat = [
        (path, leaf.replace(jnp.zeros_like(leaf[...])) if "/".join(map(str, path)) in ALWAYS_FROZEN else leaf)
        for path, leaf in nnx.to_flat_state(gradients)
    ]
    return nnx.from_flat_state(flat)


def _schedules() -> dict[str, np.ndarray]:
    """The rates of the first 30 steps under both schedules."""
    configs = {
        "lr_constant": (OptimizerConfig(learning_rate=1e-4, warmup_steps=10), 30),
        "lr_cosine": (OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=5), 25),
    }
    return {name: np.asarray(jax.vmap(learning_rate(*given))(jnp.arange(30))) for name, given in configs.items()}


def check_mfu(records: Records, port: Port) -> Checked:
    """FLOPs per token and per pair, of the release's sizes and of the set's."""
    release = from_mapping(DecoderConfig, bagel_7b.get_config().model.decoder.to_dict())
    example = records.json("mfu")["example"]
    dense, pairs = flop_coefficients(release)
    flops = dense * example["tokens"] + pairs * sum(n**2 for n in example["sample_lens"])
    computed: dict[str, Any] = {
        "qwen2_5_7b": [dense, pairs],
        "tiny": list(flop_coefficients(port.config.decoder)),
        "example": {**example, "flops_7b": flops},
    }
    return Checked(computed, inputs={"doc"})
