"""`loom train`: runs a recipe, and goes on where it stopped."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loom_jax.core import STOPPED, ArgumentParser, ConfigError, InputError, apply_overrides, from_mapping

if TYPE_CHECKING:
    from loom_jax.train import TrainConfig

NAME = "loom train"
CONFIG = "--config"
EPILOG = """examples:
  loom train --config configs/tiny.py --workdir runs/tiny --config.total_steps=200
  loom train --config configs/bagel_7b_finetune.py:h100-8 --workdir runs/7b --config.init_from=bagel_7b \\
      --config.data.mixture.0.paths="('rows/*.parquet',)"
  loom train --config configs/tiny.py --workdir runs/tiny --replay-step 120

--config.KEY=VALUE changes any key of the recipe; values are Python literals or plain text. The same command again goes
on from the last checkpoint in the workdir. SIGTERM or Ctrl-C saves and stops, with status 75."""


def main(argv: list[str]) -> int:
    """Runs the command; returns STOPPED where it was asked to stop and has saved.

    Raises:
      InputError: bad usage, or a configuration that cannot be used.
      LoomError: the run had to stop.
    """
    overrides = [a.removeprefix(f"{CONFIG}.") for a in argv if a.startswith(f"{CONFIG}.")]
    parser = ArgumentParser(prog=NAME, description="Train a model by a recipe.", epilog=EPILOG)
    add = parser.add_argument
    add(
        CONFIG,
        type=Path,
        required=True,
        metavar="FILE",
        help="recipe, such as configs/tiny.py, or one of its variants: FILE:VARIANT",
    )
    add("--workdir", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--replay-step", type=int, metavar="N", help="rebuild step N's batch and measure the model on it"
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of a job of several processes; by default the cluster's"
    )
    add("--num-processes", type=int, metavar="N", help="likewise")
    add("--process-id", type=int, metavar="I", help="likewise")
    args = parser.parse_args([a for a in argv if not a.startswith(f"{CONFIG}.")])
    recipe, given = read_recipe(args.config), (str(args.config), *overrides)
    from loom_jax.checkpoint import refuse_address

    refuse_address(args.workdir, "--workdir")
    if "pictures" in recipe:
        return _train_autoencoder(recipe, given, args.workdir)
    config = read_config(recipe, overrides)
    from loom_jax.parallel import start_distributed

    start_distributed(args.coordinator, args.num_processes, args.process_id)
    if args.replay_step is not None:
        from loom_jax.train import replay

        print(replay(config, args.workdir, args.replay_step))
        return 0
    from loom_jax.generate.samples import sample_hooks
    from loom_jax.train import train

    state = train(config, args.workdir, sample_hooks, given)
    print(args.workdir)
    return 0 if int(state.step) >= config.total_steps else STOPPED


def _train_autoencoder(recipe: dict[str, Any], given: tuple[str, ...], workdir: Path) -> int:
    from loom_jax.train import AutoencoderTrainConfig, train_autoencoder

    config = from_mapping(AutoencoderTrainConfig, apply_overrides(recipe, given[1:]))
    state = train_autoencoder(config, workdir, given)
    print(workdir)
    return 0 if int(state.step) >= config.total_steps else STOPPED


def read_recipe(path: Path) -> dict[str, Any]:
    """Returns what `get_config()` of a recipe gives, as nested plain values; `get_config("NAME")` for FILE:NAME.

    Raises:
      InputError: there is no such file, it cannot be run, it has no get_config, or none that knows NAME.
    """
    text, _, variant = str(path).partition(".py:")
    path = Path(f"{text}.py") if variant else path
    if not path.is_file():
        raise InputError(f"{path}: there is no such recipe; those that come along lie in configs/")
    try:
        names = runpy.run_path(str(path))
    except (SyntaxError, ImportError, NameError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be run ({type(error).__name__}: {error})") from error
    if "get_config" not in names:
        raise InputError(f"{path} has no function get_config: expected one that returns an ml_collections.ConfigDict")
    try:
        return names["get_config"](*([variant] if variant else [])).to_dict()
    except (TypeError, KeyError) as error:
        variants = names.get("MESHES") or names.get("VARIANTS")
        known = f"; it knows {', '.join(variants)}" if variants else ": it takes none"
        raise InputError(f"{path} has no variant {variant!r}{known}") from error


def read_config(recipe: dict[str, Any], overrides: list[str]) -> TrainConfig:
    """Returns the configuration of a recipe with overrides.

    Raises:
      ConfigError: a key is unknown or missing, or a value has the wrong type.
    """
    from loom_jax.train import TrainConfig

    if "data" not in recipe:
        raise ConfigError("this recipe describes a model without data: take one that trains, such as configs/tiny.py")
    return from_mapping(TrainConfig, apply_overrides(recipe, overrides))
