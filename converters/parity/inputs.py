"""Checks of what happens before any network: image transforms and the tokenizer."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image as PILImage

from loom_jax.converters.parity.port import Port, channels_first
from loom_jax.converters.parity.records import Checked, Records
from loom_jax.document import ImageTransform, to_rgb


def check_transforms(records: Records, port: Port) -> Checked:
    """Resizing, normalising and conversion to RGB. The picture of a case is the one recorded last before it."""
    r, out = records.arrays("transforms"), Checked()
    image: np.ndarray | None = None
    for name, value in r.items():
        if name.startswith("image_"):
            image = value
            out.inputs.add(name)
        elif match := re.fullmatch(r"case_(\d+)_args", name):
            assert image is not None
            out.inputs.add(name)
            *bounds, img_num = (int(v) for v in value)
            pixels = ImageTransform(*bounds)(PILImage.fromarray(image), img_num)
            out.computed[f"case_{match[1]}_out"] = channels_first(pixels)
        elif name.startswith("rgb_") and name.endswith("_in"):
            out.inputs.add(name)
            out.computed[name.replace("_in", "_out")] = np.asarray(to_rgb(PILImage.fromarray(value)))
    rows = [
        [*map(int, row[:7]), *ImageTransform(*map(int, row[2:6])).size(int(row[0]), int(row[1]), int(row[6]))]
        for row in r["sizes"]
    ]
    out.computed["sizes"] = np.asarray(rows)
    return out


def check_tokenizer(records: Records, port: Port) -> Checked:
    """Encoding, decoding and special ids."""
    recorded, tokenizer = records.json("tokenizer"), port.encoder.tokenizer
    special = tokenizer.special
    ids = {
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "start_of_image": special.start_of_image,
        "end_of_image": special.end_of_image,
    }
    cases = []
    for case in recorded["cases"]:
        encoded = tokenizer.encode(case["text"])
        cases.append({"text": case["text"], "ids": encoded, "decoded": tokenizer.decode(encoded)})
    return Checked({"special_ids": ids, "length": len(tokenizer), "cases": cases})
