"""Both groups' answers to the same questions: accuracy by type, where they disagree, and numbers of single images."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.errors import RunError
from workbench.intervals import Interval, mean_interval, mean_test, t_test
from workbench.overview.differences import Over, Pair, comparable, over_seeds
from workbench.overview.measures import Measure, by_image
from workbench.overview.models import Model
from workbench.overview.stored import Stored, StoredRun
from workbench.paired import holm
from workbench.training_folder import EVALUATION_FILE, MEAN, read_table

ASKED = ["id", "image_id", "category", "answer"]
OUTCOMES = ("only {second} right", "only {first} right", "both wrong", "both right")


@dataclass(frozen=True)
class Answered:
    """The answers of the models of a pair to the same questions.

    Attributes:
        pair: who is compared.
        table: one row per question: id, image_id, category, answer, chance, `question` where stored, and for each model
            `correct:KEY`, and where stored `given:KEY` and `p_right:KEY`.
        left_out: sentences about models whose answers cannot be compared.
    """

    pair: Pair
    table: pd.DataFrame
    left_out: tuple[str, ...] = ()

    def share_right(self, side: int) -> pd.Series:
        """Return for each question the share of a group's trainings (0 first, 1 second) that answer it right."""
        keys = [models[side].key for models in self.pair.shared]
        return self.table[[f"correct:{key}" for key in keys]].astype(float).mean(axis=1)

    @cached_property
    def by_type(self) -> pd.DataFrame:
        """Accuracy of both groups and second minus first, by question type and for their mean (`MEAN`).

        Columns category, first, second, chance, score, low, high, few, n (seeds or images), over, questions.
        """
        parts = [*self.table.groupby("category", sort=True), (MEAN, self.table)]
        return pd.DataFrame([{"category": name, **self._difference(part)} for name, part in parts])

    def _difference(self, part: pd.DataFrame) -> dict[str, object]:
        """Return the accuracies and their difference on some of the questions; every type has the same weight."""
        types = part["category"]
        accuracies = [
            [float(part[f"correct:{model.key}"].groupby(types).mean().mean()) for model in pair]
            for pair in self.pair.shared
        ]
        first, second = np.mean(accuracies, axis=0)
        interval = self._interval(part, [b - a for a, b in accuracies])
        chance = float(part["chance"].groupby(types).mean().mean())
        scores = {"first": first, "second": second, "chance": chance, "score": interval.estimate}
        bounds = {"low": interval.low, "high": interval.high, "few": interval.few, "n": interval.n}
        return scores | bounds | {"over": self.pair.over, "questions": len(part)}

    def _interval(self, part: pd.DataFrame, changes: Sequence[float]) -> Interval:
        if self.pair.over == "seeds":
            return over_seeds(changes, (-1.0, 1.0))
        a, b = (part[f"correct:{model.key}"].astype(float) for model in self.pair.shared[0])
        return mean_interval(
            b - a, kind="difference", groups=part["image_id"].tolist(), strata=part["category"].tolist()
        )

    @cached_property
    def p(self) -> float:
        """The p of the difference in accuracy, the mean of types, by the method of its interval."""
        return self._p(self.table)

    @cached_property
    def p_holm(self) -> dict[str, float]:
        """The p of the difference in each question type, with Holm's correction over the types."""
        p = {str(name): self._p(part) for name, part in self.table.groupby("category", sort=True)}
        return dict(zip(p, holm(list(p.values())).tolist(), strict=True))

    def _p(self, part: pd.DataFrame) -> float:
        """Return the p of the difference on some of the questions; every type has the same weight."""
        types = part["category"]
        if self.pair.over == "seeds":
            means = [
                [part[f"correct:{model.key}"].groupby(types).mean().mean() for model in pair]
                for pair in self.pair.shared
            ]
            return t_test([b - a for a, b in means])
        a, b = (part[f"correct:{model.key}"].astype(float) for model in self.pair.shared[0])
        return mean_test(b - a, kind="difference", groups=part["image_id"].tolist(), strata=types.tolist())

    def outcome(self, a: Model, b: Model) -> pd.Series:
        """Return for each question which of two models is right, one of OUTCOMES with their keys."""
        first, second = (self.table[f"correct:{model.key}"].to_numpy(bool) for model in (a, b))
        names = [name.format(first=a.key, second=b.key) for name in OUTCOMES]
        number = np.select([second & ~first, first & ~second, ~first & ~second], [0, 1, 2], 3)
        return pd.Series(np.array(names, dtype=object)[number], self.table.index)

    @cached_property
    def disagreement(self) -> Disagreement:
        """On how many questions two models of the pair disagree, whether each is right."""
        return _disagreement(self.table, self.pair)


