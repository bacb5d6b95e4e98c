"""Intervals cover what they say for every kind of quantity, never leave what it can be, and count images rather than
rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from scipy.optimize import brentq, minimize_scalar

from benchmarks import coverage
from workbench import bootstrap_ci, figures
from workbench.errors import DataError
from workbench.intervals import (
    Interval,
    Kind,
    mean_interval,
    mean_intervals,
    mean_test,
    sum_interval,
    t_interval,
    t_test,
    tango,
    wilson,
)
from workbench.scoring.tables import accuracy_by_type
from workbench.training_folder import MEAN

Z2 = scipy_stats.norm.ppf(0.975) ** 2


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("accuracy", {"images": 40, "questions": 5, "rho": 0.1, "uneven": True, "p": 0.98}),
        ("accuracy", {"images": 10, "questions": 20, "rho": 0.3, "uneven": False, "p": 0.8}),
        ("accuracy", {"images": 100, "questions": 1, "rho": 0.0, "uneven": False, "p": 0.9}),
        ("mean of types", {"images": 20, "questions": 4, "rho": 0.3, "p": 0.9}),
        ("drop", {"images": 40, "questions": 5, "rho": 0.1, "lost": 0.02, "gained": 0.0}),
        ("drop", {"images": 20, "questions": 20, "rho": 0.3, "lost": 0.2, "gained": 0.05}),
        ("real", {"images": 20, "values": "exponential"}),
        ("seeds", {"seeds": 3, "trials": 400, "rho": 0.0, "p": 0.995}),
        ("seeds", {"seeds": 5, "trials": 2000, "rho": 0.005, "p": 0.98}),
    ],
)
def test_intervals_cover_in_cells_of_the_benchmark(family: str, named: dict[str, object]) -> None:
    """1000 draws have a standard error of .007 at .95."""
    (cell,) = [cell for cell in coverage.FAMILIES[family]() if cell.named == named]
    row = coverage.measure(cell, 1000, np.random.default_rng(7))
    assert 0.925 <= float(row["coverage"]) <= 0.998  # type: ignore[arg-type]


def test_resampling_covers_too_little_where_ours_holds() -> None:
    """The fault this module replaced: an accuracy of .98 at 20 images."""
    cell = next(
        c
        for c in coverage.accuracies()
        if c.named == {"images": 20, "questions": 5, "rho": 0.0, "uneven": False, "p": 0.98}
    )
    _, _, others = cell.simulate(np.random.default_rng(0), 500)
    low, high = others["percentile bootstrap"]
    assert np.mean((low <= 0.98) & (high >= 0.98)) < 0.9
    assert float(coverage.measure(cell, 500, np.random.default_rng(0))["coverage"]) > 0.93  # type: ignore[arg-type]


def test_one_question_an_image_is_the_interval_of_wilson() -> None:
    """Independent answers: the textbook interval, here from its definition."""
    right = np.array([1.0] * 37 + [0.0] * 13)
    interval = mean_interval(right, kind="proportion", groups=range(50))

    def rejected(p: float) -> float:
        return (0.74 - p) ** 2 - Z2 * p * (1 - p) / 50

    assert (interval.low, interval.high) == pytest.approx(
        (brentq(rejected, 0.01, 0.74), brentq(rejected, 0.74, 0.999)), rel=2e-2
    )
    assert wilson(np.array([0.74]), np.array([Z2 / 50]))[0][0] == pytest.approx(brentq(rejected, 0.01, 0.74))


@pytest.mark.parametrize(("gained", "lost"), [(9, 1), (4, 0), (0, 6), (12, 12)])
def test_the_interval_of_a_difference_inverts_the_score_test(gained: int, lost: int) -> None:
    """The trinomial likelihood under each end, maximised by search: its score statistic is the quantile there."""
    n = 60
    low, high = tango(np.array([gained / n]), np.array([lost / n]), np.array([Z2 / n]))
    for end in (low[0], high[0]):

        def unlikely(q: float, end: float = end) -> float:
            shares = np.array([q + end, q, 1 - 2 * q - end])
            return -float((np.array([gained, lost, n - gained - lost]) * np.log(shares.clip(min=1e-300))).sum())

        edges = (max(0.0, -end) + 1e-12, (1 - end) / 2 - 1e-12)
        q = minimize_scalar(unlikely, bounds=edges, method="bounded", options={"xatol": 1e-12}).x
        assert ((gained - lost) / n - end) ** 2 * n / (2 * q + end - end**2) == pytest.approx(Z2, rel=1e-3)


@pytest.mark.parametrize("kind", ["proportion", "difference", "real"])
def test_images_count_and_not_their_rows(kind: Kind) -> None:
    rng = np.random.default_rng(1)
    by_image = {
        "proportion": rng.integers(0, 2, 40),
        "difference": rng.integers(-1, 2, 40),
        "real": rng.normal(size=40),
    }[kind]
    single = mean_interval(by_image, kind=kind)
    repeated = mean_interval(np.repeat(by_image, 10), kind=kind, groups=np.repeat(np.arange(40), 10))
    assert repeated.n == 40
    assert repeated.estimate == pytest.approx(single.estimate)
    assert repeated.high - repeated.low == pytest.approx(single.high - single.low, rel=0.1)
    naive = mean_interval(np.repeat(by_image, 10), kind=kind)
    assert naive.high - naive.low < 0.45 * (repeated.high - repeated.low)
    order = rng.permutation(400)
    moved = mean_interval(np.repeat(by_image, 10)[order], kind=kind, groups=np.repeat(np.arange(40), 10)[order])
    assert (moved.low, moved.high) == pytest.approx((repeated.low, repeated.high))


@pytest.mark.parametrize("units", [1, 2, 5, 30])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_right_and_all_wrong_leave_room(units: int, value: float) -> None:
    """As much as one question for each image leaves: Clopper and Pearson's interval."""
    interval = mean_interval(np.full(units * 4, value), kind="proportion", groups=np.repeat(np.arange(units), 4))
    assert interval.few
    assert interval.n == units
    assert 0 <= interval.low <= value <= interval.high <= 1
    room = interval.high if value == 0 else 1 - interval.low
    exact = 1 - 0.025 ** (1 / units)
    assert room == (1 if units == 1 else pytest.approx(exact))
    none = mean_interval(np.zeros(units * 4), kind="difference", groups=np.repeat(np.arange(units), 4))
    assert none.few
    assert -1 <= none.low < 0 < none.high <= 1


