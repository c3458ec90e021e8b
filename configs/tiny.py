"""A model small enough for a laptop's CPU, to try the framework and to find mistakes: no two of its widths are alike.

Command: loom train --config configs/tiny.py --workdir runs/tiny
Data: drawn as it is needed: coloured shapes with captions, edits, questions and short tutorials. Nothing to download.
Hardware: any CPU with 2 GiB of free memory, in float32.
Expect: 1.1 million parameters in the transformer, drawn from the seed, and an autoencoder that is never trained, so the
  losses fall but the pictures mean nothing.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe; `model` holds the keys of loom_jax.core.LoomConfig."""
    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict(
        {
            "decoder": {
                "vocab_size": 512,
                "hidden_size": 96,
                "intermediate_size": 224,
                "num_layers": 4,
                "num_heads": 6,
                "num_kv_heads": 2,
                "head_dim": 16,
                "rope_theta": 1e6,
                "rms_norm_eps": 1e-6,
            },
            "vit": {
                "hidden_size": 72,
                "intermediate_size": 136,
                "num_layers": 5,
                "num_heads": 3,
                "patch_size": 8,
                "num_positions": 484,
                "layer_norm_eps": 1e-6,
            },
            "vae": {
                "ch": 32,
                "ch_mult": (1, 2, 2, 2),
                "num_res_blocks": 1,
                "z_channels": 16,
                "scale_factor": 0.3611,
                "shift_factor": 0.1159,
                "in_channels": 3,
                "out_ch": 3,
                "num_groups": 32,
            },
            "max_latent_size": 12,
            "vit_max_num_patch_per_side": 22,
            "latent_patch_size": 2,
            "timestep_shift": 1.0,
            "interpolate_pos": False,
        }
    )
    config.total_steps = 200
    config.frozen = ()
    config.optimizer = {"learning_rate": 1e-3, "warmup_steps": 20}
    config.ema = {"decay": 0.99}
    config.save = {"every": 100}
    config.watch = {"log_every": 1}
    config.data = {
        "mixture": [
            {"name": recipe, "source": "synthetic", "recipe": recipe, "weight": weight}
            for recipe, weight in (("t2i", 2.0), ("edit", 1.0), ("vlm", 1.0), ("tutorial", 1.0))
        ],
        "rows": 2,
        "budget": {"und": 1216, "gen": 384, "vit": 640},
        "canvases": [
            {"height": height, "width": width, "count": count}
            for height, width, count in ((128, 128, 6), (96, 192, 3), (192, 96, 3))
        ],
    }
    return config
