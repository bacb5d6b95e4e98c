"""Intervals cover, tests keep their level, and units are images rather than rows."""

from dataclasses import astuple
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from workbench.errors import DataError
from workbench.stats import (
    bootstrap_ci,
    bootstrap_columns,
    holm,
    jackknife_ci,
    jackknife_test,
    null_of,
    paired_columns,
    paired_differences,
    paired_test,
    t_interval,
)


def test_bootstrap_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    intervals = [bootstrap_ci(rng.normal(3, 2, 80), n=400, seed=i) for i in range(300)]
    assert 0.91 <= np.mean([i.low <= 3 <= i.high for i in intervals]) <= 0.98


def test_bootstrap_resamples_images_not_rows() -> None:
    rng = np.random.default_rng(1)
    by_image = rng.normal(size=40)
    repeated = bootstrap_ci(np.repeat(by_image, 10), groups=np.repeat(np.arange(40), 10))
    single = bootstrap_ci(by_image)
    assert (repeated.low, repeated.high, repeated.n) == pytest.approx((single.low, single.high, 40))
    naive = bootstrap_ci(np.repeat(by_image, 10))
    assert naive.high - naive.low < 0.5 * (repeated.high - repeated.low)


def test_jackknife_equals_the_classical_error_of_a_mean() -> None:
    values = np.random.default_rng(2).normal(size=60)
    left_out = [np.delete(values, i).mean() for i in range(60)]
    interval = jackknife_ci(values.mean(), left_out, 60)
    assert (interval.low, interval.high) == pytest.approx(scipy_stats.t.interval(0.95, 59, values.mean(), scipy_stats.sem(values)))


def test_a_jackknifed_difference_of_means_is_the_paired_t_test() -> None:
    a, b = np.random.default_rng(5).normal(size=(2, 40)) + np.array([[0], [0.4]])
    left_out = [np.delete(b - a, i).mean() for i in range(40)]
    test, known = jackknife_test((b - a).mean(), left_out, 40), scipy_stats.ttest_rel(b, a)
    assert test.p == pytest.approx(known.pvalue) and (test.low, test.high) == pytest.approx(tuple(known.confidence_interval()))
    same = jackknife_test(0.0, np.zeros(10), 40)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


@pytest.mark.parametrize("pairs", [6, 50])
def test_columns_are_tested_as_if_each_were_alone(pairs: int) -> None:
    a, b = np.random.default_rng(6).normal(size=(2, pairs, 3)) + np.array([[[0]], [[0.3]]])
    alone = [paired_test(x, y) for x, y in zip(a.T, b.T, strict=True)]
    assert np.array([astuple(test) for test in paired_columns(b - a)]) == pytest.approx(np.array([astuple(test) for test in alone]))


def test_t_interval_equals_scipy_and_one_seed_says_nothing() -> None:
    values = np.array([0.8, 0.83, 0.79, 0.9, 0.85])
    interval = t_interval(values)
    assert (interval.low, interval.high) == pytest.approx(scipy_stats.t.interval(0.95, 4, values.mean(), scipy_stats.sem(values)))
    cut = t_interval([0.79, 0.99, 1.0], bounds=(0, 1))
    assert cut.high == 1 and cut.low == t_interval([0.79, 0.99, 1.0]).low > 0
    assert t_interval([0.5]).high == np.inf and bootstrap_ci([0.5, 0.7], groups=[0, 0]).low == -np.inf


def test_paired_test_keeps_its_level_and_finds_a_shift() -> None:
    rng = np.random.default_rng(3)
    p = np.array([paired_test(*rng.normal(size=(2, 8))).p for _ in range(400)])
    assert (p <= 0.05).mean() <= 0.08
    a = rng.normal(size=200)
    shifted = paired_test(a, a + 0.3 + 0.5 * rng.normal(size=200))
    assert shifted.p < 0.001 and shifted.low > 0.1 and shifted.high < 0.5
    five = paired_test([0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.3, 0.4, 0.5, 0.6])
    assert five.p == pytest.approx(2 / 32) and five.difference == pytest.approx(0.1)
    assert paired_test([1.0, 2.0], [1.0, 2.0]).p == 1


