"""Intervals cover, tests keep their level, and units are images rather than rows."""

from dataclasses import astuple
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from workbench.errors import DataError
from workbench.paired import values_by_unit
from workbench.stats import (
    half_splits,
    holm,
    jackknife_ci,
    null_of,
    paired_columns,
    paired_differences,
    paired_test,
    sign_flip,
    split_half_ci,
    split_half_test,
)


def test_jackknife_equals_the_classical_error_of_a_mean() -> None:
    values = np.random.default_rng(2).normal(size=60)
    left_out = [np.delete(values, i).mean() for i in range(60)]
    interval = jackknife_ci(values.mean(), left_out, 60)
    assert (interval.low, interval.high) == pytest.approx(
        scipy_stats.t.interval(0.95, 59, values.mean(), scipy_stats.sem(values))
    )


def test_halves_give_the_error_of_a_mean() -> None:
    """Of a mean the squared difference of halves is, over all splits, four times its variance."""
    values = np.random.default_rng(5).normal(size=40)
    splits = half_splits(40, splits=4000)
    gaps = np.array([values[split == 1].mean() - values[split == 0].mean() for split in splits])
    assert ((splits == 1).sum(axis=1) == 20).all()
    assert ((half_splits(41) == 1).sum(axis=1) == (half_splits(41) == 0).sum(axis=1)).all()
    test = split_half_test(values.mean(), gaps, 40)
    known = scipy_stats.ttest_1samp(values, 0)
    assert test.p == pytest.approx(known.pvalue, abs=0.02)
    assert (test.low, test.high) == pytest.approx(tuple(known.confidence_interval()), abs=0.02)
    interval = split_half_ci(values.mean(), gaps, 40)
    assert (interval.low, interval.high, interval.few) == (test.low, test.high, False)
    assert split_half_ci(0.5, gaps, 9).few
    same = split_half_test(0.0, np.zeros(10), 40)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert split_half_test(0.1, np.zeros(10), 40).p == 1
    assert split_half_test(0.1, np.zeros(10), 40).high == np.inf


@pytest.mark.parametrize("pairs", [6, 50])
def test_columns_are_tested_as_if_each_were_alone(pairs: int) -> None:
    a, b = np.random.default_rng(6).normal(size=(2, pairs, 3)) + np.array([[[0]], [[0.3]]])
    alone = [paired_test(x, y) for x, y in zip(a.T, b.T, strict=True)]
    assert np.array([astuple(test) for test in paired_columns(b - a)]) == pytest.approx(
        np.array([astuple(test) for test in alone])
    )


def test_paired_test_keeps_its_level_and_finds_a_shift() -> None:
    rng = np.random.default_rng(3)
    p = np.array([paired_test(*rng.normal(size=(2, 8))).p for _ in range(400)])
    assert (p <= 0.05).mean() <= 0.08
    a = rng.normal(size=200)
    shifted = paired_test(a, a + 0.3 + 0.5 * rng.normal(size=200))
    assert shifted.p < 0.001
    assert shifted.low > 0.1
    assert shifted.high < 0.5
    five = paired_test([0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.3, 0.4, 0.5, 0.6])
    assert five.p == pytest.approx(2 / 32)
    assert five.difference == pytest.approx(0.1)
    assert paired_test([1.0, 2.0], [1.0, 2.0]).p == 1


def test_holm_equals_the_textbook_and_keeps_its_level() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == pytest.approx([1, 1])
    assert holm([0.02]) == pytest.approx([0.02])
    rng = np.random.default_rng(5)
    p = rng.uniform(size=(2000, 24))
    assert np.mean([(holm(row) <= 0.05).any() for row in p]) == pytest.approx(0.05, abs=0.015)
    assert (p.min(axis=1) <= 0.05).mean() > 0.6  # without it, most families of 24 tests find something in noise
    with pytest.raises(DataError, match=r"p is 1\.2: expected 0 to 1"):
        holm([0.1, 1.2])


