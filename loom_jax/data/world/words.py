"""The closed vocabulary of the tutorial world, and a tokenizer with one token for each of its words."""

from __future__ import annotations

import functools
import string

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from loom_jax.data.world.language import phrases
from loom_jax.document import LOOM_TOKENS, PLANNED, Tokenizer, format_plan, plan_prompt

_SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s"
"""Cuts a text into words and marks, each with the space before it; digits and other spaces stand alone."""


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Returns every word, digit and mark that a text of this world consists of, sorted; some begin with a space."""
    prompts = [plan_prompt(task, "{}", count) for task in PLANNED for count in (None, 1, 2)]
    texts = [*prompts, format_plan(["{}", "{}"]), *phrases()]
    found = {*string.digits, " ", " ,", *(f" {word}" for word in phrases() if " " not in word)}
    for text in texts:
        for token in LOOM_TOKENS:
            text = text.replace(token, "{}")
        for piece in text.split("{}"):
            pieces = [word for word, _ in _splitter().pre_tokenize_str(piece)]
            # What follows a slot may follow a space in one text and none in another.
            found |= {*pieces, *(f" {word}" for word in pieces[:1] if word.isalpha())}
    return tuple(sorted(found))


def build_tokenizer() -> Tokenizer:
    """Returns a tokenizer with a token for every word of the world, then one for each byte, then Loom's tokens.

    It is a byte-level BPE without merges, which takes known words whole; other words are spelled in bytes, so every
    text comes back as it was. The same on every machine.
    """
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [to_letters.pre_tokenize_str(word)[0][0] for word in vocabulary()]
    entries = list(dict.fromkeys([*words, *sorted(pre_tokenizers.ByteLevel.alphabet())]))
    inner = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(entries)}, [], ignore_merges=True))
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence([_splitter(), to_letters])
    inner.decoder = decoders.ByteLevel()
    return Tokenizer(inner).with_tokens(LOOM_TOKENS)


def _splitter() -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
