"""The published BAGEL 7B model, which Loom fine-tunes: 14.6 B parameters, two experts of 7 B side by side.

Command: loom convert to-orbax RELEASE CHECKPOINT, then loom generate --checkpoint CHECKPOINT --prompt "..." --out DIR
Data: none; the weights come from a release folder (ema.safetensors, ae.safetensors, the json files, the tokenizer).
Hardware: 29.2 GB of bfloat16 weights; generating needs that plus about 0.9 GiB for each context of 16k tokens.
Expect: the sizes of the release. The converter reads a checkpoint's own sizes from its weights, and this recipe agrees.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe; `model` holds the keys of loom_jax.core.LoomConfig."""
    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict(
        {
            "decoder": {
                "vocab_size": 152_064,
                "hidden_size": 3584,
                "intermediate_size": 18_944,
                "num_layers": 28,
                "num_heads": 28,
                "num_kv_heads": 4,
                "head_dim": 128,
                "rope_theta": 1e6,
                "rms_norm_eps": 1e-6,
            },
            "vit": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_layers": 26,  # the 27th layer of SigLIP is not used and not in the weights
                "num_heads": 16,
                "patch_size": 14,
                "num_positions": 4900,
                "layer_norm_eps": 1e-6,
            },
            "vae": {
                "ch": 128,
                "ch_mult": (1, 2, 4, 4),
                "num_res_blocks": 2,
                "z_channels": 16,
                "scale_factor": 0.3611,
                "shift_factor": 0.1159,
                "in_channels": 3,
                "out_ch": 3,
                "num_groups": 32,
            },
            "max_latent_size": 64,
            "vit_max_num_patch_per_side": 70,
            "latent_patch_size": 2,
            "timestep_shift": 1.0,
            "interpolate_pos": False,
        }
    )
    return config
