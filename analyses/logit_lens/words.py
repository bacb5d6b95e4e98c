"""Options of the logit lens, and the words that it scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from workbench.analysis.declaration import Context, DataOptions
from workbench.data.base import Sample, class_and_color
from workbench.errors import ConfigError, DataError
from workbench.lens import first_tokens
from workbench.mllm.base import MLLM

WORD_KINDS = ("class", "colour")


@dataclass(frozen=True)
class Config(DataOptions):
    """Options of the logit lens."""

    layers: tuple[int, ...] = ()
    """Layers of the model, 0 to L; all by default."""
    scores: bool = True
    """Score the words against the objects under the tokens; --no-scores takes any data and only draws maps."""
    cover: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of a token's patch that an object must cover."""
    tokens_per_image: Annotated[int, Ge(1)] = 32
    """Maximum number of tokens on objects scored per image, and as many on the background."""
    null: Annotated[int, Ge(10)] = 100
    """Random reassignments of words to images for the null."""
    maps: Annotated[int, Ge(0)] = 3
    """Images for which the words of every patch are stored and drawn."""
    top: Annotated[int, Ge(1)] = 5
    """Most likely words stored for each patch of a map."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scores and not self.maps:
            raise ConfigError("maps is 0 without scores, so nothing is measured: expected at least 1, or --scores")


@dataclass
class Words:
    """The words that are scored.

    Attributes:
        names: all words; a word's position is its column in arrays with a dimension "word".
        tokens: token id of each word.
        kinds: {"class" or "colour": columns of the words of this kind}.
        record: what the run's record says about the words.
    """

    names: list[str]
    tokens: list[int]
    kinds: dict[str, list[int]]
    record: dict[str, Any]

    def of(self, name: str) -> dict[str, int]:
        """Return the columns of the words in an object's name by kind; kinds without a scored word are absent."""
        return {
            kind: self.names.index(word)
            for kind, word in zip(WORD_KINDS, class_and_color(name), strict=True)
            if kind in self.kinds and word in self.names and self.names.index(word) in self.kinds[kind]
        }


def words_of(config: Config, context: Context, images: Sequence[Sample]) -> Words:
    """Return the class and color words of all objects of the data set, each with the token that represents it."""
    if not config.scores:
        return Words([], [], {}, {})
    if not any(sample.objects for sample in images):
        raise DataError(
            f"data set '{context.data.name}' has no objects: expected one with objects, such as shapes:val, or"
            " --no-scores for maps alone"
        )
    names = dict.fromkeys(item.name for sample in images for item in sample.objects)
    split_names = [class_and_color(name) for name in names]
    by_kind = {kind: sorted({split[n] for split in split_names} - {""}) for n, kind in enumerate(WORD_KINDS)}
    tokens, left_out = first_tokens(context.mllm, [word for kind_words in by_kind.values() for word in kind_words])
    kinds = {
        kind: [list(tokens).index(word) for word in kind_words if word in tokens]
        for kind, kind_words in by_kind.items()
    }
    kinds = {kind: columns for kind, columns in kinds.items() if len(columns) > 1}
    if not kinds:
        raise DataError(
            f"the objects of '{context.data.name}' have {len(tokens)} words with a token of their own: expected at"
            " least 2 classes or 2 colors to compare"
        )
    tokenizer = context.mllm.processor.tokenizer
    shown = {word: tokenizer.convert_ids_to_tokens(token) for word, token in tokens.items()}
    return Words(list(tokens), list(tokens.values()), kinds, {"words": shown, "words_left_out": left_out})


def first_tokens_of(mllm: MLLM, name: str) -> list[int]:
    """Return the token ids that represent the words of an object's name; none if no word has one."""
    try:
        return list(first_tokens(mllm, [word for word in class_and_color(name) if word])[0].values()) if name else []
    except DataError:
        return []
