"""A small Loom that works: trained from nothing on the tutorial world, its small ViT with it.

Command: loom train --config configs/world_autoencoder.py --workdir runs/world_autoencoder
         loom train --config configs/world_tiny.py --workdir runs/world_first --config.vae_from=runs/world_autoencoder
         loom convert from-run runs/world_first runs/world_first_model
         loom train --config configs/world_tiny.py:second --workdir runs/world_tiny \\
             --config.init_from=runs/world_first_model
Data: all five tasks of the tutorial world, drawn as they are needed; no combination that is held out is ever shown.
Hardware: any CPU, hours on two cores, in float32; one GPU, minutes. It goes on where it was stopped. With two devices
on a CPU of two cores a step takes less time: XLA_FLAGS=--xla_force_host_platform_device_count=2 before the command, and
--config.mesh.preset=hsdp after it.
Expect: no finished run is behind this recipe yet. After 6,000 steps the held-out losses were 0.055 (text) and 0.563.

Every picture to be generated stands four times in its document, with noise of its own: what is given is read once for
all of them. Decompositions, compositions and styles have no history; tutorials show up to three earlier frames. Half of
the planned rows give the plan instead of learning it, because without it they can be dropped, as guidance needs it.
After the first stage it draws well what it sees and writes plans of pictures, but plans from text are often wrong, and
what goes from one picture to another becomes another thing. So the second has more such documents, many of them only a
plan, and a shift of 4: with a shift of 1 one draw in 24 has t > 0.85, with 4 one in 3, and it is near noise that what a
thing is should be decided. The three changes were made together; what each is worth was not measured.
"""

import ml_collections

from loom_jax.configs import world_autoencoder

WEIGHTS = {
    "tutorial": 2.0,
    "tutorial_frames": 2.0,
    "image_tutorial": 1.0,
    "image_tutorial_frames": 1.0,
    "decomposition": 1.0,
    "decomposition_frames": 1.0,
    "composition": 3.0,
    "style": 2.0,
}
"""Recipe -> relative share of the rows."""
WEIGHTS_AFTER = {**WEIGHTS, "tutorial_plan": 8.0, "composition": 6.0}
"""The same, of the second stage."""
VARIANTS = ("new", "second", "on")
"""new: from nothing. second, on: from weights that are there, which --config.init_from names; on: for a few steps, half
as many rows at a low rate."""


def get_config(variant: str = "new") -> ml_collections.ConfigDict:
    """Returns the recipe for one of VARIANTS; its keys are those of loom_jax.train.TrainConfig.

    Raises:
      KeyError: there is no such variant.
    """
    config = _new()
    if variant == "new":
        return config
    config.vae_from = None
    if variant == "second":
        config.model.timestep_shift = 4.0
        config.data.update({"mixture": mixture(WEIGHTS_AFTER), "budget": {"und": 896, "gen": 640, "vit": 160}})
        config.total_steps = 7_000
        config.optimizer.update({"learning_rate": 6e-4, "decay_steps": None})
    elif variant == "on":
        config.optimizer.update({"learning_rate": 1e-4, "schedule": "constant", "warmup_steps": 5, "decay_steps": None})
        config.data.rows = 2
        config.watch.log_every = 5
    else:
        raise KeyError(variant)
    return config


def _new() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = {
        "decoder": {
            "vocab_size": 512,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_layers": 8,
            "num_heads": 6,
            "num_kv_heads": 3,
            "head_dim": 32,
            "rope_theta": 1e4,
            "rms_norm_eps": 1e-6,
        },
        "vit": {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_layers": 3,
            "num_heads": 4,
            "patch_size": 16,
            "num_positions": 16,
            "layer_norm_eps": 1e-6,
        },
        "vae": world_autoencoder.get_config().vae.to_dict(),
        "max_latent_size": 4,
        "vit_max_num_patch_per_side": 4,
        "latent_patch_size": 2,
        "timestep_shift": 1.0,
        "interpolate_pos": False,
    }
    config.vae_from = "runs/world_autoencoder"
    config.tokenizer = "world"
    config.total_steps = 7_250
    config.frozen = ()
    config.remat = "dots"
    config.optimizer = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 200, "b2": 0.98, "eps": 1e-8}
    config.optimizer["decay_steps"] = 10_000  # the second stage goes on before the rate has fallen
    config.ema = {"decay": 0.998}
    config.save = {"every": 250, "keep_last": 2}
    config.watch = {"log_every": 10, "held_out_every": 500, "held_out_batches": 4}
    recipes = mixture(WEIGHTS)
    shape = {
        "rows": 4,
        "budget": {"und": 640, "gen": 640, "vit": 160},
        "canvases": [{"height": 64, "width": 64, "count": 15}],
    }
    config.data = {"mixture": recipes, "look_ahead": 4.0, **shape}
    config.held_out = {"mixture": [{**entry, "paths": ("test",)} for entry in recipes], **shape}
    return config


def mixture(weights: dict[str, float]) -> list[dict]:
    """Returns the entries of a mixture of recipes of the world; every picture to be generated stands four times."""
    return [
        {"name": name, "source": "world", "recipe": name, "weight": weight, "noisy_copies": 4}
        for name, weight in weights.items()
    ]
