"""Where weights come from: what a run's record says about it, and what weights that are exported from it say again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loom_jax.checkpoint.folder import RECORD, read_folder
from loom_jax.checkpoint.remote import address_of
from loom_jax.checkpoint.run import read_meta, saved_steps, step_path

AUTOENCODER_RECORD = "autoencoder.json"
"""Name of the file that makes a folder a training run of an autoencoder."""

WENT_ON = "went_on"
"""Key, in a checkpoint's meta and in an exported record, of what changed where the run went on."""

_ABSOLUTE = re.compile(r"""(?<![^\s='"(\[,])(?:/[^/'"]+)*/(?=[^/\s])""")
"""The folders of an absolute path, in a text that may hold several: not those of gs://BUCKET/FOLDER or of a/b."""


def run_origin(recipe: Sequence[str], devices: str) -> dict[str, Any]:
    """Returns by what a run is trained, as far as its configuration does not say so.

    Args:
      recipe: as it was given: the file, and what was changed in it (`KEY=VALUE`); empty for a job made in Python.
      devices: how many of which kind.
    """
    origin = {"recipe": list(recipe), "revision": _revision(), "devices": devices}
    return {key: value for key, value in origin.items() if value}


def goes_on(
    before: Sequence[Mapping[str, Any]], begun: Mapping[str, Any], step: int, now: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns by what a run went on, with the start at hand where it differs from the last.

    Args:
      before: what this returned for the checkpoint that is gone on from; empty for none.
      begun: the origin of the run.
      step: of that checkpoint, 0 for none.
      now: `run_origin` of the start at hand.
    """
    last = before[-1] if before else begun
    changed = any(last.get(key) != now.get(key) for key in ("recipe", "revision", "devices"))
    return [*map(dict, before), *([{"after_step": step, **now}] if changed else [])]


def began_with(init_from: str | None, vae_from: str | None) -> dict[str, Any]:
    """Returns what the weights that a run begins with say about themselves; of what is not there, its name alone."""
    found: dict[str, Any] = {}
    if init_from is not None:
        there = (Path(init_from) / RECORD).is_file()
        found["init_from"] = {"folder": _name(init_from), **(read_folder(init_from).provenance if there else {})}
    if vae_from is not None:
        found["vae_from"] = autoencoder_origin(vae_from)
    return found


def autoencoder_origin(run: str | Path) -> dict[str, Any]:
    """Returns where an autoencoder comes from, by the record of its training run; the name of the folder if it is gone.

    Runs from before origins were recorded say as much as their configurations do; how many steps there were, and by
    what the run went on, its newest checkpoint says if it is still there.
    """
    file = Path(run) / AUTOENCODER_RECORD
    if not file.is_file():
        return {"folder": _name(run)}
    record = json.loads(file.read_text(encoding="utf-8"))
    config = record["config"]
    meta = read_meta(step_path(Path(run), None)) if saved_steps(Path(run)) else {}
    settings = {key: config.get(key) for key in ("seed", "total_steps", "keep_encoder")}
    settings["total_steps"] = meta.get("total_steps", settings["total_steps"])
    first = {} if config.get("init_from") is None else {"init_from": autoencoder_origin(config["init_from"])}
    later = {WENT_ON: meta[WENT_ON]} if meta.get(WENT_ON) else {}
    origin = {**first, **record.get("origin", {}), **later}
    return {"folder": _name(run), "tool": record["created_by"], **settings, **origin}


def portable(record: Any) -> Any:
    """Returns a record without paths of this machine: of an absolute path only its last name stays."""
    if isinstance(record, Mapping):
        return {key: portable(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [portable(value) for value in record]
    return _ABSOLUTE.sub("", record) if isinstance(record, str) else record


def _name(folder: str | Path) -> str:
    return address_of(folder) or Path(folder).resolve().name


def _revision() -> str | None:
    """The commit that the package runs from, where it is a checkout; files that were changed make it `...-dirty`."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    git = ["git", "--no-optional-locks", "-c", "safe.directory=*", "-C", str(root)]
    found = subprocess.run([*git, "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True)
    return found.stdout.strip() or None
