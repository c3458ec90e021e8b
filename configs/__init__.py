"""Recipes as ml_collections files. Each module has `get_config()`; import the module, nothing is exported from here."""

__all__: list[str] = []
