"""A page to look at interleaved work with: one file that needs no network and nothing beside it."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image as PILImage

from loom_jax.core import ImageError
from loom_jax.document import PLANNED, assign_entities, open_image, to_rgb
from loom_jax.generate.saved import SavedWork, write_whole

GALLERY = "gallery.html"
LARGEST_PNG = 512
"""Pictures with longer sides stand in the page as JPEG, which keeps it small; the PNGs lie beside it."""
SMALL = 128
"""Pictures with no longer sides are shown with square pixels, where a browser blurs what it enlarges."""
_QUALITY = 92
_TASKS = {"tutorial": "Tutorial", "compose": "Composition", "style": "Style transfer", "decompose": "Decomposition"}


def write_gallery(work: SavedWork) -> Path:
    """Writes `gallery.html` into the folder of saved work; returns its path.

    Raises:
      LoomError: it cannot be written.
    """
    path = work.folder / GALLERY
    # What is no valid Unicode in a prompt becomes a question mark.
    write_whole(path, render_gallery(work).encode("utf-8", "replace"))
    return path


def render_gallery(work: SavedWork) -> str:
    """Returns the page as HTML: plan beside frames, the history of each frame, settings, timings, failures."""
    requests = [_shown(entry, work.folder) for entry in work.results]
    counts = {state: sum(r["state"] == state for r in requests) for state in ("finished", "running", "failed")}
    template = _templates().get_template("gallery.html.j2")
    settings = {k: v for k, v in work.record.items() if k not in ("results", "sessions", "kind", "schema")}
    return template.render(
        requests=requests, counts=counts, settings=_flat(settings), sessions=work.record.get("sessions", [])
    )


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("loom_jax.generate"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns what the page shows of a request."""
    frames = [{**frame, **_embed(folder / frame["image"])} for frame in entry["frames"]]
    images, entities, planned = entry["images"], entry["entities"], entry["task"] in PLANNED
    if entities is None or len(entities) != len(images):  # of other number in requests that failed because of it
        # Which tokens there are was checked when the pictures were made.
        assigned = assign_entities(entry["instruction"], len(images), known=lambda token: True)
        entities = [None] * len(images) if planned else assigned
    given = ("seed", "policy", "num_steps") if planned else ("seed",)
    slowest = max((frame["seconds"] for frame in frames), default=0.0)
    return {
        **entry,
        "title": _TASKS.get(entry["task"], "Request"),
        "frames": [{**frame, "share": frame["seconds"] / slowest if slowest else 0.0} for frame in frames],
        "conditions": [{"token": token, **_embed(folder / name)} for token, name in zip(entities, images, strict=True)],
        "seconds": sum(frame["seconds"] for frame in frames),
        "given": {name: entry[name] for name in given if entry.get(name) is not None},
        # Frames still to come have their places in the strip.
        "missing": list(range(len(frames) + 1, len(entry["steps"]) + 1)) if entry["state"] != "failed" else [],
    }


def _embed(path: Path) -> dict[str, Any]:
    """Returns a picture as a data URI, None where it cannot be read any more, and whether it is small."""
    try:
        image = to_rgb(open_image(path))
    except ImageError:
        return {"data": None, "small": False}
    kind, options = ("PNG", {}) if max(image.size) <= LARGEST_PNG else ("JPEG", {"quality": _QUALITY})
    data = f"data:image/{kind.lower()};base64,{_encode(image, kind, options)}"
    return {"data": data, "small": max(image.size) <= SMALL}


def _encode(image: PILImage.Image, kind: str, options: dict[str, Any]) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings as one table, `image_settings.num_timesteps` and the like."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value
    return out
