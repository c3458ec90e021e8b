"""The autoencoder of the tutorial world: 64 x 64 pictures, 8 times smaller a side, 16 channels; 1.4 million parameters.

Command: loom train --config configs/world_autoencoder.py --workdir runs/world_autoencoder
         loom train --config configs/world_autoencoder.py:decoder --workdir runs/world_decoder \\
             --config.init_from=runs/world_autoencoder
Data: pictures of the tutorial world, drawn as they are needed; no combination that is held out of training is shown.
Hardware: any CPU, half an hour on two cores; one GPU, minutes.
Expect: a pixel error (mean absolute difference, of 1) below 0.01; the reader reads what it decodes, but for some
small things in outlines and at night (docs/world.md).
"""

import ml_collections

VARIANTS = ("whole", "decoder")
"""whole: from nothing. decoder: the decoder alone, on styles, which are hardest. Latents stay as they are, so that it
may be done before a model is trained on them or after."""


def get_config(variant: str = "whole") -> ml_collections.ConfigDict:
    """Returns the recipe for one of VARIANTS; its keys are those of loom_jax.train.AutoencoderTrainConfig.

    Raises:
      KeyError: there is no such variant.
    """
    config = _whole()
    if variant == "decoder":
        config.keep_encoder = True
        config.total_steps = 1500
        config.optimizer.learning_rate = 1e-3
        config.pictures.mixture = _mixture(tutorial=1.0, style=8.0)
    elif variant != "whole":
        raise KeyError(variant)
    return config


def _whole() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.vae = {
        "ch": 16,
        "ch_mult": (1, 1, 2, 6),
        "num_res_blocks": 1,
        "z_channels": 16,
        "scale_factor": 1.0,
        "shift_factor": 0.0,
        "in_channels": 3,
        "out_ch": 3,
        "num_groups": 8,
    }
    config.pictures = {
        "mixture": _mixture(tutorial=2.0, composition=1.0, style=4.0),
        "batch": 16,
        "side": 64,
    }
    config.total_steps = 3600
    config.kl_weight = 4e-4  # as for a pixel noise of 0.05 in [-1, 1]
    config.edge_weight = 1.0  # or the stripes of a style are lost
    config.optimizer = {"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 100, "b2": 0.99, "eps": 1e-8}
    config.ema = {"decay": 0.995}
    config.save = {"every": 250}
    return config


def _mixture(**weights: float) -> list[dict]:
    return [{"name": task, "source": "world", "recipe": task, "weight": weight} for task, weight in weights.items()]
