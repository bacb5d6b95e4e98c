"""Ask a model the questions of a benchmark, and score its answers in every way that is known for it.

    python -m analyses.benchmark --model runs/baseline runs/viral --data pope:FOLDER --prompt llava --output_dir runs

Each question is put to the model with a prompt, and its answer is stored as it is:

    greedy      the model generates an answer, the likeliest token each time
    sample      it draws `draws` answers at `temperature`; scores are means over the draws (pairs within a draw)
    likelihood  its log-probability of each option, summed over all tokens of the option (`sum`) or averaged (`mean`).
                Options of one question with different lengths can differ between the two

Every scorer of the benchmark is computed from the same generated answers: `own`, `official` (its authors'), `lmms`
(lmms-eval), `adaptvis`, and `paper` (the VIRAL authors' scripts). Answers that a scorer cannot read are wrong, and
counted. Stored answers are scored again, without a model, by `python -m workbench.benchmarks RUN [RUN ...]`.

Beside each score are its chance level, the accuracy of giving each category's most frequent right answer (`majority`),
and blind runs: the same questions about the mean of all images (`mean image`), and without any (`no image`). A score
that is not above all of them says nothing about seeing. Intervals are over images, or over pairs where a pair counts as
one; the difference to the first model is paired by question (or pair), and `smallest` is the smallest difference that
as many questions would show in four of five experiments.

What the number is not: comparable between prompts, scorers, decodings or label versions. All four are part of the
result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from annotated_types import Ge, Gt
from PIL import Image

from workbench import figures as fig
from workbench.analysis.chunks import Part, joined
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, Result
from workbench.benchmarks.answering import Decoding, Shown, answer_chunk
from workbench.benchmarks.asking import Asking, PromptOptions, ask
from workbench.benchmarks.comparison import compared, whole
from workbench.benchmarks.exchange import with_prompt
from workbench.benchmarks.tables import ALL, scores
from workbench.data.benchmark_rows import BenchmarkDataset
from workbench.data.pope import is_repope
from workbench.errors import ConfigError, ModelError, UnknownNameError
from workbench.options import refuse_unused
from workbench.runs import Run
from workbench.training_folder import MEAN

# versions: 2 missing answers, majority answer of What's Up, intervals of MME, rotated options; 3 intervals of ratios;
# 4 answers with two letters ("Option A or B"), majority answer wherever categories are answers;
# 5 options of one letter; 6 letters that are part of a word (A.M.) or ruled out (A is wrong)
VERSION = 6
OURS = {"own": "", "sum": " by likelihood"}  # scorers of the figures by category, and what their titles say
ALL_SCORERS, BY_LIKELIHOOD = "all", ("sum", "mean")
SIDE = 336  # pixels of the mean image
BLIND: Mapping[str, tuple[Shown, ...]] = {
    "both": ("mean image", "no image"),
    "mean_image": ("mean image",),
    "no_image": ("no image",),
    "off": (),
}


@dataclass(frozen=True)
class Config(PromptOptions):
    """Which questions are asked, and how."""

    ADDED: ClassVar[tuple[str, ...]] = (*PromptOptions.ADDED, "scorer")

    limit: Annotated[int, Ge(1)] = 100_000
    """Number of images; by default all."""
    types: tuple[str, ...] = ()
    """Question types to ask; all by default."""
    decoding: Literal["greedy", "sample", "likelihood"] = "greedy"
    """How an answer comes about: the likeliest tokens, drawn tokens, or the likeliest of the options."""
    max_new_tokens: Annotated[int, Ge(1)] = 16
    """Tokens at which a generated answer is cut."""
    temperature: Annotated[float, Gt(0)] = 0.2
    """Temperature of drawn answers."""
    draws: Annotated[int, Ge(1)] = 10
    """Answers that are drawn to each question."""
    blind: Literal["both", "mean_image", "no_image", "off"] = "both"
    """Ask every question about the mean of all images, and without an image, too."""
    scorer: str = "all"
    """The scorers whose scores are stored and shown: all, or one of them."""
    circular: bool = False
    """Ask every question once for each rotation of its options, for the score `circular`: all answers must be right."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.circular and self.decoding == "sample":
            raise ConfigError("circular is set and decoding is sample: expected greedy or likelihood, one answer each")
        if self.decoding != "sample":
            because = f"decoding is {self.decoding}, which draws no answers"
            refuse_unused(self, "temperature", "draws", because=because, expected="decoding sample")