@pytest.mark.slow
def test_intervals_hold_their_estimate_and_stay_where_the_quantity_can_be() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        rows, images = int(rng.integers(1, 60)), int(rng.integers(1, 20))
        groups, strata = rng.integers(0, images, rows), rng.integers(0, 3, rows)
        right = (rng.random(rows) < rng.choice([0.02, 0.5, 0.98])).astype(float)
        share = right * rng.random(rows)
        for kind, values, least in (
            ("proportion", right, 0),
            ("proportion", share, 0),
            ("difference", right - rng.integers(0, 2, rows), -1),
        ):
            interval = mean_interval(values, kind=kind, groups=groups, strata=strata)  # type: ignore[arg-type]
            assert least <= interval.low <= interval.estimate <= interval.high <= 1
            assert interval.n == len(set(groups))
            assert interval.few or interval.n >= 10


def test_few_says_when_there_is_too_little_and_only_then() -> None:
    def of(images: int, wrong: int, questions: int = 5) -> bool:
        values = np.ones(images * questions)
        values[:: questions + 1][:wrong] = 0
        return mean_interval(values, kind="proportion", groups=np.repeat(np.arange(images), questions)).few

    assert of(9, 5)
    assert not of(10, 5)
    assert of(10, 4)
    assert of(100, 4)
    assert not of(100, 5)
    assert mean_interval([0.1] * 9, kind="real").few
    assert not mean_interval(np.linspace(0, 1, 10), kind="real").few


