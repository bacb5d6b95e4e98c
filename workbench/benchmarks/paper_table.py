"""Table 1 of the VIRAL paper from stored runs of `analyses.benchmark`: one row for each model, one score a benchmark.

    python -m workbench.benchmarks runs/benchmark-* --paper_table --scorer paper

Conventions of the paper: CV-Bench 2D is the accuracy over all rows of Count and Relation, MMVP the accuracy of pairs,
What's Up the mean of its COCO sets with one and two objects, POPE the mean accuracy of random and popular, MMStar the
accuracy, MME perception plus cognition, the sum of the scores of as many categories as were asked. All but MME are in
%. Below each score stand its interval, its chance level, the prompt and decoding that it was asked with, its scorer and
the number of answers that this could not read, and how many questions (MMVP: pairs) about how many images there were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from workbench.benchmarks.comparison import questions_asked
from workbench.benchmarks.headline import HEADLINES
from workbench.benchmarks.means import by_question, means
from workbench.benchmarks.tables import ALL, judged
from workbench.data.base import content_hash
from workbench.data.pope import is_repope
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
ORDER = list(TITLES.values())
COLUMNS = (
    "model",
    "benchmark",
    "score",
    "low",
    "high",
    "chance",
    "asked_with",
    "labels",
    "data",
    "scorer",
    "unparsed",
    "questions",
    "n",
    "n_images",
)
WHATS_UP = ("whatsup coco_one", "whatsup coco_two")


def paper_table(runs: Sequence[Run], scorer: str) -> pd.DataFrame:
    """Return the scores of all models, one row for each model and benchmark.

    Args:
        runs: runs of `analyses.benchmark`.
        scorer: one of the scorers of the runs; "" is `own`, and `sum` for a run by likelihood.

    Returns:
        Columns model, benchmark, score, low, high, chance, asked_with (prompt and decoding), labels (their version),
        data (the benchmarks of the runs, a list), scorer, unparsed (answers that it could not read), questions (a hash
        of those that the score is of), n, n_images; all scores but MME's are in %.

    Raises:
        ConfigError: two runs of one model on one benchmark.
        UnknownNameError: a scorer that no run has.
    """
    by_model: dict[str, dict[str, Run]] = {}
    for run in runs:
        benchmark, there = str(run.extra["benchmark"]), by_model.setdefault(run.label, {})
        if benchmark in there:
            ours, theirs = run.record["config"], there[benchmark].record["config"]
            changed = ", ".join(key for key in ours if ours[key] != theirs.get(key)) or "the model"
            raise ConfigError(
                f"{run.label} has two runs of {benchmark}, which differ in {changed}: expected one of each benchmark"
            )
        there[benchmark] = run
    known = sorted({name for run in runs for name in run.tables["scores"]["scorer"]})
    if scorer and scorer not in known:
        raise UnknownNameError("scorer", scorer, known)
    rows = [{"model": model} | row for model, of_model in by_model.items() for row in _rows(of_model, scorer)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _rows(by_benchmark: Mapping[str, Run], scorer: str) -> Iterator[dict[str, Any]]:
    """Yield the score of each benchmark that was run, as the paper reports it."""
    for name, title in TITLES.items():
        if name == "whatsup":
            if all(subset in by_benchmark for subset in WHATS_UP):
                both = [by_benchmark[subset] for subset in WHATS_UP]
                if all(_has(run, scorer) for run in both):
                    parts = [_judged(run, scorer) for run in both]
                    yield _row(title, _whats_up(parts), both, parts)
            continue
        if name not in by_benchmark:
            continue
        table, (measure, category) = by_benchmark[name].tables["scores"], HEADLINES.get(name, ("accuracy", ALL))
        chosen = table[
            (table["shown"] == "image")
            & (table["scorer"] == _scorer(by_benchmark[name], scorer))
            & (table["measure"] == measure)
            & (table["category"] == category)
        ]
        if len(chosen):
            run = by_benchmark[name]
            rows = means(_judged(run, scorer))[measure, category].rows
            yield _row(_title(run, scorer), chosen.iloc[0], [run], [rows])


def _scorer(run: Run, scorer: str) -> str:
    """Return the scorer, or ours if none is named."""
    return scorer or ("own" if _has(run, "own") else "sum")


def _judged(run: Run, scorer: str) -> pd.DataFrame:
    """Return the answers of a model that saw the images, judged by the scorer."""
    rows = judged(run.tables["answers"].query("shown == 'image'"))
    return rows[rows["scorer"] == _scorer(run, scorer)]


def _has(run: Run, scorer: str) -> bool:
    return not scorer or scorer in set(run.tables["scores"]["scorer"])


def _title(run: Run, scorer: str) -> str:
    """Return the title of a benchmark's column, with what makes its scores another one's: labels, or categories."""
    benchmark = str(run.extra["benchmark"])
    if benchmark != "mme":
        return "RePOPE" if is_repope(str(run.extra["labels"])) else TITLES[benchmark]
    table = run.tables["scores"]
    chosen = (table["shown"] == "image") & (table["scorer"] == _scorer(run, scorer)) & (table["measure"] == "MME score")
    return f"MME, sum of {int(chosen.sum())}"


def _row(
    title: str, score: Mapping[str, Any], of_runs: Sequence[Run], of_rows: Sequence[pd.DataFrame]
) -> dict[str, Any]:
    """Return a row of the table; `of_rows` are the judged answers of each run that the score is of."""
    scale = 1 if title.startswith("MME") else 100
    scaled = {name: scale * float(score[name]) for name in ("score", "low", "high", "chance")}
    asked = {f"{run.extra['prompt']}, {run.extra['decoding']}" for run in of_runs}
    labels = {str(run.extra["labels"]) for run in of_runs}
    named: dict[str, Any] = {"asked_with": " and ".join(sorted(asked)), "labels": " and ".join(sorted(labels))}
    named["data"] = [str(run.extra["benchmark"]) for run in of_runs]
    named["scorer"] = " and ".join(sorted({name for rows in of_rows for name in rows["scorer"]}))
    named["questions"] = content_hash(*(sorted(questions_asked(rows)) for rows in of_rows))
    return {"benchmark": title} | scaled | named | {name: int(score[name]) for name in ("unparsed", "n", "n_images")}


def _whats_up(parts: Sequence[pd.DataFrame]) -> dict[str, Any]:
    """Return the mean of the accuracies of the two sets, with an interval over the images of both."""
    rows = pd.concat(map(by_question, parts), ignore_index=True)
    interval = mean_interval(
        rows["correct"].astype(float),
        kind="proportion",
        groups=rows["image_id"].tolist(),
        strata=rows["benchmark"].tolist(),
    )
    chance = rows.groupby("benchmark")["chance"].mean().mean()
    score = {"score": interval.estimate, "low": interval.low, "high": interval.high, "chance": chance}
    unparsed = sum(part["parsed"].isna().sum() for part in parts)
    return score | {"unparsed": unparsed, "n": len(rows), "n_images": interval.n}


def text_of(table: pd.DataFrame, runs: Sequence[Run] = ()) -> str:
    """Return the table as the paper prints it: a model's scores in a row, with intervals and chance levels below.

    Under the table stand the versions of the labels, benchmarks that models were asked in different ways or of which
    they were asked different questions, those that no model was asked, and the runs that have no place in the table.

    Args:
        table: as `paper_table` returns it.
        runs: those that it was made of.
    """
    known = list(table["benchmark"].drop_duplicates())
    columns = sorted(known, key=lambda title: ORDER.index(_of_paper(title)))
    lines = []
    for model, rows in table.groupby("model", sort=False):
        of = rows.set_index("benchmark")
        cells = {title: of.loc[title] for title in columns if title in of.index}
        lines.append({"": str(model)} | {title: f"{cell['score']:.2f}" for title, cell in cells.items()})
        lines.append({"": ""} | {t: f"[{cell['low']:.2f}, {cell['high']:.2f}]" for t, cell in cells.items()})
        lines.append({"": "chance"} | {title: f"{cell['chance']:.2f}" for title, cell in cells.items()})
        lines.append({"": "asked with"} | {title: cell["asked_with"] for title, cell in cells.items()})
        lines.append({"": "read by"} | {t: f"{c['scorer']}, {c['unparsed']} unparsed" for t, c in cells.items()})
        lines.append({"": "n (images)"} | {t: f"{cell['n']} ({cell['n_images']})" for t, cell in cells.items()})
    notes = [f"{title}: {', '.join(of['labels'].unique())}" for title, of in table.groupby("benchmark", sort=False)]
    notes += [
        f"{title}: not comparable between models, which were asked with {' / '.join(of['asked_with'].unique())}"
        for title, of in table.groupby("benchmark", sort=False)
        if of["asked_with"].nunique() > 1
    ]
    notes += [
        f"{title}: not comparable between models, which were asked different questions"
        for title, of in table.groupby("benchmark", sort=False)
        if of["questions"].nunique() > 1
    ]
    if missing := [title for title in ORDER if title not in map(_of_paper, columns)]:
        notes.append(f"no run of {', '.join(missing)} with this scorer")
    placed = {(model, name) for model, names in zip(table["model"], table["data"], strict=True) for name in names}
    others = [(run.label, str(run.extra["benchmark"])) for run in runs]
    notes += [
        f"not in the table: {name or 'a data set of questions'} of {model}, which the paper's table or the scorer lacks"
        for model, name in others
        if (model, name) not in placed
    ]
    text = pd.DataFrame(lines, columns=["", *columns]).fillna("-").to_string(index=False) if lines else ""
    return "\n".join([*([text] if text else []), *notes])


def _of_paper(title: str) -> str:
    """Return the paper's title of a benchmark that a column is of."""
    return next(name for name in ORDER if name in title)
