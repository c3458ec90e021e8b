"""`loom data`: what it writes can be read again, and bad usage is one line."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from loom_jax.cli import main
from loom_jax.commands.data import RECIPE_NAMES
from loom_jax.converters.bagel import to_orbax
from loom_jax.data import RECIPES, open_source, read_moments
from loom_jax.document import ImageTransform
from tests.data import ROWS
from tests.reference import CKPT


def test_build_copies_rows_with_counts_and_checksums(tmp_path, capsys):
    rows = open_source("parquet", [str(ROWS / "edit")])
    out = tmp_path / "edit"
    command = ["data", "build", str(ROWS / "edit"), "--source", "parquet", "--recipe", "edit", "--out", str(out)]
    assert main(command) == 0
    assert "2 rows in 1 files" in capsys.readouterr().out
    built = open_source("array_record", [str(out)])
    assert [built[i] for i in range(2)] == [rows[i] for i in range(2)]
    record = json.loads(next(out.rglob("loom_rows.json")).read_text())
    assert record["rows"] == 2 and record["bad"] == {} and len(record["files"]) == 1
    assert main(command) == 2 and "not empty" in capsys.readouterr().err


def test_rows_that_the_recipe_cannot_use_are_left_out_and_counted(tmp_path, capsys):
    lines = [json.dumps({"conversations": [{"from": "gpt", "value": "yes"}]})] * 3 + ["{}"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    args = ["data", "build", str(tmp_path), "--source", "jsonl", "--recipe", "vlm", "--out", str(tmp_path / "out")]
    assert main(args) == 0
    assert "missing column conversations (1)" in capsys.readouterr().out
    assert len(open_source("array_record", [str(tmp_path / "out")])) == 3


def test_inspect_shows_texts_pictures_and_faults(tmp_path):
    (tmp_path / "rows.jsonl").write_text((ROWS / "vlm.jsonl").read_text() + '{"image": "gone.png"}\n')
    page = tmp_path / "page.html"
    where = [str(tmp_path / "rows.jsonl"), "--images", str(ROWS / "vlm_images"), "--tokenizer", str(CKPT)]
    assert main(["data", "inspect", *where, "--source", "jsonl", "--recipe", "vlm", "--out", str(page)]) == 0
    html = page.read_text()
    assert html.count("<h2>Row") == 4 and html.count("data:image/jpeg;base64,") == 3
    assert "She is mending a net." in html and "missing file" in html
    assert not re.search(r"(src|href)=\"(?!data:)", html), "the page needs other files"


def test_inspect_escapes_what_rows_say(tmp_path):
    turns = [{"from": "human", "value": "<script>alert(1)</script>"}, {"from": "gpt", "value": "no"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"conversations": turns}))
    page = tmp_path / "page.html"
    assert main(["data", "inspect", str(tmp_path), "--source", "jsonl", "--recipe", "vlm", "--out", str(page)]) == 0
    assert "<script>" not in page.read_text() and "&lt;script&gt;" in page.read_text()


def test_encode_stores_the_posterior_of_the_vae(tmp_path):
    import jax.numpy as jnp

    from loom_jax.models.load import load_folder

    to_orbax(CKPT, tmp_path / "model")
    transform = ["--vae-transform", "48", "32", "16"]
    args = ["--source", "synthetic", "--recipe", "edit", "--limit", "1", "--checkpoint", str(tmp_path / "model")]
    assert main(["data", "encode", *args, *transform, "--dtype", "float32", "--out", str(tmp_path / "out")]) == 0
    row = open_source("array_record", [str(tmp_path / "out")])[0]
    assert len(row["moments"]) == len(row["image_list"])
    stored = read_moments(row["moments"][1])
    image = Image.open(io.BytesIO(row["image_list"][1])).convert("RGB")
    pixels = ImageTransform(48, 32, 16)(image)
    mean, logvar = load_folder(tmp_path / "model").vae.encode(jnp.asarray(pixels[None]))
    height, width = pixels.shape[0] // 16, pixels.shape[1] // 16
    assert stored.shape == (height, width, 128)
    for part, expected in zip(np.split(stored, 2, axis=-1), (mean, logvar), strict=True):
        whole = part.reshape(height, width, 2, 2, 16).transpose(0, 2, 1, 3, 4).reshape(2 * height, 2 * width, 16)
        np.testing.assert_allclose(whole, np.asarray(expected)[0], atol=1e-4 * float(np.std(expected)))


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "COMMAND"),
        (["build"], "--source"),
        (["build", "nowhere", "--source", "parquet", "--recipe", "t2i", "--out", "x"], "nowhere"),
        (["build", "--source", "synthetic", "--recipe", "t2i", "--out", "x"], "--limit"),
        (["inspect", "x", "--source", "synthetic", "--recipe", "t2i", "--out", "x.html"], "leave out x"),
        (["inspect", "--source", "synthetic", "--recipe", "riddle", "--out", "x.html"], "riddle"),
    ],
)
def test_bad_usage_is_one_line(argv, named, capsys):
    assert main(["data", *argv]) == 2
    err = capsys.readouterr().err
    assert named in err and err.count("\n") == 1


def test_every_recipe_can_be_looked_at():
    assert sorted(RECIPE_NAMES) == sorted(RECIPES)