def test_tables_and_their_figure_say_where_there_is_too_little() -> None:
    rows = [
        {"image_id": i // 4, "category": "ab"[i % 2], "chance": 0.5, "correct": i % 2 == 0 or i % 8 == 1}
        for i in range(80)
    ]
    table = pd.DataFrame(accuracy_by_type(pd.DataFrame(rows), seed=0))
    assert table.set_index("category")["few"].to_dict() == {"a": True, "b": False, MEAN: False}  # all of a is right
    figure = figures.accuracy_by_type({"model": table})
    assert [words for *_, words in figure.data[0].customdata] == [", too few to conclude much", "", ""]


def test_fewer_wrong_answers_never_widen_towards_wrong() -> None:
    """Where too few are wrong to see how they cluster, the lower end still rises with every right answer."""
    ends = []
    for wrong in range(9):
        values = np.ones(100)
        values[np.arange(wrong) * 11] = 0
        ends.append(mean_interval(values, kind="proportion", groups=np.repeat(np.arange(20), 5)).low)
    assert ends == sorted(ends, reverse=True) or max(np.diff(ends)) < 0.03


def test_the_mean_of_types_weighs_types_alike() -> None:
    rng = np.random.default_rng(4)
    types = np.array(["rare"] * 20 + ["often"] * 180)
    right = np.where(types == "rare", rng.random(200) < 0.5, rng.random(200) < 0.9).astype(float)
    images = np.arange(200) % 50
    interval = mean_interval(right, kind="proportion", groups=images, strata=types)
    assert interval.estimate == pytest.approx((right[:20].mean() + right[20:].mean()) / 2)
    rare = mean_interval(right[:20], kind="proportion", groups=images[:20])
    # half of the rare type's error, and a little of the other's
    assert 0.4 < (interval.high - interval.low) / (rare.high - rare.low) < 0.7


def test_a_row_of_weight_two_counts_as_two_rows() -> None:
    values, groups, weights = [1.0, 0.0, 1.0, np.nan], ["a", "a", "b", "c"], [2.0, 1.0, 3.0, 1.0]
    repeated = [int(weight) for weight in weights]
    (once,) = mean_intervals(np.array(values)[:, None], kind="proportion", groups=groups, weights=weights)
    (twice,) = mean_intervals(
        np.repeat(values, repeated)[:, None], kind="proportion", groups=np.repeat(groups, repeated).tolist()
    )
    assert once == twice


def test_a_sum_adds_the_variances_of_its_parts_on_either_side() -> None:
    parts = [Interval(0.5, 0.4, 0.7, 10, 0.95), Interval(0.8, 0.6, 0.9, 20, 0.95, few=True)]
    total = sum_interval(parts, [1.0, 2.0])
    assert (total.estimate, total.n, total.few) == (pytest.approx(2.1), 30, True)
    assert total.low == pytest.approx(2.1 - np.hypot(0.1, 0.4))
    assert total.high == pytest.approx(2.1 + np.hypot(0.2, 0.2))


def test_columns_are_measured_as_if_each_were_alone() -> None:
    rng = np.random.default_rng(4)
    values, groups = rng.normal(size=(60, 3)), np.repeat(np.arange(20), 3)
    for column, interval in enumerate(mean_intervals(values, kind="real", groups=groups)):
        alone = mean_interval(values[:, column], groups=groups)
        assert (interval.estimate, interval.low, interval.high, interval.n) == pytest.approx(
            (alone.estimate, alone.low, alone.high, 20)
        )
    values[:3, 1] = values[:, 2] = np.nan  # an image without a value, a column without any
    full, fewer, none = mean_intervals(values, kind="real", groups=groups)
    assert full.n == 20
    assert fewer.n == 19
    assert fewer.estimate == pytest.approx(np.nanmean(values[:, 1]))
    assert fewer.low < fewer.estimate < fewer.high
    assert none.n == 0
    assert np.isnan([none.estimate, none.low, none.high]).all()


def test_real_values_have_students_interval_where_they_are_not_skewed() -> None:
    values = np.concatenate([x := np.random.default_rng(2).normal(size=30), -x])
    interval = mean_interval(values, kind="real")
    known = scipy_stats.t.interval(0.95, 59, values.mean(), scipy_stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(known, rel=0.02)
    skewed = mean_interval(np.random.default_rng(2).lognormal(size=60), kind="real")
    assert skewed.high - skewed.estimate > 1.3 * (skewed.estimate - skewed.low)
    for factor in (1e-9, 3.7, 2.0**40):
        scaled = mean_interval(factor * values, kind="real")
        assert (scaled.low / factor, scaled.high / factor) == pytest.approx((interval.low, interval.high))
    assert mean_interval([0.5, 0.7], kind="real", groups=[0, 0]).low == -np.inf


def test_the_kind_is_read_off_the_values_where_it_is_not_told() -> None:
    assert bootstrap_ci([1, 1, 1, 1.0]).high == 1
    assert bootstrap_ci([1, 1, 1, 1.0]).low < 0.6
    assert mean_interval([1, 0, -1, 1.0]) == mean_interval([1, 0, -1, 1.0], kind="difference")
    assert mean_interval([1, 0.5, 0, 1.0]) == mean_interval([1, 0.5, 0, 1.0], kind="real")
    with pytest.raises(DataError, match=r"a proportion has the value 1\.5: expected values from 0 to 1"):
        mean_interval([1.5], kind="proportion")
    with pytest.raises(DataError, match="value 1 is nan"):
        mean_interval([1.0, float("nan")])
    with pytest.raises(DataError, match="2 labels for 3 values"):
        mean_interval([1.0, 0.0, 1.0], groups=["a", "b"])


def test_t_interval_equals_scipy_and_one_seed_says_nothing() -> None:
    values = np.array([0.8, 0.83, 0.79, 0.9, 0.85])
    interval = t_interval(values)
    known = scipy_stats.t.interval(0.95, 4, values.mean(), scipy_stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(known)
    bounded = t_interval(values, bounds=(0, 1))
    assert bounded.high - bounded.low == pytest.approx(known[1] - known[0], rel=0.05)
    near = t_interval([0.79, 0.99, 1.0], bounds=(0, 1))
    assert near.estimate < near.high < 1
    assert 0 < near.low < 0.7
    assert t_interval([0.5]).high == np.inf
    assert t_interval([0.5], bounds=(0, 1)).high == 1
    same = t_interval([1.0, 1.0, 1.0], bounds=(0, 1), trials=100)
    assert same.few
    assert (same.low, same.high) == pytest.approx((1 / (1 + Z2 / 100), 1.0))
    assert t_interval([1.0, 1.0], bounds=(0, 1)).low == 0
    # seeds that agree show no spread: not an interval of width 0, which would leave 0 out
    for equal in ([0.05, 0.05], [0.1 + 0.2, 0.3, 0.3]):
        assert (t_interval(equal).low, t_interval(equal).high) == (-np.inf, np.inf)
        assert t_test(equal) == 1
    assert (t_interval([0.0, 0.0]).low, t_interval([0.0, 0.0]).high) == (0, 0)
    with pytest.raises(DataError, match="non-empty"):
        t_interval([])


def test_the_benchmark_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    coverage.main(["--small", "--real", "--seeds"])
    text = capsys.readouterr().out
    assert "## real" in text
    assert "| family | cells |" in text
    assert "cells in" in text


@pytest.mark.parametrize("images", [8, 20, 60])
def test_images_whose_answers_are_all_equal_have_wilsons_interval_with_students_quantile(images: int) -> None:
    """Answers of one image that are all equal say no more than one, and the spread of images is estimated."""
    right, groups = np.repeat(np.arange(images) % 2, 5), np.repeat(np.arange(images), 5)
    interval = mean_interval(right.astype(float), kind="proportion", groups=groups)
    t = scipy_stats.t.ppf(0.975, images - 1)
    low, high = wilson(np.array([0.5]), np.array([t**2 / images]))
    assert (interval.low, interval.high) == pytest.approx((low[0], high[0]))


def test_no_interval_is_wider_than_that_of_as_many_questions_as_images() -> None:
    """Of 40 images with 5 questions each one answer changes: less is known than of 40 changes in 200, and more than of
    40 questions."""
    groups = [image for image in range(40) for _ in range(5)]
    widths = []
    for changed in range(4):
        values = np.zeros(200)
        values[: 5 * changed : 5] = 1
        interval = mean_interval(values, kind="difference", groups=groups)
        widths.append(interval.high - interval.low)
        assert interval.low <= interval.estimate <= interval.high
        assert interval.few
    assert max(widths) < 0.3
    assert widths[0] < 0.2
    one = np.zeros(40)
    one[0] = 1
    alone = mean_interval(one, kind="difference")
    assert widths[1] <= 1.1 * (alone.high - alone.low)


def test_the_t_test_is_scipys_and_without_spread_there_is_no_evidence() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, 7)
    for than in (0.0, 0.5):
        assert t_test(values, than) == pytest.approx(scipy_stats.ttest_1samp(values, than).pvalue, rel=1e-12)
    assert t_test([0.4, 0.4, 0.4]) == 1.0
    assert t_test([0.4]) == 1.0


@pytest.mark.parametrize("seed", range(6))
def test_the_p_of_a_mean_is_the_level_at_which_its_interval_reaches_zero(seed: int) -> None:
    random = np.random.default_rng(seed)
    changes = random.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=240)
    images, types = np.arange(240) // 6, np.arange(240) % 3
    p = mean_test(changes, kind="difference", groups=list(images), strata=list(types))
    interval = mean_interval(changes, kind="difference", groups=list(images), strata=list(types), level=1 - p)
    assert min(abs(interval.low), abs(interval.high)) < 1e-4
    usual = mean_interval(changes, kind="difference", groups=list(images), strata=list(types))
    assert (p < 0.05) == (usual.low > 0 or usual.high < 0)
    assert mean_test(-changes, kind="difference", groups=list(images), strata=list(types)) == pytest.approx(p)


def test_the_p_of_a_mean_is_students_without_skewness_and_1_without_a_change() -> None:
    values = np.array([-2.0, -1.0, 0.0, 1.0, 2.0] * 20) + 0.2
    expected = scipy_stats.ttest_1samp(values, 0).pvalue
    assert mean_test(values, kind="real") == pytest.approx(expected, rel=0.05)
    assert mean_test(np.zeros(50), kind="difference") == 1
