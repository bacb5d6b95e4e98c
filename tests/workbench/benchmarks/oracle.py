"""Scores of judged answers written plainly, without intervals, against which those of the product are checked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from workbench.data.mme import COGNITION, PERCEPTION
from workbench.errors import DataError

# --- yes or no ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class YesNo:
    """Counts of answers to yes-or-no questions; an answer that is not parsed is neither, and counted apart.

    Attributes:
        positives: questions whose right answer is yes, parsed or not.
    """

    tp: int
    fp: int
    tn: int
    positives: int
    unparsed: int
    n: int

    @classmethod
    def count(cls, gold: Sequence[str], parsed: Sequence[str | None]) -> YesNo:
        """Count the answers to questions whose right answers are `gold`, "yes" or "no"."""
        if unknown := set(gold) - {"yes", "no"}:
            raise DataError(f"a right answer is {sorted(unknown)[0]!r}: expected yes or no")
        pairs = list(zip(gold, parsed, strict=True))
        return cls(
            tp=pairs.count(("yes", "yes")),
            fp=pairs.count(("no", "yes")),
            tn=pairs.count(("no", "no")),
            positives=list(gold).count("yes"),
            unparsed=sum(answer not in ("yes", "no") for answer in parsed),
            n=len(pairs),
        )

    @property
    def fn(self) -> int:
        """Questions with the answer yes that were not answered so, those without a parsed answer included."""
        return self.positives - self.tp

    @property
    def accuracy(self) -> float | None:
        """Share of right answers."""
        return _share(self.tp + self.tn, self.n)

    @property
    def precision(self) -> float | None:
        """Share of right answers among those with yes; None if no answer is yes."""
        return _share(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float | None:
        """Share of the questions with the answer yes that were answered so; None if there are none."""
        return _share(self.tp, self.positives)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall, 0 if nothing was found; None if there was nothing to find or say."""
        return _share(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def yes_ratio(self) -> float | None:
        """Share of answers that are yes."""
        return _share(self.tp + self.fp, self.n)


def pope_lmms_scores(gold: Sequence[str], parsed: Sequence[str | None]) -> dict[str, float | None]:
    """Return the scores that lmms-eval reports for POPE.

    Its recall leaves out questions whose answer is not literally yes or no, and its yes-ratio is that of the labels.
    """
    counts = YesNo.count(gold, parsed)
    missed = list(zip(gold, parsed, strict=True)).count(("yes", "no"))
    recall, precision = _share(counts.tp, counts.tp + missed), counts.precision
    return {
        "accuracy": counts.accuracy,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision and recall else 0.0,
        "yes_ratio": _share(counts.positives, counts.n),
    }


# --- groups of questions --------------------------------------------------------------------------


def all_right(correct: Sequence[bool], groups: Sequence[Hashable], size: int) -> float:
    """Return the share of groups of questions, such as pairs, of which every answer is right.

    Raises:
        DataError: a group does not have `size` questions; the message names it.
    """
    members: dict[Hashable, list[bool]] = defaultdict(list)
    for right, group in zip(correct, groups, strict=True):
        members[group].append(right)
    if wrong := next((group for group, answers in members.items() if len(answers) != size), None):
        raise DataError(f"group {wrong} has {len(members[wrong])} questions: expected {size}")
    return mean(all(answers) for answers in members.values())


def by_group(correct: Sequence[bool], groups: Sequence[str]) -> dict[str, float]:
    """Return the accuracy within each group, such as a category, in order of appearance."""
    members: dict[str, list[bool]] = defaultdict(list)
    for right, group in zip(correct, groups, strict=True):
        members[group].append(right)
    return {group: mean(answers) for group, answers in members.items()}


# --- averages of single benchmarks ----------------------------------------------------------------


@dataclass(frozen=True)
class MMECategory:
    """Scores of a category of MME, in percent: `acc` of single questions, `acc_plus` of images with both right."""

    acc: float
    acc_plus: float

    @property
    def score(self) -> float:
        """Their sum, at most 200."""
        return self.acc + self.acc_plus


def mme_scores(correct: Sequence[bool], categories: Sequence[str], images: Sequence[str]) -> dict[str, MMECategory]:
    """Return the scores of each category of MME.

    Raises:
        DataError: an image does not have two questions in a category.
    """
    accuracy = by_group(correct, categories)
    rows = list(zip(correct, categories, images, strict=True))
    return {
        category: MMECategory(
            100 * accuracy[category],
            100
            * all_right(
                [right for right, of, _ in rows if of == category],
                [image for _, of, image in rows if of == category],
                2,
            ),
        )
        for category in accuracy
    }


def mme_sums(scores: Mapping[str, MMECategory]) -> dict[str, float]:
    """Return the sums over the categories of perception (at most 2000) and cognition (800), and their `total`."""
    perception, cognition = (
        sum(scores[name].score for name in names if name in scores) for names in (PERCEPTION, COGNITION)
    )
    return {"perception": perception, "cognition": cognition, "total": perception + cognition}


def cv_bench_averages(correct: Sequence[bool], tasks: Sequence[str], sources: Sequence[str]) -> dict[str, float | None]:
    """Return the averages of CV-Bench.

    `paper_2d` and `rows_all` are over rows; `official_2d` is the mean of the accuracies on ADE20K and COCO,
    `official_3d` the accuracy on Omni3D, and `official_total` their mean.
    """
    flat = [right for right, task in zip(correct, tasks, strict=True) if task in ("Count", "Relation")]
    accuracy = by_group(correct, sources)
    two = [accuracy.get("ADE20K"), accuracy.get("COCO")]
    official_2d = None if None in two else mean(two)  # type: ignore[type-var]
    official_3d = accuracy.get("Omni3D")
    total = None if official_2d is None or official_3d is None else (official_2d + official_3d) / 2
    return {
        "paper_2d": _mean(flat),
        "official_2d": official_2d,
        "official_3d": official_3d,
        "official_total": total,
        "rows_all": _mean(correct),
    }


def l2_mean(correct: Sequence[bool], subcategories: Sequence[str]) -> float:
    """Return the mean of the accuracies within each subcategory, as lmms-eval reports MMStar."""
    return mean(by_group(correct, subcategories).values())


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[bool]) -> float | None:
    return mean(values) if values else None
