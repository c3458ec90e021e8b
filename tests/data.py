"""A small input pipeline for tests: synthetic rows, a tiny encoder, budgets that hold several documents."""

from loom_jax.core import from_mapping
from loom_jax.data import DataConfig, Tables, make_pipeline
from loom_jax.document import LOOM_TOKENS, Encoder, ImageTransform, Tokenizer
from tests.reference import ASSETS, CKPT

ROWS = ASSETS / "rows"
TABLES = Tables(max_latent_size=9, vit_side=13, patch_size=8, latent_dim=3)


def encoder() -> Encoder:
    tokenizer = Tokenizer.from_folder(CKPT).with_tokens(LOOM_TOKENS)
    return Encoder(tokenizer, 16, 8, ImageTransform(128, 64, 16), ImageTransform(96, 48, 8))


def data_config(*recipes: str, **changes) -> DataConfig:
    """Two rows a batch of synthetic data, equally often of each recipe."""
    names = recipes or ("t2i", "edit", "vlm", "tutorial")
    values = {
        "mixture": [{"name": name, "source": "synthetic", "recipe": name} for name in names],
        "rows": 2,
        "budget": {"und": 1024, "gen": 448, "vit": 640},
        "canvases": [{"height": 128, "width": 128, "count": 16}],
        "look_ahead": 1.5,
        **changes,
    }
    return from_mapping(DataConfig, values)


def pipeline(config: DataConfig, process_index: int = 0, process_count: int = 1, sources=None):
    return make_pipeline(config, encoder(), TABLES, process_index, process_count, sources)
