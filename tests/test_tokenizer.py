"""The tokenizer against the recorded encodings, and every way a folder of tokenizer files can be wrong."""

import dataclasses
import pickle
import shutil
from pathlib import Path

import pytest

from loom_jax.core import InputError, TokenizerError
from loom_jax.document import LOOM_TOKENS, Tokenizer
from tests.reference import CKPT, golden_json


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(CKPT)


def copy_files(folder: Path, *names: str) -> Path:
    for name in names:
        shutil.copy(CKPT / name, folder / name)
    return folder


def published(tokens: list[str] | tuple[str, ...] = LOOM_TOKENS) -> list[str]:
    """Loom's tokens with the misspelling of the published code, as parity asks for them."""
    return ["model>" if token == "<model>" else token for token in tokens]


def test_recorded_encodings_and_decodings(tokenizer: Tokenizer) -> None:
    record = golden_json("tokenizer")
    assert len(tokenizer) == record["length"]
    for case in record["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]


def test_recorded_special_ids(tokenizer: Tokenizer) -> None:
    record = golden_json("tokenizer")["special_ids"]
    assert dataclasses.asdict(tokenizer.special) == {
        "bos": record["bos_token_id"],
        "eos": record["eos_token_id"],
        "start_of_image": record["start_of_image"],
        "end_of_image": record["end_of_image"],
    }


def test_vocabulary_and_merges_are_read_like_tokenizer_json(tokenizer: Tokenizer, tmp_path: Path) -> None:
    plain = Tokenizer.from_folder(copy_files(tmp_path, "vocab.json", "merges.txt", "tokenizer_config.json"))
    assert len(plain) == len(tokenizer) and plain.special == tokenizer.special
    texts = [case["text"] for case in golden_json("tokenizer")["cases"]]
    for text in [
        *texts,
        "We'LL  say:\r\n\n \u00a0'Tis 2026…",
        "<|image_pad|></tool_call> \t x",
        "\u1e9b\u0323 e\u0301 ﬁ 🙂",
    ]:
        assert plain.encode(text) == tokenizer.encode(text), text
        assert plain.decode(plain.encode(text)) == tokenizer.decode(tokenizer.encode(text)), text


def test_missing_marks_are_added_after_the_last_id(tokenizer: Tokenizer, tmp_path: Path) -> None:
    bare = Tokenizer.from_folder(copy_files(tmp_path, "vocab.json", "merges.txt"))
    first = tokenizer.token_id("<|endoftext|>")  # the first added token: ids below are the vocabulary
    assert dataclasses.astuple(bare.special) == (first, first + 1, first + 2, first + 3)
    assert len(bare) == first + 4
    assert bare.encode("<|im_start|>hi") == [first, *tokenizer.encode("hi")]


def test_recorded_tokens_of_loom(tokenizer: Tokenizer) -> None:
    record = golden_json("loom")["special_tokens"]
    loom = tokenizer.with_tokens(published())
    assert record["added"] == published()
    assert len(tokenizer) == record["length_before"] and len(loom) == record["length_after"]
    assert [loom.token_id(token) for token in record["added"]] == list(
        range(record["length_before"], record["length_after"])
    )
    for text, ids in record["encodings"].items():
        assert loom.encode(text) == ids, text
    assert loom.special == tokenizer.special


def test_intended_tokens_of_loom(tokenizer: Tokenizer) -> None:
    loom = tokenizer.with_tokens(LOOM_TOKENS)
    assert len(LOOM_TOKENS) == 16
    for place, token in enumerate(LOOM_TOKENS):
        assert loom.encode(token) == [len(tokenizer) + place]
        assert loom.decode([len(tokenizer) + place]) == token
    assert len(loom.with_tokens(LOOM_TOKENS)) == len(loom)


def test_with_tokens_leaves_the_first_tokenizer_as_it_was(tokenizer: Tokenizer) -> None:
    before = tokenizer.encode("<style>")
    tokenizer.with_tokens(["<style>"])
    assert tokenizer.encode("<style>") == before and len(before) > 1


def test_padding_ids_of_the_embedding_table_decode_to_nothing(tokenizer: Tokenizer) -> None:
    boat = tokenizer.encode("boat")
    assert tokenizer.decode([boat[0], len(tokenizer), *boat[1:], 511, 152063]) == "boat"
    assert tokenizer.decode([len(tokenizer)]) == ""


def test_cut_utf8_decodes_to_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("漢")[:-1]) == "\ufffd"


def test_a_tokenizer_can_be_pickled_for_data_workers(tokenizer: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("A small boat") == tokenizer.encode("A small boat") and again.special == tokenizer.special


def test_half_a_surrogate_pair_is_refused_by_its_place(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"not valid Unicode at character 3"):
        tokenizer.encode("abc\udc80")


def test_unknown_tokens_have_no_id(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"<\|turn_1\|>.*with_tokens"):
        tokenizer.token_id("<|turn_1|>")


def refused(folder: Path) -> str:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_with_an_unknown_tokenizer_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x05sentencepiece")
    message = refused(tmp_path)
    for part in ("tokenizer.json", "vocab.json with merges.txt", "found tokenizer.model"):
        assert part in message


def test_a_vocabulary_without_merges_is_refused(tmp_path: Path) -> None:
    assert "found vocab.json" in refused(copy_files(tmp_path, "vocab.json"))


def test_empty_and_missing_folders_are_refused(tmp_path: Path) -> None:
    assert "found nothing" in refused(tmp_path)
    assert "not a folder" in refused(tmp_path / "away")


@pytest.mark.parametrize(
    "content", [b"", b'{"version": "1.0", "mod', b"{}", b"[]", b'{"model": {"type": "Unknown"}}', b"\xff\xfe\x00"]
)
def test_a_corrupt_tokenizer_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert "tokenizer.json cannot be read as a tokenizer" in refused(tmp_path)


def test_merges_that_the_vocabulary_lacks_are_refused(tmp_path: Path) -> None:
    copy_files(tmp_path, "vocab.json", "merges.txt")
    with (tmp_path / "merges.txt").open("a") as file:
        file.write("漢 字\n")
    assert "vocab.json with merges.txt cannot be read" in refused(tmp_path)


@pytest.mark.parametrize("content", ['{"added_tokens_decoder": [3]}', "{", "[]", '{"added_tokens_decoder": {"x": {}}}'])
def test_a_corrupt_tokenizer_config_is_refused(tmp_path: Path, content: str) -> None:
    copy_files(tmp_path, "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert "tokenizer_config.json: cannot be read" in refused(tmp_path)


def test_added_tokens_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    copy_files(tmp_path, "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"77": {"content": "<|im_start|>"}}}')
    assert "should have id 77, but the vocabulary gives it 471" in refused(tmp_path)
