"""The query positions whose attention is read: tokens of the generated answer, or a word of question or answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from analyses.attention.questions import GENERATED, PROMPT, Config, Question, check_images
from workbench.analysis.chunks import Chunk, Part
from workbench.analysis.declaration import Context
from workbench.errors import ConfigError, DataError, UnknownNameError
from workbench.mllm.base import MLLM
from workbench.mllm.family import Batch

NO_TOKEN, NO_WORD, PLACEHOLDER = "an empty answer", "no such word", "the image placeholder in the answer"


def with_positions(config: Config, context: Context, questions: list[Question]) -> tuple[list[Question], list[str]]:
    """Return the questions with the positions that the options ask for, and sentences about those without any.

    Raises:
        ConfigError: `positions` is empty.
        DataError, UnknownNameError: no question has such a position, or too few images are left.
    """
    if config.positions == PROMPT:
        return questions, []
    if not config.positions.strip():
        raise ConfigError(f"positions is '{config.positions}': expected {PROMPT}, {GENERATED} or a word")
    parts = context.map("positions", questions, partial(_chunk_positions, config, context.mllm))
    positions = [entry for part in parts for entry in part.record["positions"]]
    placed, without = [], {NO_TOKEN: [], NO_WORD: [], PLACEHOLDER: []}  # type: ignore[var-annotated]
    for question, (offsets, answer, words, reason) in zip(questions, positions, strict=True):
        if offsets:
            placed.append(replace(question, offsets=tuple(offsets), answer=tuple(answer), words=tuple(words)))
        else:
            without[reason].append(question.sample.id)
    if not placed and without[NO_WORD]:
        words_asked = {word for q in questions for word in re.findall(r"\w+", q.sample.question.lower())}
        raise UnknownNameError("position", config.positions, {PROMPT, GENERATED} | words_asked)
    left_out = [
        f"{len(ids)} of {len(questions)} questions, with {reason} ({config.positions}), first {ids[0]}"
        for reason, ids in without.items()
        if ids
    ]
    if not placed:
        raise DataError(f"no attention can be read at {config.positions}: {left_out[0]}; expected answers in words")
    if config.localise:
        check_images(placed, f"have a question with a position {config.positions}")
    return placed, left_out


def _chunk_positions(config: Config, mllm: MLLM, chunk: Chunk[Question]) -> Part:
    """Return (offsets, tokens of the answer, words, why there is none) of each question of a chunk."""
    positions: list[tuple[Any, ...]] = []
    for _, questions in chunk.batches():
        samples = [question.sample for question in questions]
        batch = mllm.encode([sample.image for sample in samples], [sample.question for sample in samples])
        asked = [()] * len(samples) if config.positions == GENERATED else _in_questions(mllm, batch, config.positions)
        answers = [()] * len(samples) if all(asked) else mllm.generate_ids(batch, max_new_tokens=config.max_new_tokens)
        for offsets, answer in zip(asked, answers, strict=True):
            if offsets:
                positions.append((offsets, (), _repeated(config.positions, len(offsets)), ""))
            elif mllm.config.image_token_id in answer:
                positions.append(((), (), (), PLACEHOLDER))
            elif config.positions == GENERATED:
                positions.append(_answer_tokens(mllm, answer))
            else:
                ends = word_ends(mllm.texts_of(answer), config.positions)
                positions.append((ends, answer, _repeated(config.positions, len(ends)), NO_WORD))
    return Part(record={"positions": positions})


def _repeated(word: str, times: int) -> list[str]:
    """Return a word as the text of its tokens, with a space before each but the first."""
    return [f" {word}" if number else word for number in range(times)]


def _answer_tokens(mllm: MLLM, answer: Sequence[int]) -> tuple[Any, ...]:
    """Return the positions of all tokens of an answer that are not special, as `_chunk_positions` does."""
    special, texts = set(mllm.processor.tokenizer.all_special_ids), ["", *mllm.texts_of(answer)]
    offsets = [number for number, token in enumerate(answer) if token not in special]
    return offsets, answer, [texts[number + 1][len(texts[number]) :] for number in offsets], NO_TOKEN


def word_ends(texts: Sequence[str], word: str) -> list[int]:
    """Return the number of the last token of each occurrence of a word (or words), whatever its case.

    Args:
        texts: the text up to and including each token.
        word: only whole words match: "red" is not in "reddish".
    """
    if not texts:
        return []
    ends = [match.end() for match in pattern(word).finditer(texts[-1])]
    return [next(number for number, text in enumerate(texts) if len(text) >= end) for end in ends]


def pattern(word: str) -> re.Pattern[str]:
    """Return the pattern of a whole word, or of several with any space between them."""
    words = r"\s+".join(map(re.escape, word.split()))
    return re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)


def _in_questions(mllm: MLLM, batch: Batch, word: str) -> list[list[int]]:
    """Return the offsets of a word in each question; the words of the chat template around it do not count."""
    offsets = []
    for row, question in enumerate(batch.prompts):
        ids = batch.inputs["input_ids"][row]
        first = int((ids == mllm.config.image_token_id).nonzero().max()) + 1
        last = int(batch.inputs["attention_mask"][row].nonzero().max())
        ends = word_ends(mllm.texts_of(ids[first : last + 1].tolist()), word)
        before, _, after = mllm.prompt(question).rpartition(mllm.image_placeholder)[2].partition(question)
        counts = [len(pattern(word).findall(text)) for text in (before, question, after)]
        in_question = ends[counts[0] : counts[0] + counts[1]] if len(ends) == sum(counts) else []
        offsets.append([first + end - last - 1 for end in in_question])
    return offsets
