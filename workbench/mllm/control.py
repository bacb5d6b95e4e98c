"""Control tokens such as `</s>` in texts of the data, and how to turn them into ordinary words.

A model that read them as control tokens would stop in the middle of an answer, or begin another turn.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

# HTML tags and image locations: some tokenizers have them as added tokens, but they control nothing
TAG = re.compile(r"</?[a-z][a-z0-9]*>")


def control_tokens(processor: Any, placeholders: Collection[str] = ()) -> tuple[str, ...]:
    """Return the added tokens of a tokenizer that are more than a piece of text, the longest first.

    These are special tokens, tokens of the processor or its chat template, and others that look like marks. Words,
    spaces, HTML tags and image locations such as `<loc0123>` that were added to the vocabulary are not among them.

    Args:
        placeholders: image placeholders, to leave out; a text that contains one is always refused.
    """
    tokenizer, template = processor.tokenizer, str(processor.chat_template or processor.tokenizer.chat_template or "")
    tokens = {
        *tokenizer.all_special_tokens,
        *(str(value) for name, value in vars(processor).items() if name.endswith("_token") and value),
    }
    for token in tokenizer.added_tokens_decoder.values():
        text = token.content.strip()
        is_word = re.fullmatch(r"[\w\s\u2581\u0120]*", token.content) or TAG.fullmatch(token.content)
        in_template = text and not text.isalnum() and token.content in template
        if token.special or not is_word or in_template:
            tokens.add(token.content)
    control = (token for token in tokens if len(token.strip()) > 1 and token not in placeholders)
    return tuple(sorted(control, key=lambda token: (-len(token), token)))


def as_words(text: str, tokens: Collection[str]) -> str:
    """Return `text` with a space after the first character of each control token, as in `< /s>`: then it is words."""
    while spelled := spelled_in(text, tokens):
        for token in spelled:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def spelled_in(text: str, tokens: Collection[str]) -> list[str]:
    """Return those of `tokens` that occur in `text`."""
    return [token for token in tokens if token in text]
