"""Scores of a benchmark's answers, with their intervals, against computations by hand or by another way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from tests.workbench.benchmarks.oracle import YesNo, mme_scores, mme_sums, pope_lmms_scores
from workbench.benchmarks.comparison import POWER, compared, difference, whole
from workbench.benchmarks.headline import headline
from workbench.benchmarks.means import means
from workbench.benchmarks.tables import ALL, answer_row, judged, scores
from workbench.data.base import Sample
from workbench.stats import sums_interval
from workbench.training_folder import MEAN


def sample(number: int, image: int, answer: str, options: tuple[str, ...] = ("yes", "no"), **more: Any) -> Sample:
    return Sample(f"{number}", f"image {image}", lambda: None, "what ?", answer, options, **more)  # type: ignore[arg-type, return-value]


def answers_of(benchmark: str, rows: list[tuple[Sample, str]], shown: str = "image") -> pd.DataFrame:
    return pd.DataFrame([answer_row(benchmark, question, shown, answer) for question, answer in rows])


def score(table: pd.DataFrame, measure: str, category: str = ALL, scorer: str = "own") -> pd.Series:
    found = table[(table["measure"] == measure) & (table["category"] == category) & (table["scorer"] == scorer)]
    assert len(found) == 1, (measure, category, scorer)
    return found.iloc[0]


@pytest.fixture(scope="module")
def pope() -> pd.DataFrame:
    """Answers to 240 questions about 40 images in three splits, some of which say nothing."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(240):
        gold = ("yes", "no", "no", "yes", "no")[n % 5]
        answer = rng.choice(
            [gold.capitalize(), "Yes", "No", "It is a dog", f"{gold}, I think"], p=[0.5, 0.2, 0.1, 0.1, 0.1]
        )
        split = ("random", "popular", "adversarial")[n % 3]
        rows.append((sample(n, n // 6, gold, category=split), str(answer)))
    return answers_of("pope", rows)


def test_yes_no_scores_are_those_of_scikit_learn(pope: pd.DataFrame) -> None:
    table = scores(pope, seed=0)
    own = judged(pope).query("scorer == 'own'")
    gold, said = own["gold"] == "yes", own["parsed"] == "yes"
    for measure, value in (
        ("precision", precision_score(gold, said)),
        ("recall", recall_score(gold, said)),
        ("F1", f1_score(gold, said)),
        ("yes-ratio", said.mean()),
        ("accuracy", (own["parsed"] == own["gold"]).mean()),
    ):
        row = score(table, measure)
        assert row["score"] == pytest.approx(value)
        assert row["low"] < value < row["high"]
        assert (row["n"], row["n_images"], row["unparsed"]) == (240, 40, own["parsed"].isna().sum())
    assert score(table, "accuracy")["chance"] == 0.5
    assert score(table, "accuracy")["majority"] == pytest.approx(0.6)


def test_lmms_scores_of_pope_are_those_of_its_rules(pope: pd.DataFrame) -> None:
    part = judged(pope).query("scorer == 'lmms'")
    wanted = pope_lmms_scores(part["gold"].tolist(), part["parsed"].tolist())
    table = scores(pope, seed=0)
    for measure, name in (
        ("accuracy",) * 2,
        ("precision",) * 2,
        ("recall",) * 2,
        ("F1", "f1"),
        ("yes-ratio", "yes_ratio"),
    ):
        assert score(table, measure, scorer="lmms")["score"] == pytest.approx(wanted[name])


def test_averages_over_the_splits_of_pope(pope: pd.DataFrame) -> None:
    table, own = scores(pope, seed=0), judged(pope).query("scorer == 'own'")
    by_split = own.groupby("category")["correct"].mean()
    assert score(table, "accuracy", MEAN)["score"] == pytest.approx(by_split.mean())
    paper = score(table, "paper: random and popular", MEAN)
    assert paper["score"] == pytest.approx(by_split[["random", "popular"]].mean())
    assert paper["n"] == 160
    counts = [YesNo.count(part["gold"].tolist(), part["parsed"].tolist()) for _, part in own.groupby("category")]
    llava = score(table, "LLaVA: F1 of three splits", MEAN)
    assert llava["score"] == pytest.approx(np.mean([count.f1 for count in counts]))
    assert llava["low"] < llava["score"] < llava["high"]


def test_a_score_that_is_undefined_is_not_a_number() -> None:
    rows = [(sample(n, n, ("yes", "no")[n % 2]), "No") for n in range(12)]
    table = scores(answers_of("pope", rows), seed=0)
    assert np.isnan(score(table, "precision")[["score", "low", "high"]].astype(float)).all()
    assert score(table, "recall")["score"] == score(table, "F1")["score"] == 0


@pytest.mark.parametrize("scorer", ["own", "lmms"])
def test_a_ratio_at_its_end_still_has_an_interval(scorer: str) -> None:
    """That all 20 answers are right leaves up to .17 of them open, by Clopper and Pearson; half of them say yes."""
    golds = ["yes", "no"] * 10
    rows = [(sample(n, n, gold, category="random"), gold) for n, gold in enumerate(golds)]
    table = scores(answers_of("pope", rows), seed=0)
    for measure in ("precision", "recall"):
        row = score(table, measure, scorer=scorer)
        assert (row["score"], row["high"]) == (1, 1)
        assert row["low"] == pytest.approx(0.025 ** (1 / 10), abs=0.04)
    f1 = score(table, "F1", scorer=scorer)
    share = score(table, "precision", scorer=scorer)["low"]  # of 10 answers, as is that of F1
    assert (f1["score"], f1["high"], f1["low"]) == (1, 1, pytest.approx(2 * share / (1 + share)))
    always = scores(answers_of("pope", [(question, "yes") for question, _ in rows]), seed=0)
    ratio = score(always, "yes-ratio")
    assert (ratio["score"], ratio["high"]) == (1, 1)
    assert ratio["low"] == pytest.approx(0.025 ** (1 / 20), abs=0.04)


def test_the_interval_of_f1_is_near_the_bootstrap(pope: pd.DataFrame) -> None:
    own = judged(pope).query("scorer == 'own'")
    gold, said = own["gold"] == "yes", own["parsed"] == "yes"
    counts = {"tp": (gold & said).to_numpy() * 1.0, "said": said.to_numpy() * 1.0, "gold": gold.to_numpy() * 1.0}
    bootstrap = sums_interval(own["image_id"], counts, lambda s: 2 * s["tp"] / (s["said"] + s["gold"]), 0)
    f1 = score(scores(pope, seed=0), "F1")
    assert (f1["low"], f1["high"]) == (
        pytest.approx(bootstrap.low, abs=0.015),
        pytest.approx(bootstrap.high, abs=0.015),
    )


def test_questions_count_the_same_however_often_they_were_asked() -> None:
    """Question 0 (right) was answered four times, question 1 (wrong) once: precision is a half."""
    one, other = sample(0, 0, "yes"), sample(1, 1, "no")
    rows = [answer_row("pope", one, "image", "yes", draw=draw) for draw in range(4)]
    table = scores(pd.DataFrame([*rows, answer_row("pope", other, "image", "yes")]), seed=0)
    assert score(table, "precision")["score"] == pytest.approx(0.5)
    assert score(table, "F1")["score"] == pytest.approx(2 / 3)


def test_pairs_of_mmvp() -> None:
    right = [True, True, True, False, False, False] + [True] * 20
    rows = [
        (
            sample(n, n, ("open", "closed")[n % 2], ("open", "closed"), pair=f"{n // 2}"),
            "AB"[n % 2] if ok else "AB"[1 - n % 2],
        )
        for n, ok in enumerate(right)
    ]
    table = scores(answers_of("mmvp", rows), seed=0)
    pair = score(table, "pair")
    assert (pair["score"], pair["n"], pair["chance"]) == (pytest.approx(11 / 13), 13, 0.25)
    assert score(table, "accuracy")["score"] == pytest.approx(23 / 26)
    without = scores(answers_of("mmvp", rows[:-1]), seed=0)
    assert score(without, "pair")["n"] == 12, "a pair of which one question is missing is not counted"


def test_mme_scores_and_their_sums() -> None:
    rng = np.random.default_rng(1)
    rows = []
    for n in range(80):
        category, gold = ("count", "code_reasoning")[n // 40], ("yes", "no")[n % 2]
        answer = gold if rng.random() < 0.8 else "no" if gold == "yes" else "maybe"
        rows.append((sample(n, n // 2, gold, category=category, pair=f"{category}/{n // 2}"), answer))
    table = scores(answers_of("mme", rows), seed=0)
    correct = [question.answer == answer for question, answer in rows]
    wanted = mme_scores(correct, [q.category for q, _ in rows], [q.pair for q, _ in rows])
    for category, value in wanted.items():
        row = score(table, "MME score", category)
        assert row["score"] == pytest.approx(value.score)
        assert row["low"] < value.score < row["high"]
        assert row["chance"] == 75
    for name, value in mme_sums(wanted).items():
        assert score(table, f"MME {name}")["score"] == pytest.approx(value)
    assert score(table, "MME total")["chance"] == 150


def test_a_score_of_mme_at_its_end_still_has_an_interval() -> None:
    """That no image of ten has a right answer leaves up to 0.31 of them open, by Clopper and Pearson."""
    rows = [(sample(n, n // 2, "yes", category="count", pair=f"count/{n // 2}"), "no") for n in range(20)]
    row = score(scores(answers_of("mme", rows), seed=0), "MME score", "count")
    assert (row["score"], row["low"]) == (0, 0)
    assert row["high"] / 200 == pytest.approx(1 - 0.025 ** (1 / 10), abs=0.03)
    assert score(scores(answers_of("mme", rows), seed=0), "MME total")["high"] <= 200


def test_the_majority_answer_of_whats_up_is_one_for_all_questions() -> None:
    """Its categories are the right answers, so that the majority of each category would be always right."""
    golds = ["left"] * 5 + ["right"] * 3 + ["top"] * 2
    rows = [(sample(n, n, gold, ("left", "right", "top"), category=gold), "left") for n, gold in enumerate(golds)]
    table = scores(answers_of("whatsup coco_one", rows), seed=0)
    row, mean = score(table, "accuracy"), score(table, "accuracy", MEAN)
    assert (row["score"], row["majority"]) == (0.5, 0.5)
    assert mean["score"] == mean["majority"] == pytest.approx(1 / 3)


def test_the_majority_answer_is_one_for_all_questions_wherever_categories_are_answers() -> None:
    golds = ["right"] * 6 + ["left"] * 3 + ["front"]
    rows = [(sample(n, n, gold, ("left", "right", "front"), category=gold), "left") for n, gold in enumerate(golds)]
    assert score(scores(answers_of("gqa_relation", rows), seed=0), "accuracy")["majority"] == 0.6


def test_cv_bench_averages() -> None:
    sizes = {("ADE20K", "Count"): (12, 8), ("COCO", "Relation"): (24, 6), ("Omni3D", "Depth"): (10, 9)}
    rows = [
        (sample(n, n, "left", ("left", "right"), source=source, category=task), "A" if k < right else "B")
        for n, (source, task, k, right) in enumerate(
            (source, task, k, right) for (source, task), (count, right) in sizes.items() for k in range(count)
        )
    ]
    table = scores(answers_of("cv_bench", rows), seed=0)
    for measure, value in (
        ("paper: 2D", 14 / 36),
        ("official: 2D", (8 / 12 + 6 / 24) / 2),
        ("official: 3D", 0.9),
        ("official: total", (8 / 12 + 6 / 24) / 4 + 0.9 / 2),
    ):
        row = score(table, measure)
        assert row["score"] == pytest.approx(value)
        assert row["low"] < value < row["high"]
        assert row["chance"] == pytest.approx(0.5)
    assert score(table, "accuracy")["majority"] == 1, "every right answer here is A"


def test_one_task_of_cv_bench_is_not_called_2d() -> None:
    rows = [
        (sample(n, n, "1", ("1", "2"), source=("ADE20K", "COCO", "Omni3D")[n % 3], category="Count"), "A")
        for n in range(9)
    ]
    table = scores(answers_of("cv_bench", rows), seed=0)
    assert set(table["measure"]).isdisjoint({"paper: 2D", "official: 2D", "official: total"})
    assert headline(table[table["scorer"] == "own"], "cv_bench", "").name == "cv_bench, accuracy"


def test_a_bootstrap_of_a_proportion_is_near_its_interval() -> None:
    values = np.random.default_rng(2).random(400) < 0.3
    interval = sums_interval(
        [f"{n}" for n in range(400)], {"x": values * 1.0, "n": np.ones(400)}, lambda s: s["x"] / s["n"], 0
    )
    error = np.sqrt(0.3 * 0.7 / 400)
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_a_bootstrap_resamples_images() -> None:
    """Ten questions of an image with the same answer are one answer, so the interval is sqrt(10) times as wide."""
    values = np.random.default_rng(3).random(60) < 0.5
    one = sums_interval(
        [f"{n}" for n in range(60)], {"x": values * 1.0, "n": np.ones(60)}, lambda s: s["x"] / s["n"], 0
    )
    images = [f"{n}" for n in range(60) for _ in range(10)]
    ten = sums_interval(images, {"x": values.repeat(10) * 1.0, "n": np.ones(600)}, lambda s: s["x"] / s["n"], 0)
    assert (ten.low, ten.high, ten.n) == (pytest.approx(one.low), pytest.approx(one.high), 60)


def test_differences_are_paired() -> None:
    """Two models that answer alike but for 12 of 200 questions, all better in the second."""
    rng = np.random.default_rng(4)
    right = rng.random(200) < 0.6
    better = right.copy()
    better[np.flatnonzero(~right)[:12]] = True
    tables = []
    for values in (right, better):
        rows = [(sample(n, n, "yes"), "yes" if ok else "no") for n, ok in enumerate(values)]
        tables.append(means(judged(answers_of("pope", rows)).query("scorer == 'own'"))["accuracy", ALL])
    result = difference(*tables)
    assert result["difference"] == pytest.approx(0.06)
    assert 0.02 < result["difference_low"] < 0.06 < result["difference_high"] < 0.12
    assert result["smallest"] == pytest.approx(POWER * np.sqrt(0.06 * 0.94 / 200), rel=0.25)
    assert difference(tables[0], tables[0])["difference"] == 0


def _letter(right: str, options: tuple[str, ...], ok: bool) -> str:
    place = options.index(right)
    return "ABCD"[place if ok else (place + 1) % len(options)]


def _cv_bench(ok: list[bool]) -> list[tuple[Sample, str]]:
    kinds = [("Count", "ADE20K"), ("Relation", "COCO"), ("Relation", "ADE20K"), ("Depth", "Omni3D")]
    rows = []
    for n, right in enumerate(ok):
        category, source = kinds[n % 4]
        more = {"category": category, "source": source}
        rows.append((sample(n, n, "left", ("left", "right"), **more), _letter("left", ("left", "right"), right)))
    return rows


def _mmvp(ok: list[bool]) -> list[tuple[Sample, str]]:
    options = ("open", "closed")
    return [
        (sample(n, n, options[n % 2], options, pair=f"{n // 2}"), _letter(options[n % 2], options, right))
        for n, right in enumerate(ok)
    ]


def _mme(ok: list[bool]) -> list[tuple[Sample, str]]:
    rows = []
    for n, right in enumerate(ok):
        category, gold = ("count", "scene", "code_reasoning")[n // 2 % 3], ("yes", "no")[n % 2]
        said = gold if right else {"yes": "no", "no": "yes"}[gold]
        rows.append((sample(n, n // 2, gold, category=category, pair=f"{category}/{n // 2}"), said))
    return rows


@pytest.mark.parametrize(("benchmark", "rows_of"), [("cv_bench", _cv_bench), ("mmvp", _mmvp), ("mme", _mme)])
def test_every_mean_of_two_models_has_its_paired_difference(benchmark: str, rows_of: Any) -> None:
    rng = np.random.default_rng(5)
    first = rng.random(240) < 0.6
    second = np.where(rng.random(240) < 0.1, ~first, first)
    answers = {name: answers_of(benchmark, rows_of(list(ok))) for name, ok in (("a", first), ("b", second))}
    table = compared({name: scores(of, seed=0) for name, of in answers.items()}, answers)
    table = table[
        (table["scorer"] == "own") & ~table["measure"].str.startswith(("rate", "prec", "recall", "F1", "yes"))
    ]
    a, b = (table[table["model"] == name].set_index(["measure", "category"]) for name in ("a", "b"))
    assert a["difference"].isna().all()
    assert len(b) > 1
    for name, row in b.iterrows():
        assert row["difference"] == pytest.approx(row["score"] - a.loc[name, "score"]), name
        assert row["difference_low"] < row["difference"] < row["difference_high"]
        assert row["difference_high"] - row["difference_low"] < row["high"] - row["low"], f"{name} is not paired"
        scale = (row["high"] - row["low"]) / (a.loc[name, "high"] - a.loc[name, "low"])
        assert 0.5 < scale < 2


def test_the_difference_of_pairs_is_one_of_pairs() -> None:
    """By hand: 40 pairs, of which the second model loses 4 by one wrong answer each, and gains 1."""
    right = np.ones(80, bool)
    right[78] = False
    changed = right.copy()
    changed[[0, 2, 4, 6]], changed[78] = False, True
    of = [means(judged(answers_of("mmvp", _mmvp(list(ok)))).query("scorer == 'own'")) for ok in (right, changed)]
    result = difference(*(each["pair", ALL] for each in of))
    assert result["difference"] == pytest.approx((36 - 39) / 40)
    # Tango's interval of 4 losses and 1 gain of 40, by the formula of its score test
    assert result["difference_low"] < -0.15
    assert 0.02 < result["difference_high"] < 0.08
    singles = difference(*(each["accuracy", ALL] for each in of))
    assert singles["difference"] == pytest.approx(-3 / 80)


def test_a_summary_has_scorers_and_models_side_by_side() -> None:
    """Letter rates of other scorers and of blind runs are left to the table of scores."""
    answers = {
        name: pd.concat([answers_of("mmvp", _mmvp([True, False] * 8), shown) for shown in ("image", "no image")])
        for name in ("a", "b")
    }
    table = whole(compared({name: scores(of, seed=0) for name, of in answers.items()}, answers))
    rates = table[table["measure"].str.startswith("rate of")]
    assert set(zip(rates["shown"], rates["scorer"], strict=True)) == {("image", "own")}
    first = table.head(6)
    assert list(first["model"]) == ["a", "b"] * 3
    assert list(first["scorer"]) == ["own", "own", "lmms", "lmms", "paper", "paper"]
    assert set(first["measure"]) == {"accuracy"}
    assert list(table["shown"].drop_duplicates()) == ["image", "no image"]


def test_scores_are_means_over_draws_and_pairs_are_counted_within_a_draw() -> None:
    """By hand: two pairs of MMVP, two draws each."""
    options = ("open", "closed")
    said = {"0": ("A", "A"), "1": ("B", "A"), "2": ("B", "B"), "3": ("B", "B")}  # of draws 0 and 1
    golds = {"0": "open", "1": "closed", "2": "open", "3": "closed"}
    rows = [
        answer_row("mmvp", sample(int(n), int(n), golds[n], options, pair=str(int(n) // 2)), "image", text, draw=draw)
        for n, texts in said.items()
        for draw, text in enumerate(texts)
    ]
    table = scores(pd.DataFrame(rows), seed=0)
    row = score(table, "accuracy")
    assert row["score"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert (row["n"], row["n_images"], row["draws"]) == (4, 4, 2)
    pair = score(table, "pair")
    assert pair["score"] == pytest.approx((0.5 + 0) / 2)  # right together in draw 0 alone
    assert (pair["n"], pair["chance"]) == (2, 0.25)
    assert score(table, "rate of A")["score"] == pytest.approx(3 / 8)
    assert score(table, "rate of A")["chance"] == 0.5
    assert score(table, "rate of B")["score"] == pytest.approx(5 / 8)


def test_circular_evaluation_asks_for_every_rotation_to_be_right() -> None:
    options, answers = ("red", "blue"), {"0": "AB", "1": "AA", "2": "BB"}  # of rotations 0 and 1; red is right
    rows = [
        answer_row("mmstar", sample(int(n), 0, "red", options[by:] + options[:by]), "image", letters[by], draw=by)
        for n, letters in answers.items()
        for by in (0, 1)
    ]
    row = score(scores(pd.DataFrame(rows), seed=0), "circular")
    assert (row["score"], row["chance"], row["n"]) == (pytest.approx(1 / 3), 0.25, 3)
    assert score(scores(pd.DataFrame(rows), seed=0), "accuracy")["score"] == pytest.approx(4 / 6)


def test_a_question_counts_once_however_often_it_is_asked() -> None:
    """Of two questions, the one with four options is asked twice as often when these are rotated."""
    rows = []
    for number, options in enumerate((("red", "blue"), ("red", "blue", "green", "grey"))):
        for by in range(len(options)):
            turned = options[by:] + options[:by]
            question = sample(number, number, "red", turned, source=("ADE20K", "COCO")[number], category="Count")
            rows.append(answer_row("cv_bench", question, "image", "A", draw=by))
    table = scores(pd.DataFrame(rows), seed=0)
    row = score(table, "accuracy")
    assert (row["score"], row["chance"], row["majority"]) == pytest.approx((3 / 8, 3 / 8, 3 / 8))
    assert score(table, "rate of A")["chance"] == pytest.approx(3 / 8)
    assert score(table, "rate of D")["chance"] == pytest.approx(1 / 8)


def test_the_total_of_cv_bench_counts_questions() -> None:
    rows = []
    for number, (source, count) in enumerate([("ADE20K", 2), ("ADE20K", 4), ("COCO", 2), ("Omni3D", 2)]):
        options = ("red", "blue", "green", "grey")[:count]
        for by in range(count):
            task = "Depth" if source == "Omni3D" else ("Count", "Relation")[number % 2]
            question = sample(number, number, "red", options[by:] + options[:by], source=source, category=task)
            rows.append(answer_row("cv_bench", question, "image", "A", draw=by))
    total = score(scores(pd.DataFrame(rows), seed=0), "official: total")
    assert total["score"] == total["chance"] == pytest.approx(3 / 8 / 4 + 1 / 8 + 1 / 4)


def test_the_majority_of_a_mean_over_categories_is_a_mean_over_categories() -> None:
    golds = {"random": ["yes"] * 9 + ["no"], "popular": ["no"] * 3 + ["yes"] * 2}
    rows = [
        (sample(n, n, gold, category=name), "Yes")
        for n, (name, gold) in enumerate((name, gold) for name, of in golds.items() for gold in of)
    ]
    table = scores(answers_of("pope", rows), seed=0)
    assert score(table, "accuracy")["majority"] == pytest.approx(12 / 15)
    for measure in ("accuracy", "paper: random and popular"):
        assert score(table, measure, MEAN)["majority"] == pytest.approx((0.9 + 0.6) / 2)


def test_a_scorer_that_reads_no_letter_has_no_letter_rates() -> None:
    rows = [(sample(n, n, "red", ("red", "blue")), ("A", "Dog")[n % 2]) for n in range(12)]
    table = scores(answers_of("mmstar", rows), seed=0)
    rated = set(table.loc[table["measure"].str.startswith("rate of"), "scorer"])
    assert rated == {"own", "paper"}
    assert "official" in set(table["scorer"])


def test_questions_without_a_pair_are_no_pair() -> None:
    rows = [(sample(n, n, "open", ("open", "closed")), "A") for n in range(2)]
    assert "pair" not in set(scores(answers_of("mmvp", rows), seed=0)["measure"])


def test_likelihoods_are_scored_by_sum_and_by_mean() -> None:
    options = ("red", "dark blue")
    rows = [
        answer_row("", sample(n, n, gold, options), "image", "red", logprobs="[-2.0, -3.0]", tokens="[1, 2]")
        for n, gold in enumerate(("red", "red", "dark blue"))
    ]
    table = scores(pd.DataFrame(rows), seed=0)
    assert score(table, "accuracy", scorer="sum")["score"] == pytest.approx(2 / 3)
    assert score(table, "accuracy", scorer="mean")["score"] == pytest.approx(1 / 3)


def test_either_letter_of_two_equal_options_is_right() -> None:
    """A row is stored by the text of its answer: options A and C are both what the label says."""
    options = ("2", "1", "2", "4")
    rows = [(sample(n, n, "2", options, category="c", source="l"), said) for n, said in enumerate("ABCD")]
    for benchmark, scorers in (("mmstar", ("own", "official", "paper")), ("cv_bench", ("own", "lmms", "paper"))):
        table = judged(answers_of(benchmark, rows))
        for scorer in scorers:
            right = table[table["scorer"] == scorer].sort_values("id")["correct"].tolist()
            assert right == [True, False, True, False], (benchmark, scorer)
