"""Answers of a model to the questions of a benchmark, the same ones wherever a benchmark is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pandas as pd
from PIL import Image

from workbench.analysis.chunks import Chunk, Part
from workbench.benchmarks.asking import Asking
from workbench.benchmarks.tables import answer_row
from workbench.data.base import Sample
from workbench.mllm import MLLM
from workbench.scoring.quiz import Quiz
from workbench.scoring.sampling import Sampler

Shown = Literal["image", "mean image", "no image"]
"""What the model sees with a question."""


@dataclass(frozen=True)
class Decoding:
    """How an answer comes about.

    Attributes:
        name: `greedy` takes the likeliest token each time, `sample` draws tokens, `likelihood` takes the likeliest
            option.
        max_new_tokens: tokens at which a generated answer is cut.
        temperature: of `sample`.
        draws: how many answers `sample` draws to each question.
        seed: of the draws.
    """

    name: Literal["greedy", "sample", "likelihood"] = "greedy"
    max_new_tokens: int = 16
    temperature: float = 0.2
    draws: int = 10
    seed: int = 0


def answer_chunk(
    mllm: MLLM,
    asking: Asking,
    chunk: Chunk[list[Sample]],
    decoding: Decoding,
    *,
    shown: Shown = "image",
    blank: Image.Image | None = None,
) -> Part:
    """Return the answers to the questions of some images as the table `answers`, one row for each (`answer_row`).

    Args:
        mllm: the model.
        asking: all questions.
        chunk: some of `asking.worded`.
        decoding: how an answer comes about.
        shown: what the model sees.
        blank: for "mean image", the image that is shown instead of each question's own, resized to the same size.
    """
    rows: list[dict[str, Any]] = []
    for _, scenes in chunk.batches():
        if blank is not None:
            scenes = [[_with_image(sample, blank) for sample in scene] for scene in scenes]
        quiz = Quiz(mllm, scenes, chunk.batch_size, images=shown != "no image")
        for sample, answer in _answers(quiz, asking, decoding):
            original = asking.originals[sample.id]
            rows.append(answer_row(asking.benchmark, original, shown, prompt=asking.style, **answer))
    return Part({"answers": pd.DataFrame(rows)})


def _answers(quiz: Quiz, asking: Asking, decoding: Decoding) -> Iterator[tuple[Sample, dict[str, Any]]]:
    """Yield each question with what is stored of its answer, draw by draw."""
    if decoding.name == "likelihood":
        for sample, sums, lengths in zip(quiz.samples, quiz.likelihoods(), quiz.options.lengths, strict=True):
            options = asking.originals[sample.id].options
            logprobs, tokens = sums[: len(options)].tolist(), lengths[: len(options)].tolist()
            answer = options[int(sums.argmax())]
            yield sample, {"answer": answer, "logprobs": json.dumps(logprobs), "tokens": json.dumps(tokens)}
        return
    for draw in range(decoding.draws if decoding.name == "sample" else 1):
        sampler = None if decoding.name == "greedy" else partial(_sampler, decoding, draw)
        for sample, answer in zip(
            quiz.samples, quiz.answers(max_new_tokens=decoding.max_new_tokens, sampler=sampler), strict=True
        ):
            yield sample, {"answer": answer, "draw": draw}


def _sampler(decoding: Decoding, draw: int, samples: Sequence[Sample]) -> Sampler:
    return Sampler(decoding.temperature, samples, seed=decoding.seed, draw=draw)


def _with_image(sample: Sample, image: Image.Image) -> Sample:
    return replace(sample, load=lambda: image.resize(sample.image.size, Image.Resampling.BICUBIC))
