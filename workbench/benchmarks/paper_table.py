"""Table 1 of the VIRAL paper from stored runs of `analyses.benchmark`: one row for each model, one score a benchmark.

    python -m workbench.benchmarks runs/benchmark-* --paper_table --scorer paper

Conventions of the paper: CV-Bench 2D is the accuracy over all rows of Count and Relation, MMVP the accuracy of pairs,
What's Up the mean of its COCO sets with one and two objects, POPE the mean accuracy of random and popular, MMStar the
accuracy, MME perception plus cognition. All but MME are in %. Below each score stand its interval and its chance level.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from workbench.benchmarks.headline import HEADLINES
from workbench.benchmarks.tables import ALL, judged
from workbench.errors import ConfigError, UnknownNameError
from workbench.intervals import mean_interval
from workbench.runs import Run

TITLES = {
    "cv_bench": "CV-Bench2D",
    "mmvp": "MMVP",
    "whatsup": "What's Up",
    "pope": "POPE",
    "mmstar": "MMStar",
    "mme": "MME",
}
WHATS_UP = ("whatsup coco_one", "whatsup coco_two")


def paper_table(found: Sequence[Run], scorer: str) -> pd.DataFrame:
    """Return the scores of all models, one row for each model and benchmark.

    Args:
        found: runs of `analyses.benchmark`.
        scorer: one of the scorers of the runs.

    Returns:
        Columns model, benchmark, score, low, high, chance, n, n_images; all scores but MME's are in %.

    Raises:
        ConfigError: two runs of one model on one benchmark.
        UnknownNameError: a scorer that no run has.
    """
    by_model: dict[str, dict[str, Run]] = {}
    for run in found:
        benchmark, there = str(run.extra["benchmark"]), by_model.setdefault(run.label, {})
        if benchmark in there:
            ours, theirs = run.record["config"], there[benchmark].record["config"]
            changed = ", ".join(key for key in ours if ours[key] != theirs.get(key)) or "the model"
            raise ConfigError(
                f"{run.label} has two runs of {benchmark}, which differ in {changed}: expected one of each benchmark"
            )
        there[benchmark] = run
    known = sorted({name for run in found for name in run.tables["scores"]["scorer"]})
    if scorer not in known:
        raise UnknownNameError("scorer", scorer, known)
    rows = [{"model": model} | row for model, of_model in by_model.items() for row in _rows(of_model, scorer)]
    return pd.DataFrame(rows, columns=["model", "benchmark", "score", "low", "high", "chance", "n", "n_images"])


def _rows(by_benchmark: Mapping[str, Run], scorer: str) -> Iterator[dict[str, Any]]:
    """Yield the score of each benchmark that was run, as the paper reports it."""
    for name, title in TITLES.items():
        if name == "whatsup":
            if all(subset in by_benchmark for subset in WHATS_UP):
                yield _row(title, _whats_up([by_benchmark[subset] for subset in WHATS_UP], scorer))
            continue
        if name not in by_benchmark:
            continue
        table, (measure, category) = by_benchmark[name].tables["scores"], HEADLINES.get(name, ("accuracy", ALL))
        chosen = table[
            (table["shown"] == "image")
            & (table["scorer"] == scorer)
            & (table["measure"] == measure)
            & (table["category"] == category)
        ]
        if len(chosen):
            yield _row(title, chosen.iloc[0])


def _row(title: str, score: Mapping[str, Any]) -> dict[str, Any]:
    scale = 1 if title == "MME" else 100
    scaled = {name: scale * float(score[name]) for name in ("score", "low", "high", "chance")}
    return {"benchmark": title} | scaled | {name: int(score[name]) for name in ("n", "n_images")}


def _whats_up(found: Sequence[Run], scorer: str) -> dict[str, Any]:
    """Return the mean of the accuracies of the two sets, with an interval over the images of both."""
    answers = pd.concat([run.tables["answers"] for run in found], ignore_index=True)
    rows = judged(answers[answers["shown"] == "image"])
    rows = rows[rows["scorer"] == scorer]
    interval = mean_interval(
        rows["correct"].astype(float),
        kind="proportion",
        groups=rows["image_id"].tolist(),
        strata=rows["benchmark"].tolist(),
    )
    chance = rows.groupby("benchmark")["chance"].mean().mean()
    score = {"score": interval.estimate, "low": interval.low, "high": interval.high, "chance": chance}
    return score | {"n": len(rows), "n_images": interval.n}


def text_of(table: pd.DataFrame) -> str:
    """Return the table as the paper prints it: a model's scores in a row, with intervals and chance levels below.

    Benchmarks that no model was asked are named under the table.
    """
    columns = [title for title in TITLES.values() if title in set(table["benchmark"])]
    lines = []
    for model, rows in table.groupby("model", sort=False):
        of = rows.set_index("benchmark")
        cells = {title: of.loc[title] for title in columns if title in of.index}
        lines.append({"": str(model)} | {title: f"{cell['score']:.2f}" for title, cell in cells.items()})
        lines.append({"": ""} | {t: f"[{cell['low']:.2f}, {cell['high']:.2f}]" for t, cell in cells.items()})
        lines.append({"": "chance"} | {title: f"{cell['chance']:.2f}" for title, cell in cells.items()})
    missing = [title for title in TITLES.values() if title not in columns]
    note = f"\nno run of {', '.join(missing)} with this scorer" if missing else ""
    return pd.DataFrame(lines, columns=["", *columns]).fillna("-").to_string(index=False) + note