@dataclass(frozen=True)
class Disagreement:
    """Questions that one of two models answers right and the other does not; means over the shared seeds.

    Attributes:
        questions: number of questions asked.
        only_first, only_second: number of questions that only this group's model has right.
        share: share of questions on which they disagree, with its interval over images or seeds.
        chance: the share on which two models with these accuracies would disagree if they were right independently of
            one another, type by type.
        other_seed: the share on which two trainings of the first group disagree; None with a single one.
    """

    questions: int
    only_first: float
    only_second: float
    share: Interval
    chance: float
    other_seed: float | None
    over: Over


def _disagreement(table: pd.DataFrame, pair: Pair) -> Disagreement:
    def right(model: Model) -> pd.Series:
        return table[f"correct:{model.key}"].astype(bool)

    only = [((right(a) & ~right(b)).sum(), (right(b) & ~right(a)).sum()) for a, b in pair.shared]
    only_first, only_second = np.mean(only, axis=0)
    shares = [float((right(a) != right(b)).mean()) for a, b in pair.shared]
    if len(shares) > 1:
        interval = over_seeds(shares, (0.0, 1.0))
    else:
        a, b = pair.shared[0]
        differ = (right(a) != right(b)).astype(float)
        interval = mean_interval(differ, kind="proportion", groups=table["image_id"].tolist())
    chance = []
    for a, b in pair.shared:
        p, q = (right(model).groupby(table["category"]).transform("mean") for model in (a, b))
        chance.append(float((p * (1 - q) + q * (1 - p)).mean()))
    firsts = [a for a, _ in pair.shared]
    seeds = [float((right(a) != right(b)).mean()) for i, a in enumerate(firsts) for b in firsts[:i]]
    return Disagreement(
        len(table),
        float(only_first),
        float(only_second),
        interval,
        float(np.mean(chance)),
        float(np.mean(seeds)) if seeds else None,
        pair.over,
    )


def answered(pair: Pair) -> Answered:
    """Read the answers of a pair; models that were not asked the same questions are left out and named.

    Raises:
        RunError: no model of one of the groups has answers that can be compared.
    """
    left_out, tables = [], dict[str, pd.DataFrame]()
    reference: Model | None = None
    for model in [each for models in zip(*pair.shared, strict=True) for each in models]:
        try:
            table = read_answers(model)
        except RunError as error:
            left_out.append(f"{model.key}: {error}")
            continue
        if reference is None:
            reference = model
        if not _same_questions(tables.get(reference.key, table), table, reference, model):
            left_out.append(
                f"{model.key} was asked {len(table)} questions of {model.test_data}: expected the same questions as"
                f" {reference.key}"
            )
            continue
        tables[model.key] = table
    kept = tuple((a, b) for a, b in pair.shared if a.key in tables and b.key in tables)
    if not kept:
        raise RunError(
            f"the answers of {' and '.join(pair.names)} cannot be compared"
            + (f" ({'; '.join(left_out)})" if left_out else "")
        )
    pair = Pair(tuple(a for a, _ in kept), tuple(b for _, b in kept))
    return Answered(pair, _joined(tables, pair), tuple(left_out))


