"""Benchmarks at every checkpoint: one score of each, and their mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from analyses.dynamics.evaluation import TrainingPoint, row_of
from analyses.dynamics.options import BENCHMARK, MEAN_OF_BENCHMARKS, Config
from workbench.analysis.chunks import Chunk, Part, joined
from workbench.analysis.declaration import Context
from workbench.benchmarks.answering import Decoding, answer_chunk
from workbench.benchmarks.asking import Asking, ask
from workbench.benchmarks.headline import (
    Headline,
    headline,
    mean_of,
    number_of_images,
    resampled,
    units,
    weighted,
    weights_of,
)
from workbench.benchmarks.scorers import scorers_of
from workbench.benchmarks.tables import judged, scores
from workbench.data import Dataset, Sample
from workbench.data.benchmark_rows import BenchmarkDataset
from workbench.errors import ConfigError

DRAWS = 1000  # resamples of the images


@dataclass(frozen=True)
class Benchmark:
    """A data set that is asked at every checkpoint, and its questions in the words of a prompt."""

    data: Dataset
    asking: Asking

    @property
    def name(self) -> str:
        """The benchmark without the name of a subset, or the data set if it is none."""
        return self.asking.benchmark.split()[0] if self.asking.benchmark else self.data.name

    @property
    def labels(self) -> str:
        """The version of a benchmark's labels, "" for any other data set."""
        return self.data.version if isinstance(self.data, BenchmarkDataset) else ""

    @property
    def record(self) -> dict[str, Any]:
        """What the record of a run says about it."""
        labels = {"labels": self.labels} if self.labels else {}
        return {"data": self.data.name, "fingerprint": self.data.fingerprint, **self.asking.record, **labels}


def benchmarks_of(config: Config, context: Context) -> list[Benchmark]:
    """Return the benchmarks of a config, with their questions worded.

    Raises:
        ConfigError: one of them does not have the scorer.
    """
    benchmarks = []
    for data in config.benchmark_data.values():
        asking = ask(config, context.mllm, data, generated=config.decoding != "likelihood")
        first = next(iter(asking.originals.values()))
        known = ["sum", "mean"] if config.decoding == "likelihood" else list(scorers_of(asking.benchmark, first))
        if config.scorer not in known:
            raise ConfigError(
                f"scorer is {config.scorer}, which {data.name} with {config.decoding} answers does not have: expected"
                f" {' or '.join(known)}, which is the same for all benchmarks"
            )
        benchmarks.append(Benchmark(data, asking))
    return benchmarks


def ask_all(benchmarks: list[Benchmark], point: TrainingPoint) -> dict[str, pd.DataFrame]:
    """Ask the model of one checkpoint every question of every benchmark.

    Returns:
        Tables scores (rows as in `evaluation.measure`), benchmark_scores (every score by every scorer, as
        `analyses.benchmark` gives them), benchmark_answers (as the chosen scorer reads them), benchmark_units
        (`headline.units` with the number of the data set), and benchmark_weights (of each data set in each score).
    """
    config, context = point.evaluation.config, point.evaluation.context
    decoding = Decoding(config.decoding, config.max_new_tokens)
    all_scores, all_answers, all_units, headlines = [], [], [], []
    for number, benchmark in enumerate(benchmarks):
        with_data = dataclasses.replace(context, data=benchmark.data)
        parts = with_data.map(
            f"benchmark {number + 1} at step {point.step}",
            benchmark.asking.worded,
            partial(_answers, point, benchmark, decoding),
            depends=benchmark.asking.benchmark,
        )
        answers = joined(parts, "answers")
        table = scores(answers, seed=config.seed)
        of_all = judged(answers)
        of_scorer = of_all[of_all["scorer"] == config.scorer]
        headlines.append(
            headline(
                table[table["scorer"] == config.scorer],
                benchmark.asking.benchmark,
                benchmark.data.name,
                benchmark.labels,
            )
        )
        all_scores.append(table.assign(data=benchmark.data.name))
        all_answers.append(of_scorer.assign(data=benchmark.data.name))
        all_units.append(units(of_scorer).assign(data=number, step=point.step))
    values = pd.concat(all_units, ignore_index=True)
    drawn = resampled(values, [point.step], draws=DRAWS, seed=config.seed)[:, 0]
    rows, means = [], _means(benchmarks, headlines)
    for name, weights in means.items():
        spread = weighted(drawn, weights)
        single = (weights == 1).any()
        images = number_of_images(values[values["data"].isin(np.flatnonzero(weights))])
        mean = mean_of(headlines, weights, spread[np.isfinite(spread)], images)
        one = headlines[int(weights.argmax())] if single else mean
        rows.append(
            row_of(BENCHMARK, name, dataclasses.asdict(one) | {"seed": config.seed}, one.score, one.chance, one.chance)
        )
    return {
        "scores": pd.DataFrame(rows),
        "benchmark_scores": pd.concat(all_scores, ignore_index=True),
        "benchmark_answers": pd.concat(all_answers, ignore_index=True),
        "benchmark_units": values.drop(columns="step"),
        "benchmark_weights": pd.DataFrame(
            [
                {"of": name, "data": number, "weight": float(weight)}
                for name, weights in means.items()
                for number, weight in enumerate(weights)
            ]
        ),
    }


def _means(benchmarks: Sequence[Benchmark], headlines: Sequence[Headline]) -> dict[str, Float[np.ndarray, " data"]]:
    """Return {name of a score: weights of the data sets}, that of the mean of all benchmarks last."""
    weights = weights_of([benchmark.name for benchmark in benchmarks])
    mean = weights.pop("")
    named = {
        headlines[int(of.argmax())].name if (of == 1).any() else f"{name}, mean of subsets": of
        for name, of in weights.items()
    }
    return named | ({MEAN_OF_BENCHMARKS: mean} if len(named) > 1 else {})


def _answers(point: TrainingPoint, benchmark: Benchmark, decoding: Decoding, chunk: Chunk[list[Sample]]) -> Part:
    return answer_chunk(point.mllm, benchmark.asking, chunk, decoding)
