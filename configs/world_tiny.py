"""A small Loom that works: trained from nothing on the tutorial world, its small ViT with it.

Command: loom train --config configs/world_autoencoder.py --workdir runs/world_autoencoder
         loom train --config configs/world_autoencoder.py:decoder --workdir runs/world_decoder \\
             --config.init_from=runs/world_autoencoder
         loom train --config configs/world_tiny.py --workdir runs/world_first
         loom convert from-run runs/world_first runs/world_first_model
         loom train --config configs/world_tiny.py:second --workdir runs/world_tiny \\
             --config.init_from=runs/world_first_model --config.vae_from=runs/world_decoder
Data: all five tasks of the tutorial world, drawn as they are needed; no combination that is held out is ever shown.
Hardware: any CPU, hours on two cores, in float32; one GPU, minutes. It goes on where it was stopped. With two devices
on a CPU of two cores a step takes less time: XLA_FLAGS=--xla_force_host_platform_device_count=2 before the command, and
--config.mesh.preset=hsdp after it.
Expect: docs/world.md.

The first stage has no pictures: the rule of a plan takes many documents to learn, and they are short. In the second
every picture to be generated stands four times in its document, with noise of its own: what is given is read once for
all of them. Decompositions, compositions and styles have no history; tutorials show up to three earlier frames. Half of
the planned rows give the plan instead of learning it: without it they can be dropped, as guidance needs it. With
a shift of 1 one draw in 24 has t > 0.85, with 4 one in 3, and it is near noise that what a thing is should be decided.
"""

import ml_collections

from loom_jax.configs import world_autoencoder

WEIGHTS = {
    "tutorial": 4.0,
    "tutorial_frames": 4.0,
    "tutorial_plan": 8.0,
    "image_tutorial": 1.0,
    "image_tutorial_frames": 1.0,
    "image_tutorial_plan": 1.0,
    "decomposition": 0.5,
    "decomposition_frames": 0.5,
    "composition": 4.0,
    "style": 3.0,
}
"""Recipe -> relative share of the rows."""
MAX_FRAMES = 4
"""Frames of tutorials that are shown: requests that are held out for their length ask for five or six."""
VARIANTS = ("first", "second", "on")
"""first: plans of tutorials alone, from nothing. second, on: everything, from weights that are there, which
--config.init_from names; on: for a few steps, half as many rows at a low rate."""


def get_config(variant: str = "first") -> ml_collections.ConfigDict:
    """Returns the recipe for one of VARIANTS; its keys are those of loom_jax.train.TrainConfig.

    Raises:
      KeyError: there is no such variant.
    """
    config = _second()
    if variant == "first":
        config.needs = ()
        config.data = _data({"tutorial_plan": 1.0}, und=896, gen=64, vit=64, pictures=1)
        config.held_out = _held_out(config.data)
        config.total_steps = 2_000
        config.optimizer.update({"learning_rate": 2e-3, "schedule": "constant"})
    elif variant == "on":
        config.needs = ("init_from",)
        config.optimizer.update({"learning_rate": 1e-4, "schedule": "constant", "warmup_steps": 5})
        config.data.rows = 2
        config.watch.log_every = 5
    elif variant != "second":
        raise KeyError(variant)
    return config


def _second() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = {
        "decoder": {
            "vocab_size": 512,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_layers": 6,
            "num_heads": 6,
            "num_kv_heads": 3,
            "head_dim": 32,
            "rope_theta": 1e4,
            "rms_norm_eps": 1e-6,
        },
        "vit": {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_layers": 2,
            "num_heads": 4,
            "patch_size": 16,
            "num_positions": 16,
            "layer_norm_eps": 1e-6,
        },
        "vae": world_autoencoder.get_config().vae.to_dict(),
        "max_latent_size": 4,
        "vit_max_num_patch_per_side": 4,
        "latent_patch_size": 2,
        "timestep_shift": 4.0,
        "interpolate_pos": False,
    }
    config.needs = ("init_from", "vae_from")
    config.tokenizer = "world"
    config.total_steps = 7_600
    config.frozen = ()
    config.compute_dtype = "float32"
    config.remat = "dots"
    config.optimizer = {"name": "muon", "learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 200, "b2": 0.98}
    config.optimizer["eps"] = 1e-8
    config.ema = {"decay": 0.998}
    config.save = {"every": 250, "keep_last": 2}
    config.watch = {"log_every": 10, "held_out_every": 500, "held_out_batches": 4}
    config.data = _data(WEIGHTS, und=1024, gen=640, vit=160, pictures=15)
    config.held_out = _held_out(config.data)
    return config


def _data(weights: dict[str, float], *, und: int, gen: int, vit: int, pictures: int) -> dict:
    return {
        "mixture": mixture(weights),
        "look_ahead": 4.0,
        "rows": 4,
        "budget": {"und": und, "gen": gen, "vit": vit},
        "canvases": [{"height": 64, "width": 64, "count": pictures}],
    }


def _held_out(data: ml_collections.ConfigDict) -> dict:
    return {**data.to_dict(), "mixture": [{**entry, "paths": ("test",)} for entry in data.mixture]}


def mixture(weights: dict[str, float]) -> list[dict]:
    """Returns the entries of a mixture of recipes of the world.

    Every picture to be generated stands four times. Plans of tutorials are as long as the longest of the requests that
    are held out: how long a plan may be is not guessed from shorter ones, nor that its fourth frame is the last.
    """
    return [_entry(name, weight) for name, weight in weights.items()]


def _entry(name: str, weight: float) -> dict:
    entry = {"name": name, "source": "world", "recipe": name, "weight": weight, "noisy_copies": 4, "paths": ()}
    if "tutorial" in name:
        entry["paths"] = ("train_long",)
        if not name.endswith("_plan"):
            entry["max_frames"] = MAX_FRAMES
    return entry
