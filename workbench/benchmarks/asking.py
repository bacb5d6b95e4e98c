"""Put the questions of a benchmark to a model, with the same prompts and answers wherever a benchmark is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from PIL import Image

from workbench.analysis.chunks import Chunk, Part
from workbench.benchmarks.prompts import Asked, prompt_of
from workbench.benchmarks.tables import answer_row
from workbench.data import Dataset
from workbench.data.base import Sample
from workbench.data.benchmark_rows import BenchmarkDataset
from workbench.errors import DataError
from workbench.mllm import MLLM


@dataclass(frozen=True)
class BenchmarkQuestions:
    """The questions of a data set, as they are put to a model.

    Attributes:
        benchmark: name of the benchmark, "" if the data set is none.
        style: the prompt; see `workbench.benchmarks.prompts`.
        samples: the questions that have options.
        prompts: the text of each question, by id.
    """

    benchmark: str
    style: str
    samples: Sequence[Sample]
    prompts: Mapping[str, str]

    @classmethod
    def of(cls, data: Dataset, style: str = "auto") -> BenchmarkQuestions:
        """Return the questions of a data set; `auto` is llava for a benchmark and plain for any other data set.

        Raises:
            DataError: no question has options.
            ConfigError: the benchmark has no such prompt.
        """
        benchmark, texts = (data.benchmark, data.prompts) if isinstance(data, BenchmarkDataset) else ("", {})
        samples = [sample for sample in data if sample.options]
        if not samples:
            raise DataError(
                f"data set '{data.name}' has no questions with options: expected a benchmark, such as pope:PATH"
            )
        if style == "auto":
            style = "llava" if benchmark else "plain"
        prompts = {s.id: prompt_of(style, Asked(benchmark, s, texts.get(s.id, ""))) for s in samples}
        return cls(benchmark, style, samples, prompts)


def answer_chunk(
    mllm: MLLM,
    questions: BenchmarkQuestions,
    chunk: Chunk[Sample],
    *,
    max_new_tokens: int,
    shown: str = "image",
    blank: Image.Image | None = None,
) -> Part:
    """Return the generated answers to a chunk of the questions, as the table `answers`.

    Args:
        mllm: the model.
        questions: all questions, for their prompts.
        chunk: some of their samples.
        max_new_tokens: tokens at which an answer is cut.
        shown: what is stored of what the model saw.
        blank: the image that is shown instead of each question's own, resized to the same size.
    """
    rows = []
    for _, batch in chunk.batches():
        images = [s.image if blank is None else blank.resize(s.image.size, Image.Resampling.BICUBIC) for s in batch]
        encoded = mllm.encode(images, [questions.prompts[sample.id] for sample in batch])
        answers = mllm.generate(encoded, max_new_tokens=max_new_tokens)
        rows += [
            answer_row(questions.benchmark, sample, shown, answer)
            for sample, answer in zip(batch, answers, strict=True)
        ]
    return Part({"answers": pd.DataFrame(rows)})
