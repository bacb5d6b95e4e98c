"""Answers to the questions of a benchmark, scored in every way that is known for it.

    python -m analyses.benchmark --model runs/baseline runs/viral --data pope:FOLDER --prompt llava --output_dir runs

Each question is put to the model with a prompt, and the answer that it generates (greedy) is stored as it is. Every
scorer of the benchmark is computed from the same answers: `own`, `official` (its authors'), `lmms` (lmms-eval),
`adaptvis`, and `paper` (the VIRAL authors' scripts). Answers that a scorer cannot read are wrong, and counted.

Beside each score are its chance level, the accuracy of giving each category's most frequent right answer (`majority`),
and a blind run: the same questions about the mean of all images (`mean image`). A score that is not above all three
says nothing about seeing. Intervals are over images, or over pairs where a pair counts as one; the difference to the
first model is paired by question, and `smallest` is the smallest difference that so many questions would show in four
of five experiments.

What the number is not: comparable between prompts, scorers or label versions. All three are part of the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from annotated_types import Ge
from PIL import Image

from workbench import figures as fig
from workbench.analysis.chunks import joined
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, DataOptions, Result
from workbench.benchmarks.asking import BenchmarkQuestions, answer_chunk
from workbench.benchmarks.comparison import compared, whole
from workbench.benchmarks.tables import ALL, scores
from workbench.data.base import Sample
from workbench.data.benchmark_rows import BenchmarkDataset
from workbench.runs import Run
from workbench.training_folder import MEAN

SIDE = 336  # pixels of the mean image
SHOWN = ("image", "mean image")


@dataclass(frozen=True)
class Config(DataOptions):
    """Which questions are asked, and how."""

    limit: Annotated[int, Ge(1)] = 100_000
    """Number of images; by default all."""
    prompt: Literal["auto", "plain", "llava", "lmms", "paper"] = "auto"
    """Text around a question: none (plain), or that of LLaVA-1.5, lmms-eval or the paper's scripts; auto is llava for a
    benchmark and plain for any other data set."""
    max_new_tokens: Annotated[int, Ge(1)] = 16
    """Tokens at which an answer is cut."""
    blind: bool = True
    """Ask every question about the mean of all images, too."""


def run(config: Config, context: Context) -> Result:
    """Ask every question with its image, and with the mean image."""
    data, questions = context.data, BenchmarkQuestions.of(context.data, config.prompt)
    tables = []
    for shown in SHOWN if config.blind else SHOWN[:1]:
        blank = None if shown == "image" else _mean_image(context, questions.samples)
        parts = context.map(
            f"answers, {shown}",
            questions.samples,
            partial(
                answer_chunk, context.mllm, questions, max_new_tokens=config.max_new_tokens, shown=shown, blank=blank
            ),
            depends=(list(questions.prompts.items()), data.fingerprint if blank is not None else ""),
        )
        tables.append(joined(parts, "answers"))
    answers = pd.concat(tables, ignore_index=True)
    record: dict[str, Any] = {"benchmark": questions.benchmark, "prompt": questions.style, "decoding": "greedy"}
    record |= {"labels": data.version, "about": data.about} if isinstance(data, BenchmarkDataset) else {}
    return Result({"scores": scores(answers, seed=config.seed), "answers": answers}, record=record)


def _mean_image(context: Context, samples: Sequence[Sample]) -> Image.Image:
    """Return the pixelwise mean of all images, each resized to a square."""
    total = np.zeros((SIDE, SIDE, 3))
    images = {sample.image_id: sample for sample in samples}
    for sample in context.progress(images.values(), "mean image", total=len(images)):
        total += np.asarray(sample.image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float64)
    return Image.fromarray((total / len(images)).round().astype(np.uint8))


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return all scores but those of single categories, and the differences in accuracy to the first model."""
    return whole(_compared(runs))


def _compared(runs: Mapping[str, Run]) -> pd.DataFrame:
    return compared(*({label: run.tables[name] for label, run in runs.items()} for name in ("scores", "answers")))


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw our accuracy by category beside its chance level, seen and blind, and the accuracy by scorer."""
    table = _compared(runs).rename(columns={"score": "accuracy"})
    accuracy = table[table["measure"] == "accuracy"]
    ours = accuracy[(accuracy["scorer"] == "own") & (accuracy["category"] != MEAN)]
    drawn = {}
    for shown in accuracy["shown"].unique():
        here = ours[ours["shown"] == shown]
        by_model = {str(model): part for model, part in here.groupby("model", sort=False)}
        drawn[f"Accuracy by category ({shown})"] = fig.accuracy_by_type(by_model)
    seen = accuracy[(accuracy["shown"] == "image") & (accuracy["category"] == ALL)]
    if seen["scorer"].nunique() > 1:
        by_model = {str(m): part.assign(category=part["scorer"]) for m, part in seen.groupby("model", sort=False)}
        drawn["Accuracy of all questions by scorer"] = fig.accuracy_by_type(by_model)
    return drawn


ANALYSIS = Analysis(
    "benchmark",
    "Benchmark scores, by every scorer",
    Config,
    run,
    figures,
    summary,
    benchmarks=True,
)

if __name__ == "__main__":
    main(ANALYSIS)
