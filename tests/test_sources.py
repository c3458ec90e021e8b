"""Rows of every kind of source: found, read at random, sent to other processes, and left out where they are damaged."""

import json
import pickle
import shutil

import pyarrow as pa
import pytest
from pyarrow import parquet

from loom_jax.core import InputError
from loom_jax.data import BadRow, StoredRows, damaged_files, open_source, write_rows
from tests.data import ROWS


def write_parquet(path, first, count, group):
    rows = [
        {"image": bytes([i % 251]) * 40, "captions": json.dumps({"a": f"row {i}"})} for i in range(first, first + count)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group, compression="none")


@pytest.fixture
def parquet_folder(tmp_path):
    for number, (first, count) in enumerate(((0, 7), (7, 5), (12, 4))):
        write_parquet(tmp_path / f"part_{number}.parquet", first, count, group=3)
    return tmp_path


def captions(source):
    return [json.loads(source[i]["captions"])["a"] for i in range(len(source))]


def test_parquet_rows_in_order_whatever_the_row_groups(parquet_folder):
    source = open_source("parquet", [str(parquet_folder)])
    assert captions(source) == [f"row {i}" for i in range(16)]
    assert list(source.blocks) == [3, 3, 1, 3, 2, 3, 1] and not source.bad_files
    assert source[11] == pickle.loads(pickle.dumps(source))[11]


def test_patterns_and_single_files(parquet_folder):
    assert len(open_source("parquet", [str(parquet_folder / "part_1.parquet")])) == 5
    assert len(open_source("parquet", [str(parquet_folder / "part_[02].parquet")])) == 11


def test_a_damaged_parquet_file_in_the_middle_is_left_out(parquet_folder):
    (parquet_folder / "part_1.parquet").write_bytes(b"PAR1 this is no parquet file PAR1")
    source = open_source("parquet", [str(parquet_folder)])
    assert captions(source) == [f"row {i}" for i in [*range(7), *range(12, 16)]]
    (fault,) = source.bad_files
    assert fault.reason == "corrupt file" and "part_1.parquet" in fault.detail


def test_damaged_pages_are_bad_rows(parquet_folder):
    path = parquet_folder / "part_1.parquet"
    content = bytearray(path.read_bytes())
    content[4:300] = bytes(296)
    path.write_bytes(content)
    source = open_source("parquet", [str(parquet_folder)])
    with pytest.raises(BadRow) as fault:
        source[8]
    assert fault.value.reason == "corrupt file"
    assert json.loads(source[13]["captions"])["a"] == "row 13"


def test_the_published_index_of_row_groups_names_the_files():
    source = open_source("parquet", [str(ROWS / "edit_info.json")])
    assert [len(source[i]["image_list"]) for i in range(len(source))] == [2, 3]


def test_jsonl_brings_its_pictures():
    source = open_source("jsonl", [str(ROWS / "vlm.jsonl")], images=str(ROWS / "vlm_images"))
    one, two, none = (source[i] for i in range(3))
    assert two["images"][0] == one["images"][0] == (ROWS / "vlm_images" / "one.png").read_bytes()
    assert "images" not in none and len(two["images"]) == 2
    assert pickle.loads(pickle.dumps(source))[1] == two


def test_faults_of_jsonl_lines_are_bad_rows(tmp_path):
    lines = ['{"image": "gone.png"}', "", "{cut", "[1]", '{"conversations": []}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = open_source("jsonl", [str(tmp_path)])
    assert len(source) == 4 and source[3] == {"conversations": []}
    reasons = []
    for index in range(3):
        with pytest.raises(BadRow) as fault:
            source[index]
        reasons.append(fault.value.reason)
    assert reasons == ["missing file", "line is no JSON", "line is no JSON object"]


def test_tutorial_folders(tmp_path):
    folder = tmp_path / "tutorials" / "rice"
    folder.mkdir(parents=True)
    for number in (10, 2, 1, 0, 3, 4, 5, 6, 7, 8, 9):
        (folder / f"image_{number}.jpg").write_bytes(bytes([number]))
    (folder / "detail.txt").write_text("Step1: wash, Step2: boil\n")
    (folder / "info.json").write_text(json.dumps({"title": "rice"}))
    source = open_source("folders", [str(tmp_path / "tutorials")])
    row = source[0]
    assert row["instruction_list"] == ["rice", "Step1: wash, Step2: boil"]
    assert [image[0] for image in row["image_list"]] == list(range(11))
    (folder / "image_4.jpg").unlink()
    with pytest.raises(BadRow, match="not numbered"):
        source[0]


STORED = [
    {"image_list": [b"\x00\xff", b""], "instruction_list": [["Füge hinzu", "b"], []], "n": None},
    {"image": b"png", "captions": '{"a": "b"}'},
    {"conversations": [{"from": "gpt", "value": "no picture"}]},
]


def test_stored_rows_come_back(tmp_path):
    record = write_rows(STORED, tmp_path / "set", "three rows", {"recipe": "mixed"})
    assert record["rows"] == 3 and record["recipe"] == "mixed"
    source = StoredRows([str(tmp_path / "set")])
    assert [source[i] for i in range(3)] == STORED
    assert pickle.loads(pickle.dumps(source))[0] == STORED[0]
    assert len(open_source("array_record", [str(tmp_path / "set")] * 2)) == 6


def test_damage_of_stored_files_is_found(tmp_path):
    write_rows(STORED, tmp_path / "set", "three rows")
    (file,) = (tmp_path / "set").rglob("*array_record-*")
    content = bytearray(file.read_bytes())
    content[70] ^= 1
    file.write_bytes(content)
    assert damaged_files(tmp_path / "set") == [file.name]
    file.write_bytes(content[:-1])
    with pytest.raises(InputError, match="its record says"):
        StoredRows([str(tmp_path / "set")])


def test_stored_rows_are_written_once_and_whole(tmp_path):
    def failing():
        yield STORED[0]
        raise BadRow("for tests")

    with pytest.raises(BadRow):
        write_rows(failing(), tmp_path / "set", "cut short")
    assert not (tmp_path / "set").exists()
    shutil.copytree(ROWS, tmp_path / "set")
    with pytest.raises(InputError, match="not empty"):
        write_rows(STORED, tmp_path / "set", "in the way")


def test_synthetic_rows_are_always_the_same():
    one, other = open_source("synthetic", recipe="edit"), open_source("synthetic", recipe="edit")
    assert one[5] == other[5] != one[6]


@pytest.mark.parametrize(
    ("kind", "paths", "named"),
    [
        ("parquet", ["nowhere/*.parquet"], "nowhere"),
        ("parquet", [], "paths"),
        ("folders", ["nowhere"], "nowhere"),
        ("array_record", ["nowhere"], "loom data build"),
        ("tfrecord", ["x"], "array_record"),
    ],
)
def test_what_is_not_there_is_named(kind, paths, named):
    with pytest.raises(InputError, match=named):
        open_source(kind, paths)
