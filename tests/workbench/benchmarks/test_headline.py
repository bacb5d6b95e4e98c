"""One score of each benchmark: as the tables have it, as the mean of its units, and under resampling by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

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
from workbench.benchmarks.tables import answer_row, judged, scores
from workbench.data.base import Sample

YES_NO = ("yes", "no")
WHERE = ("left", "right", "above", "below")


def _row(benchmark: str, number: int, answer: str, **fields: Any) -> dict[str, Any]:
    options = fields.pop("options", YES_NO)
    known = {"question": "is it ?", "answer": options[0], "category": "", "pair": "", "source": ""} | fields
    image = known.pop("image")
    sample = Sample(f"{benchmark}-{number}", image, lambda: None, options=options, **known)  # type: ignore[arg-type]
    return answer_row(benchmark, sample, "image", answer)


def _answers(benchmark: str, seed: int = 0) -> pd.DataFrame:
    """Answers to some questions of a benchmark, of which a random part is right."""
    rng, rows = np.random.default_rng(seed), []

    def answer(options: tuple[str, ...]) -> str:
        return str(rng.choice(options, p=[0.6, *[0.4 / (len(options) - 1)] * (len(options) - 1)]))

    if benchmark == "pope":
        for split in ("random", "popular", "adversarial"):
            for number in range(40 if split == "random" else 20):  # so that splits of unequal size count the same
                rows.append((benchmark, len(rows), answer(YES_NO), {"category": split, "image": f"i{number % 7}"}))
    elif benchmark == "cv_bench":
        for number in range(60):
            task = ("Count", "Relation", "Depth")[number % 3]
            more = {"category": task, "image": f"i{number}", "source": "COCO", "options": WHERE}
            rows.append((benchmark, number, answer(("A", "B", "C", "D")), more))
    elif benchmark == "mmvp":
        for number in range(41):  # the last one has lost its partner
            more = {"image": f"i{number}", "pair": f"{number // 2}", "options": ("open", "closed")}
            rows.append((benchmark, number, answer(("A", "B")), more))
    elif benchmark == "mme":
        for number in range(60):
            more = {
                "image": f"i{number // 2}",
                "pair": f"{number // 2}",
                "category": ("count", "scene")[number % 6 < 4],
            }
            rows.append((benchmark, number, answer(YES_NO), more))
    else:
        for number in range(30):
            rows.append((benchmark, number, answer(WHERE), {"image": f"i{number % 9}", "options": WHERE}))
    return pd.DataFrame([_row(name, number, text, **more) for name, number, text, more in rows])


@pytest.mark.parametrize(
    ("benchmark", "name"),
    [
        ("pope", "pope, random and popular"),
        ("cv_bench", "cv_bench, 2D"),
        ("mmvp", "mmvp, pair"),
        ("mme", "mme, share of the largest total"),
        ("whatsup coco_one", "whatsup coco_one, accuracy"),
        ("", "shapes:val, accuracy"),
    ],
)
def test_a_score_is_that_of_the_table_and_the_mean_of_its_units(benchmark: str, name: str) -> None:
    answers = _answers(benchmark)
    table = scores(answers, seed=0).query("scorer == 'own'")
    one = headline(table, benchmark, "shapes:val")
    assert one.name == name
    assert 0 <= one.low < one.score < one.high <= 1
    values = units(judged(answers).query("scorer == 'own'"))
    assert values.groupby("stratum")["value"].mean().mean() == pytest.approx(one.score)
    assert values["value"].between(0, 1).all()
    if benchmark == "pope":
        right = answers["answer"] == "yes"
        by_hand = [right[answers["category"] == split].mean() for split in ("random", "popular")]
        assert one.score == pytest.approx(np.mean(by_hand))
        assert one.chance == 0.5
        assert one.n_images == values["cluster"].nunique() == 7
    assert number_of_images(pd.concat([values, values])) == one.n_images  # images that data sets share count once
    if benchmark == "mmvp":
        assert one.n == len(values) == 20
        assert one.chance == 0.25
    if benchmark == "mme":  # the chance of 100 (acc + acc+) is 75 of 200
        assert one.chance == pytest.approx(0.375)


def test_a_score_that_the_questions_do_not_allow_is_the_accuracy_and_says_so() -> None:
    answers = _answers("pope").query("category == 'popular'")
    table = scores(answers, seed=0).query("scorer == 'own'")
    assert headline(table, "pope", "").name == "pope, accuracy"
    assert units(judged(answers).query("scorer == 'own'"))["value"].mean() == (answers["answer"] == "yes").mean()


def test_subsets_of_a_benchmark_count_as_one() -> None:
    weights = weights_of(["whatsup", "pope", "whatsup"])
    assert weights["whatsup"].tolist() == [0.5, 0, 0.5]
    assert weights["pope"].tolist() == [0, 1, 0]
    assert weights[""].tolist() == [0.25, 0.5, 0.25]


def test_the_interval_of_a_mean_is_the_wider_of_two() -> None:
    parts = [Headline("a", 0.4, 0.3, 0.6, 0.25, 100, 50), Headline("b", 0.8, 0.7, 0.9, 0.5, 30, 30)]
    half = np.array([0.5, 0.5])
    one = mean_of(parts, half, np.array([0.6, 0.6]), 60)
    assert one.score == pytest.approx(0.6)
    assert one.low == pytest.approx(0.6 - 0.5 * np.hypot(0.1, 0.1))
    assert one.high == pytest.approx(0.6 + 0.5 * np.hypot(0.2, 0.1))
    assert one.chance == pytest.approx(0.375)
    assert (one.n, one.n_images) == (130, 60)
    wide = mean_of(parts, half, np.linspace(0, 1, 1001), 60)
    assert (wide.low, wide.high) == pytest.approx((0.025, 0.975))
    wrong = [Headline("a", 0, 0, 0.2, 0.5, 9, 9)] * 2
    assert mean_of(wrong, half, np.zeros(10), 9).high == pytest.approx(0.5 * np.hypot(0.2, 0.2))


def _values(seed: int, images: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = [
        {"data": data, "stratum": stratum, "cluster": f"i{image}", "step": step, "value": float(rng.random() < 0.5)}
        for data, strata in ((0, ("a", "b")), (1, ("",)))
        for stratum in strata
        for image in range(images)
        for step in (0, 10)
    ]
    return pd.DataFrame(rows)


def test_resamples_are_those_of_images_by_hand() -> None:
    values, draws = _values(1), 400
    drawn = resampled(values, [0, 10], draws=draws, seed=3)
    assert drawn.shape == (draws, 2, 2)
    names = sorted(values["cluster"].unique())
    weights = np.random.default_rng(3).multinomial(40, np.full(40, 1 / 40), size=draws)
    for draw in range(3):
        repeated = values.loc[values.index.repeat(weights[draw][[names.index(name) for name in values["cluster"]]])]
        means = repeated.groupby(["data", "stratum", "step"])["value"].mean().groupby(["data", "step"]).mean()
        for data in (0, 1):
            for at, step in enumerate((0, 10)):
                assert drawn[draw, at, data] == pytest.approx(means[(data, step)])
    exact = values.groupby(["data", "stratum", "step"])["value"].mean().groupby(["data", "step"]).mean()
    assert drawn[:, 1, 1].mean() == pytest.approx(exact[(1, 10)], abs=0.02)
    # the standard error of a mean of 40 answers
    assert drawn[:, 1, 1].std() == pytest.approx((exact[(1, 10)] * (1 - exact[(1, 10)]) / 40) ** 0.5, rel=0.15)


def test_two_models_have_the_same_resamples() -> None:
    """A model that is better by a constant everywhere is better by it in every resample, in whatever order it
    answered."""
    values = _values(1)
    better = values.assign(value=values["value"] + 0.25).sample(frac=1, random_state=0)
    one, other = (resampled(table, [0, 10], draws=50, seed=3) for table in (values, better))
    assert np.allclose(other - one, 0.25)
    assert not np.allclose(resampled(values, [0, 10], draws=50, seed=4), one)


def test_a_data_set_that_does_not_count_is_not_needed() -> None:
    drawn = np.array([[0.5, np.nan], [np.nan, 0.5], [0.5, 0.7]])
    assert np.array_equal(weighted(drawn, np.array([1.0, 0.0])), [0.5, np.nan, 0.5], equal_nan=True)
    assert np.array_equal(weighted(drawn, np.array([0.5, 0.5])), [np.nan, np.nan, 0.6], equal_nan=True)


def test_a_resample_without_one_category_has_the_mean_of_the_others() -> None:
    """Three categories with one image each: of 300 resamples, hardly one in four has them all."""
    rows = [
        {"data": 0, "stratum": name, "cluster": name, "step": 0, "value": value}
        for name, value in (("a", 0.0), ("b", 0.5), ("c", 1.0))
    ]
    drawn = resampled(pd.DataFrame(rows), [0], draws=300, seed=0)
    assert np.isfinite(drawn).all()
    assert set(np.round(drawn.ravel(), 6)) == {0, 0.25, 0.5, 0.75, 1}


def test_the_labels_of_repope_are_part_of_the_name() -> None:
    table = scores(_answers("pope"), seed=0).query("scorer == 'own'")
    assert headline(table, "pope", "", "RePOPE's labels, unknown copy").name == "RePOPE, random and popular"
