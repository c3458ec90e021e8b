"""A model small enough for a laptop's CPU, to try the framework and to find mistakes: no two of its widths are alike.

Command: none yet trains it; loom_jax.core.from_mapping(LoomConfig, get_config().model.to_dict()) describes it to the
  networks.
Data: none. The vocabulary has the size of the tokenizer in tests/assets/bagel_tiny.
Hardware: any CPU with 1 GiB of free memory, in float32.
Expect: 1.1 million parameters in the transformer; images of up to 192 by 192 pixels to generate, 176 by 176 to look at.
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
            },
            "max_latent_size": 12,
            "vit_max_num_patch_per_side": 22,
            "latent_patch_size": 2,
            "timestep_shift": 1.0,
            "interpolate_pos": False,
        }
    )
    return config