def closed(p: list[float]) -> list[float]:
    """Holm's correction from its origin, closed testing: the largest Bonferroni p of the sets of hypotheses that hold
    each one (Marcus et al. 1976)."""
    sets = [chosen for size in range(1, len(p) + 1) for chosen in combinations(range(len(p)), size)]
    return [
        max(min(1.0, len(chosen) * min(p[i] for i in chosen)) for chosen in sets if one in chosen)
        for one in range(len(p))
    ]


@pytest.mark.parametrize("within", [("target",), ()])
def test_differences_between_models_are_corrected_within_their_question(within: tuple[str, ...]) -> None:
    """Each model minus the first, over the images that both have; Holm over the layers of a target, or over all rows of
    a model."""
    rng = np.random.default_rng(7)
    keys = [(target, layer, str(image)) for target in "ab" for layer in range(4) for image in range(9)]
    tables = {}
    for number, name in enumerate(("first", "second", "third")):
        values = rng.normal(size=len(keys)) + np.array([number * 0.6 * layer for _, layer, _ in keys])
        table = pd.DataFrame(keys, columns=["target", "layer", "image_id"]).assign(value=values)
        # one image is missing in each, rows in any order
        tables[name] = table[table["image_id"] != str(number)].sample(frac=1, random_state=number)
    found = paired_differences(tables, by=("target", "layer"), within=within)
    assert len(found) == 16
    assert set(found["model"]) == {"second", "third"}
    assert (found["against"] == "first").all()
    assert (found["n_images"] == 7).all()
    for row in found.to_dict("records"):
        first, other = (
            tables[name].set_index(["target", "layer"]).loc[(row["target"], row["layer"])]
            for name in ("first", row["model"])
        )
        differences = (other.set_index("image_id")["value"] - first.set_index("image_id")["value"]).dropna()
        known = scipy_stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert row["score"] == pytest.approx(differences.mean())
        assert row["p"] == pytest.approx(known.pvalue)
    for _, family in found.groupby(["model", *within]):
        assert len(family) == (4 if within else 8)
        assert family["p_holm"].tolist() == pytest.approx(closed(family["p"].tolist()))
    assert (found["p_holm"] > found["p"]).sum() > 8


def test_many_tests_at_once_can_still_be_significant() -> None:
    """1024 heads: with 10,000 sign flips alone the smallest p would be .0001, and Holm's .1."""
    images, heads = np.arange(24).astype(str), range(1024)
    noise = np.random.default_rng(0).normal(size=(len(heads), len(images)))
    keys = pd.MultiIndex.from_product([heads, images], names=["head", "image_id"])
    tables = {
        name: pd.DataFrame({"value": (shift + scale * noise).ravel()}, index=keys).reset_index()
        for name, shift, scale in (("first", 0.0, 0.0), ("second", 0.3, 0.01))
    }
    found = paired_differences(tables, by=("head",))
    assert found["p_holm"].max() < 0.05
    small = {name: table[table["head"] < 3] for name, table in tables.items()}
    few = paired_differences(small, by=("head",))
    for row in few.to_dict("records"):  # of a few tests each is as if it were alone
        values = [table.loc[table["head"] == row["head"], "value"] for table in small.values()]
        alone = paired_test(*values)
        assert row["p"] == alone.p
        assert [row["score"], row["low"], row["high"]] == pytest.approx([alone.difference, alone.low, alone.high])


def test_a_unit_with_two_values_is_not_paired_with_itself() -> None:
    table = pd.DataFrame({"layer": 1, "image_id": ["a", "a", "b"], "value": [0.0, 0.0, 2.0]})
    assert paired_differences({"one": table, "two": table}, by=("layer",))["n_images"].item() == 2
    table["value"] = [0.0, 1.0, 2.0]
    with pytest.raises(DataError, match="layer 1, image_id a has two different values: expected one"):
        paired_differences({"one": table, "two": table}, by=("layer",))


def test_rows_without_a_layer_are_no_layer() -> None:
    one = pd.DataFrame({"layer": [1, np.nan, 2] * 2, "image_id": list("aaabbb"), "value": 0.0})
    found = paired_differences({"one": one, "two": one.assign(value=[1, 5, 2, 1, 5, 2])}, by=("layer",))
    assert found[["layer", "score"]].to_numpy().tolist() == [[1, 1], [2, 2]]


