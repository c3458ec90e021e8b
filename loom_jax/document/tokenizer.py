"""The byte-level BPE tokenizer of a release folder, with the marks that frame segments and Loom's own tokens.

Source: spec sections 2 and 12. Ids beyond the tokenizer are possible: embedding tables are padded to a round size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from loom_jax.core import InputError, TokenizerError
from loom_jax.document.layout import SpecialIds

SPECIAL_TOKENS = {
    "bos": "<|im_start|>",
    "eos": "<|im_end|>",
    "start_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
}
"""Field of SpecialIds -> token. Interface data of the checkpoints."""

LOOM_TOKENS = (
    *(f"<|turn_{turn}|>" for turn in range(1, 7)),
    "<|Stage 1|>",
    "<|Stage 2|>",
    "<image 1>",
    "<style>",
    "<image 2>",
    "<original_image>",
    "<lower>",
    "<upper>",
    "<model>",
    "<object>",
)
"""Loom's tokens in the order of their ids. The published code misspells `<model>` as `model>`."""

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 cuts text into pieces before merging: interface data of the vocabulary."""

_TOKENIZER, _VOCAB, _MERGES, _CONFIG = "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"


class Tokenizer:
    """Text to token ids and back. Never changed once made, so it may be shared and pickled.

    Attributes:
      special: ids of the marks that frame segments; marks that the files lack were added after the last id.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        """Takes over `inner`: nobody else may change it afterwards. See `from_folder`."""
        inner.no_truncation()
        inner.no_padding()
        inner.add_tokens(list(SPECIAL_TOKENS.values()))  # the library passes over those that are there
        self._inner = inner
        self.special = SpecialIds(**{field: self.token_id(token) for field, token in SPECIAL_TOKENS.items()})

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Reads tokenizer.json, or else vocab.json with merges.txt, and the added tokens of tokenizer_config.json.

        Raises:
          TokenizerError: none of these files is there, or one cannot be read; the file is named.
        """
        folder = Path(folder)
        inner = _read_model(folder)
        _add_configured_tokens(inner, folder / _CONFIG)
        return cls(inner)

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """Returns a tokenizer without merges, a token for each byte: for models that start from nothing."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        return cls(_qwen2(models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json with all added tokens into a folder."""
        self._inner.save(str(Path(folder) / _TOKENIZER))

    def __len__(self) -> int:
        """Number of tokens with the added ones; not the size of the embedding table, which may be larger."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int:
        """Returns the id of one token, added or of the vocabulary.

        Raises:
          TokenizerError: there is no such token.
        """
        found = self._inner.token_to_id(token)
        if found is None:
            raise TokenizerError(f"the tokenizer has no token {token!r} among its {len(self)}: add it with with_tokens")
        return found

    def has_token(self, token: str) -> bool:
        """Returns whether there is such a token, added or of the vocabulary."""
        return self._inner.token_to_id(token) is not None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` without begin and end marks; special strings inside it become their single ids.

        Raises:
          InputError: the text holds half a surrogate pair (bytes that were no UTF-8), which no tokenizer can take.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text is not valid Unicode at character {error.start}: found {text[error.start]!r}, "
                "expected text that was decoded from UTF-8"
            ) from error
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, special tokens spelled out; bytes that are no UTF-8 become U+FFFD.

        Ids beyond the tokenizer, the padding of the embedding table that greedy decoding may still pick, stand for no
        text and give none (the original crashes on them).
        """
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=False)

    def with_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """Returns a new tokenizer with ordinary added tokens after the last id, in order; known ones keep their id."""
        inner = tokenizers.Tokenizer.from_str(self._inner.to_str())
        inner.add_tokens(list(tokens))
        return Tokenizer(inner)


def _read_model(folder: Path) -> tokenizers.Tokenizer:
    def there(name: str) -> bool:
        return (folder / name).is_file()

    if there(_TOKENIZER):
        source = _TOKENIZER
    elif there(_VOCAB) and there(_MERGES):
        source = f"{_VOCAB} with {_MERGES}"
    else:
        raise TokenizerError(_nothing_known(folder))
    try:
        if source == _TOKENIZER:
            return tokenizers.Tokenizer.from_file(str(folder / _TOKENIZER))
        return _qwen2(models.BPE.from_file(str(folder / _VOCAB), str(folder / _MERGES)))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for every fault of a file
        reason = " ".join(str(error).split())
        raise TokenizerError(
            f"{folder}: {source} cannot be read as a tokenizer ({reason}): copy it from the release again"
        ) from error


def _nothing_known(folder: Path) -> str:
    """The message for a folder without a tokenizer that can be read here."""
    expected = f"expected {_TOKENIZER}, or {_VOCAB} with {_MERGES}"
    if not folder.is_dir():
        return f"{folder} is not a folder: {expected} inside it"
    names = sorted(entry.name for entry in folder.iterdir())
    found = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    found = found or "nothing"
    return f"{folder} holds no tokenizer that can be read ({expected}; found {found}): copy it from the release"


def _qwen2(model: models.BPE) -> tokenizers.Tokenizer:
    """Builds the Qwen2 pipeline around a vocabulary that comes without tokenizer.json."""
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    return inner


def _add_configured_tokens(inner: tokenizers.Tokenizer, path: Path) -> None:
    """Adds the tokens that tokenizer_config.json lists under their ids, where they are not known yet."""
    if not path.is_file():
        return
    try:
        listed: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        entries = [(int(i), {**entry}) for i, entry in listed.items()]
        tokens = [
            (i, AddedToken(entry.pop("content"), **entry)) for i, entry in sorted(entries, key=lambda pair: pair[0])
        ]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise TokenizerError(
            f"{path}: cannot be read ({error!r}): expected JSON whose added_tokens_decoder maps ids to tokens; "
            "copy it from the release again"
        ) from error
    for i, token in tokens:
        if inner.token_to_id(token.content) is None or i >= inner.get_vocab_size(with_added_tokens=False):
            inner.add_tokens([token])
        if inner.token_to_id(token.content) != i:
            raise TokenizerError(
                f"{path}: token {token.content!r} should have id {i}, but the vocabulary gives it "
                f"{inner.token_to_id(token.content)}: the tokenizer files belong to different models"
            )