def _joined(tables: Mapping[str, pd.DataFrame], pair: Pair) -> pd.DataFrame:
    """Return one row per question with the columns of every model."""
    first = tables[pair.shared[0][0].key]
    columns = [column for column in (*ASKED, "question", "chance") if column in first]
    parts = [first[columns]]
    for key in pair.keys:
        own = [column for column in ("correct", "given", "p_right") if column in tables[key]]
        parts.append(tables[key][own].add_suffix(f":{key}"))
    return pd.concat(parts, axis=1)


def _same_questions(a: pd.DataFrame, b: pd.DataFrame, first: Model, second: Model) -> bool:
    """Return whether two tables, sorted by id, have the same questions about the same images."""
    return (
        len(a) == len(b)
        and content_asked(first) == content_asked(second)
        and all((a[key] == b[key]).all() for key in ASKED)
    )


def content_asked(model: Model) -> str | None:
    """Return the fingerprint of the data of a model's final evaluation, None if it is not stored."""
    return model.record.get("test", model.record.get("val"))


def read_answers(model: Model) -> pd.DataFrame:
    """Read the answers of a model, sorted by id; an unchanged file is read once.

    Raises:
        RunError: they are missing, damaged, or a loss instead of answers.
    """
    if model.folder is None:
        no_folder = f"no answers of {model.key} are stored: expected its training folder in this runs folder"
        raise RunError(model.why or no_folder)
    if model.state == "training":
        raise RunError("it is still being trained, and stores its answers at the end")
    file = model.folder / EVALUATION_FILE
    return _answers(file, file.stat().st_mtime_ns if file.exists() else 0)


@lru_cache(maxsize=64)
def _answers(file: Path, changed: int) -> pd.DataFrame:
    """Read answers; `changed` is the time of the file."""
    del changed
    table = read_table(file)
    if missing := [name for name in (*ASKED, "correct", "chance") if name not in table]:
        raise RunError(f"its stored answers have no column {missing[0]}: expected answers to questions with options")
    return table.sort_values("id", ignore_index=True)


# --- numbers of single images ---------------------------------------------------------------------


@lru_cache(maxsize=1024)
def images_of(run: StoredRun) -> frozenset[str]:
    """Return the images of which an analysis has stored numbers."""
    tables = [run.table(name) for name in ("per_image", "samples")]
    return frozenset(image for table in tables if "image_id" in table for image in table["image_id"].unique())


def runs_about(images: Collection[str], stored: Stored, analysis: str, keys: Sequence[str]) -> list[StoredRun]:
    """Return the runs of an analysis of at least two models, with the same options, that are about some images.

    Of several such lists the first one is returned (`Stored.of`), of none an empty one.
    """
    lists = (runs for runs in stored.of(analysis, keys) if len(runs) > 1)
    return next((runs for runs in lists if not images_of(runs[0]).isdisjoint(images)), [])


def image_numbers(measure: Measure, pair: Pair, runs: Sequence[StoredRun], layer: int | None = None) -> pd.DataFrame:
    """Return a measure of single images for both groups, the mean over the pairs of trainings that are compared.

    Args:
        runs: those of the measure's analysis (`runs_about`).
        layer: the layer; by default the mean over layers.

    Returns:
        Columns series, image_id, first, second, difference; empty where no pair of runs is `comparable`. An image
        counts in the pairs that both have it.
    """
    columns = ["series", "image_id", "first", "second", "difference"]
    unit = ["series", "layer", "image_id"]
    paired = comparable(measure, pair, {run.model: run for run in runs})
    parts = [by_image(measure, a).merge(by_image(measure, b), on=unit).dropna() for a, b in paired]
    if not parts:
        return pd.DataFrame(columns=columns)
    both = pd.concat(parts).rename(columns={"value_x": "first", "value_y": "second"})
    both = both if layer is None else both[both["layer"] == layer]
    means = both.groupby(["series", "image_id"])[["first", "second"]].mean()
    return means.assign(difference=means["second"] - means["first"]).reset_index()[columns]
