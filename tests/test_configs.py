"""The recipes: each names a whole model, and a wrong key in one is an error that says where it is."""

import importlib

import pytest

from loom_jax.core import ConfigError, LoomConfig, from_mapping, to_mapping

RECIPES = ["tiny", "bagel_7b", "world_tiny", "world_ablation"]


def recipe(name):
    return importlib.import_module(f"loom_jax.configs.{name}")


def keys(mapping, prefix=""):
    """Returns the dotted paths of all leaves."""
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_spells_every_size_of_the_model(name):
    model = recipe(name).get_config().model.to_dict()
    config = from_mapping(LoomConfig, model)
    assert set(keys(model)) == set(keys(to_mapping(config)))
    assert from_mapping(LoomConfig, to_mapping(config)) == config


@pytest.mark.parametrize("name", [*RECIPES, "world_autoencoder"])
def test_recipe_promises_what_a_reader_needs(name):
    text = recipe(name).__doc__
    assert all(word in text for word in ("Command:", "Data:", "Hardware:", "Expect:"))


@pytest.mark.parametrize("name", RECIPES)
def test_unknown_key_is_named_with_its_path(name):
    model = recipe(name).get_config().model.to_dict()
    model["vit"]["hiden_size"] = 3
    with pytest.raises(ConfigError, match=r"'vit\.hiden_size'"):
        from_mapping(LoomConfig, model, where="")


def test_wrong_type_and_missing_key_are_named_with_their_path():
    model = recipe("tiny").get_config().model.to_dict()
    model["decoder"]["num_layers"] = "three"
    with pytest.raises(ConfigError, match=r"decoder\.num_layers='three'"):
        from_mapping(LoomConfig, model)
    del model["decoder"]["num_layers"]
    with pytest.raises(ConfigError, match=r"'decoder\.num_layers' is missing"):
        from_mapping(LoomConfig, model)


def test_bagel_7b_has_the_sizes_of_the_release():
    config = from_mapping(LoomConfig, recipe("bagel_7b").get_config().model.to_dict())
    assert (config.latent_dim, config.latent_stride, config.vit.patch_dim) == (64, 16, 588)
    assert config.decoder.num_heads * config.decoder.head_dim == config.decoder.hidden_size


def test_tiny_has_no_two_widths_alike():
    """So that a swapped axis cannot go unnoticed in what is built from it."""
    config = from_mapping(LoomConfig, recipe("tiny").get_config().model.to_dict())
    decoder, vit, vae = config.decoder, config.vit, config.vae
    sizes = [decoder.vocab_size, decoder.hidden_size, decoder.intermediate_size, decoder.num_layers, decoder.num_heads]
    sizes += [decoder.num_kv_heads, decoder.head_dim, vit.hidden_size, vit.intermediate_size, vit.num_heads]
    sizes += [vit.patch_size, vit.patch_dim, vit.num_positions, vae.ch, config.latent_dim, config.max_latent_size]
    sizes += [vit.num_layers, vit.hidden_size // vit.num_heads]
    assert len(sizes) == len(set(sizes))