@pytest.mark.parametrize("pairs", [5, 11, 40])
@pytest.mark.parametrize("factor", [1e-300, 1e-9, 2.0**-30, 3.7, 2000.0, 1e6, 2.0**70, 1e300])
def test_the_sign_flip_test_has_no_unit(pairs: int, factor: float) -> None:
    """Eleven positive differences of norms near 2000 have p = 2 / 2^11, and so have they in any other unit; both by all
    flips and by random ones."""
    rng = np.random.default_rng(pairs)
    positive, mixed = 0.1 + rng.random(pairs), rng.normal(size=pairs)
    tied = np.round(mixed, 1)  # sums that many flips reach exactly, up to rounding
    p = sign_flip(np.stack([positive, mixed, tied], axis=1))
    assert p[0] == pytest.approx(2 / 2**pairs if pairs <= 13 else 1 / 10_001)
    assert sign_flip(factor * np.stack([positive, mixed, tied], axis=1)) == pytest.approx(p, abs=0)
    assert paired_test(np.zeros(pairs), factor * positive).p == p[0]


def test_the_sign_flip_test_counts_ties_that_rounding_hides() -> None:
    """0.1 + 0.2 + 0.3 has sums that are equal in decimals and not in float64."""
    differences = np.array([0.1, 0.2, 0.3, 0.3, 0.6, 0.7])
    tenths = np.array([1, 2, 3, 3, 6, 7])
    for signs in (np.array([1, 1, -1, 1, -1, 1]), np.array([1, -1, 1, -1, 1, 1])):
        flips = 1 - 2 * ((np.arange(64)[:, None] >> np.arange(6)) & 1)
        exact = np.mean(np.abs(flips @ (signs * tenths)) >= abs((signs * tenths).sum()))
        for factor in (1, 1e-9, 1e6, 3.7):
            assert sign_flip((factor * signs * differences)[:, None])[0] == exact
    assert (sign_flip(np.zeros((11, 2))) == 1).all()
    assert (sign_flip(np.zeros((40, 1))) == 1).all()
    assert sign_flip(np.float32([[1e-20], [2e-20], [3e-20]]))[0] == 0.25


def test_a_null_that_equals_the_value_up_to_rounding_counts() -> None:
    value = 0.1 + 0.2
    assert null_of(value, [0.3, 0.1, 0.1]).p == null_of(0.3, [value, 0.1, 0.1]).p == 2 / 4
    assert null_of(1e-9 * value, 1e-9 * np.array([0.3, 0.1])).p == 2 / 3
    assert null_of(-value, [-0.3, -0.4]).p == 2 / 3
    assert null_of(0.0, [0.0, -0.1]).p == 2 / 3
    assert null_of(0.3001, [0.3, 0.1]).p == 1 / 3


def test_null_counts_itself() -> None:
    null = null_of(5.0, np.arange(9))
    assert null.p == pytest.approx((1 + 4) / 10)
    assert null.mean == 4


def test_bad_values_are_named() -> None:
    with pytest.raises(DataError, match="value 1 is nan"):
        paired_test([1.0, 2.0], [1.0, float("nan")])
    with pytest.raises(DataError, match="column 1 has a difference that is nan: expected finite numbers"):
        paired_columns(np.array([[1.0, 2.0], [1.0, np.nan], [1.5, 2.0]]))
    with pytest.raises(DataError, match="2 values against 3: expected pairs"):
        paired_test([1, 2], [1, 2, 3])


def test_the_mean_of_units_is_the_mean_of_rows() -> None:
    rng = np.random.default_rng(0)
    values, units = rng.random((40, 2)), [f"u{n % 7 if n < 30 else 0}" for n in range(40)]
    values[4, 0] = np.nan
    values[[n for n, unit in enumerate(units) if unit == "u3"], 1] = np.nan
    table = values_by_unit(values, units)
    assert list(table.index) == [f"u{n}" for n in range(7)]
    assert table.mean().tolist() == pytest.approx(np.nanmean(values, 0))
    assert table.isna().to_numpy().nonzero()[0].tolist() == [3]
    rows = rng.random((6, 3))
    assert np.allclose(values_by_unit(rows, ["a", "b", "c"] * 2), (rows[:3] + rows[3:]) / 2)