def test_columns_are_bootstrapped_as_if_each_were_alone() -> None:
    rng = np.random.default_rng(4)
    values, groups = rng.normal(size=(60, 3)), np.repeat(np.arange(20), 3)
    for column, interval in enumerate(bootstrap_columns(values, groups=groups)):
        alone = bootstrap_ci(values[:, column], groups=groups)
        assert (interval.estimate, interval.low, interval.high, interval.n) == pytest.approx((alone.estimate, alone.low, alone.high, 20))
    values[:3, 1] = values[:, 2] = np.nan  # an image without a value, a column without any
    full, fewer, none = bootstrap_columns(values, groups=groups)
    assert full.n == 20 and fewer.n == 19 and fewer.estimate == pytest.approx(np.nanmean(values[:, 1])) and fewer.low < fewer.estimate < fewer.high
    assert none.n == 0 and np.isnan([none.estimate, none.low, none.high]).all()


def test_holm_equals_the_textbook_and_keeps_its_level() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == pytest.approx([1, 1]) and holm([0.02]) == pytest.approx([0.02])
    rng = np.random.default_rng(5)
    p = rng.uniform(size=(2000, 24))
    assert np.mean([(holm(row) <= 0.05).any() for row in p]) == pytest.approx(0.05, abs=0.015)
    assert (p.min(axis=1) <= 0.05).mean() > 0.6  # without it, most families of 24 tests find something in noise
    with pytest.raises(DataError, match=r"p is 1\.2: expected 0 to 1"):
        holm([0.1, 1.2])


def closed(p: list[float]) -> list[float]:
    """Holm's correction from its origin, closed testing: the largest Bonferroni p of the sets of hypotheses that hold each one (Marcus et al. 1976)."""
    sets = [chosen for size in range(1, len(p) + 1) for chosen in combinations(range(len(p)), size)]
    return [max(min(1.0, len(chosen) * min(p[i] for i in chosen)) for chosen in sets if one in chosen) for one in range(len(p))]


@pytest.mark.parametrize("within", [("target",), ()])
def test_differences_between_models_are_corrected_within_their_question(within: tuple[str, ...]) -> None:
    """Each model minus the first, over the images that both have; Holm over the layers of a target, or over all rows of a model."""
    rng = np.random.default_rng(7)
    keys = [(target, layer, str(image)) for target in "ab" for layer in range(4) for image in range(9)]
    tables = {}
    for number, name in enumerate(("first", "second", "third")):
        values = rng.normal(size=len(keys)) + np.array([number * 0.6 * layer for _, layer, _ in keys])
        table = pd.DataFrame(keys, columns=["target", "layer", "image_id"]).assign(value=values)
        tables[name] = table[table["image_id"] != str(number)].sample(frac=1, random_state=number)  # one image is missing in each, rows in any order
    found = paired_differences(tables, by=("target", "layer"), within=within)
    assert len(found) == 16 and set(found["model"]) == {"second", "third"} and (found["against"] == "first").all() and (found["n_images"] == 7).all()
    for row in found.to_dict("records"):
        first, other = (tables[name].set_index(["target", "layer"]).loc[(row["target"], row["layer"])] for name in ("first", row["model"]))
        differences = (other.set_index("image_id")["value"] - first.set_index("image_id")["value"]).dropna()
        known = scipy_stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert row["score"] == pytest.approx(differences.mean()) and row["p"] == pytest.approx(known.pvalue)
    for _, family in found.groupby(["model", *within]):
        assert len(family) == (4 if within else 8) and family["p_holm"].tolist() == pytest.approx(closed(family["p"].tolist()))
    assert (found["p_holm"] > found["p"]).sum() > 8


def test_null_counts_itself() -> None:
    null = null_of(5.0, np.arange(9))
    assert null.p == pytest.approx((1 + 4) / 10) and null.mean == 4


def test_bad_values_are_named() -> None:
    with pytest.raises(DataError, match="value 1 is not finite"):
        bootstrap_ci([1.0, float("nan")])
    with pytest.raises(DataError, match="non-empty"):
        t_interval([])
    with pytest.raises(DataError, match="2 values against 3: expected pairs"):
        paired_test([1, 2], [1, 2, 3])
