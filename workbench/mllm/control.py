"""Control tokens that a text of the data spells: words there, since a model that obeyed them would stop in the middle
of an answer, or begin another turn."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

# of HTML, or a place in an image: added tokens of some tokenizers that control nothing
TAG = re.compile(r"</?[a-z][a-z0-9]*>")


def control_tokens(processor: Any, places: Collection[str] = ()) -> tuple[str, ...]:
    """Every added token of a tokenizer that is more than a piece of text, the longest first.

    Special ones, those of the processor or its chat template, and others that look like marks; not words, spaces, tags
    of HTML or places such as `<loc0123>` that were added to the vocabulary.

    Args:
        places: image placeholders, which a text is refused for.
    """
    tokenizer, template = processor.tokenizer, str(processor.chat_template or processor.tokenizer.chat_template or "")
    found = {
        *tokenizer.all_special_tokens,
        *(str(value) for name, value in vars(processor).items() if name.endswith("_token") and value),
    }
    for token in tokenizer.added_tokens_decoder.values():
        word = re.fullmatch(r"[\w\s\u2581\u0120]*", token.content) or TAG.fullmatch(token.content)
        if (
            token.special
            or not word
            or (token.content.strip() and not token.content.strip().isalnum() and token.content in template)
        ):
            found.add(token.content)
    return tuple(
        sorted(
            (token for token in found if len(token.strip()) > 1 and token not in places),
            key=lambda token: (-len(token), token),
        )
    )


def as_words(text: str, tokens: Collection[str]) -> str:
    """A text in which no control token is one: a space behind its first character makes words of it, as in `< /s>`."""
    while spelled := spelled_in(text, tokens):
        for token in spelled:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def spelled_in(text: str, tokens: Collection[str]) -> list[str]:
    """The control tokens that a text spells."""
    return [token for token in tokens if token in text]