def run(config: Config, context: Context) -> Result:
    """Ask every question with its image, and blind."""
    data = context.data
    asking = ask(config, context.mllm, data, types=config.types, generated=config.decoding != "likelihood")
    check_scorer(config, asking)
    decoding = Decoding(config.decoding, config.max_new_tokens, config.temperature, config.draws, config.seed)
    tables, left_out = [], list(asking.left_out)
    views: tuple[Shown, ...] = ("image", *BLIND[config.blind])
    for shown in views:
        blank = _mean_image(context, asking) if shown == "mean image" else None
        try:
            tables += [
                joined(_answers(context, version, decoding, shown, blank, rotation), "answers").assign(
                    **{"draw": rotation} if config.circular else {}
                )
                for rotation, version in enumerate(asking.rotated() if config.circular else [asking])
            ]
        except ModelError as error:
            if shown != "no image":
                raise
            left_out.append(f"the run without an image is left out: {error}")
    answers = pd.concat(tables, ignore_index=True)
    record: dict[str, Any] = {**asking.record, "decoding": config.decoding}
    record |= {"labels": data.version, "about": data.about} if isinstance(data, BenchmarkDataset) else {}
    table = scores(answers, seed=config.seed)
    if config.scorer != ALL_SCORERS:
        table = table[table["scorer"] == config.scorer].reset_index(drop=True)
    return Result({"scores": table, "answers": answers}, {}, record, left_out)


def check_scorer(config: Config, asking: Asking) -> None:
    """Check that the answers to some questions have the scorer of the options, before any model answers.

    Raises:
        UnknownNameError: they have not.
    """
    if config.scorer == ALL_SCORERS or (config.decoding == "likelihood" and config.scorer in BY_LIKELIHOOD):
        return
    if config.decoding == "likelihood":
        raise UnknownNameError("scorer of answers by likelihood", config.scorer, [ALL_SCORERS, *BY_LIKELIHOOD])
    asking.check_scorer(config.scorer, besides=[ALL_SCORERS])


def _answers(
    context: Context, asking: Asking, decoding: Decoding, shown: Shown, blank: Image.Image | None, rotation: int
) -> list[Part]:
    """Ask all questions in one way.

    Args:
        rotation: number of the rotation of the options.
    """
    return context.map(
        f"answers, {shown}" + (f", rotation {rotation}" if rotation else ""),
        asking.worded,
        partial(answer_chunk, context.mllm, asking, decoding=decoding, shown=shown, blank=blank),
        depends=(asking.benchmark, rotation, context.data.fingerprint if blank is not None else ""),
    )


def _mean_image(context: Context, asking: Asking) -> Image.Image:
    """Return the pixelwise mean of all images, each resized to a square."""
    total = np.zeros((SIDE, SIDE, 3))
    for scene in context.progress(asking.scenes, "mean image", total=len(asking.scenes)):
        total += np.asarray(scene[0].image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float64)
    return Image.fromarray((total / len(asking.scenes)).round().astype(np.uint8))


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return all scores but those of single categories, and the differences in accuracy to the first model."""
    return whole(_compared(runs))


def _compared(runs: Mapping[str, Run]) -> pd.DataFrame:
    return compared(*({label: with_prompt(run, name) for label, run in runs.items()} for name in ("scores", "answers")))


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw our accuracy by category beside its chance level, seen and blind, and the accuracy by scorer.

    Models that were asked with different prompts are named with them, and titles say if the labels are RePOPE's.
    """
    table = _compared(runs).rename(columns={"score": "accuracy"})
    if table["prompt"].nunique() > 1:
        table["model"] += ", prompt " + table["prompt"]
    labels = {str(run.extra.get("labels", "")).split(",")[0] for run in runs.values()}
    of = f", {' and '.join(sorted(labels))}" if any(map(is_repope, labels)) else ""
    accuracy = table[table["measure"] == "accuracy"]
    drawn = {}
    for (shown, scorer), here in accuracy[accuracy["category"] != MEAN].groupby(["shown", "scorer"], sort=False):
        if scorer in OURS:
            by_model = {str(model): part for model, part in here.groupby("model", sort=False)}
            drawn[f"Accuracy by category{OURS[scorer]} ({shown}){of}"] = fig.accuracy_by_type(by_model)
    seen = accuracy[(accuracy["shown"] == "image") & (accuracy["category"] == ALL)]
    if seen["scorer"].nunique() > 1:
        by_model = {str(m): part.assign(category=part["scorer"]) for m, part in seen.groupby("model", sort=False)}
        drawn[f"Accuracy of all questions by scorer{of}"] = fig.accuracy_by_type(by_model)
    return drawn


ANALYSIS = Analysis(
    "benchmark",
    "Benchmark scores, by every scorer",
    Config,
    run,
    figures,
    summary,
    benchmarks=True,
    version=VERSION,
)

if __name__ == "__main__":
    main(ANALYSIS)
