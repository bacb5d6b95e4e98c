"""Differences of the accuracy drop between models, against drops counted by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.runs import Run
from workbench.scoring.tables import drop_by_image, drop_differences

QUESTIONS = pd.DataFrame(
    {
        "id": ["a", "b", "c", "d", "e"],
        "image_id": ["one", "one", "two", "two", "three"],
        "category": ["color", "color", "count", "color", "color"],
    }
)


def answered(*after: list[int]) -> pd.DataFrame:
    """Every question is right before; `after` says which are right after each random draw of one intervention."""
    draws = [
        QUESTIONS.assign(correct_before=True, correct_after=np.array(right, bool), draw=draw, site="2")
        for draw, right in enumerate(after)
    ]
    return pd.concat(draws, ignore_index=True)


def run(samples: pd.DataFrame, **record: object) -> Run:
    return Run("", {"version": 1, "data_fingerprint": "same", "config": {"block": 2}} | record, {"samples": samples})


def every(samples: pd.DataFrame) -> pd.Series:
    return samples["id"].notna()


def test_the_mean_of_an_images_parts_is_the_mean_of_types() -> None:
    by_image = drop_by_image(answered([0, 1, 0, 1, 1], [0, 0, 1, 1, 1]), ["site"])
    # color: a loses 1, b half, of four; count: c loses half
    assert by_image["value"].mean() == pytest.approx(((1 + 0.5) / 4 + 0.5) / 2)
    assert set(by_image["image_id"]) == {"one", "two", "three"}
    # where every answer of a type is lost alike, no image is worse than another, however many questions it has
    assert drop_by_image(answered([0, 0, 1, 0, 0]), ["site"])["value"].tolist() == pytest.approx([0.5] * 3)


def test_a_difference_is_over_the_questions_that_both_models_were_asked() -> None:
    first, second = answered([0, 1, 0, 1, 1]), answered([1, 1, 0, 0, 0])
    second = second[second["id"] != "a"]  # such as one whose options have the same tokens in this model
    (row,) = drop_differences({"A": run(first), "B": run(second)}, every, by=("site",)).to_dict("records")
    # of b, d, e and c: B loses d and e of three colors, A none; both lose c
    assert row["score"] == pytest.approx((2 / 3) / 2)
    assert (row["model"], row["against"], row["site"], row["n_images"]) == ("B", "A", "2", 3)
    assert row["low"] <= row["score"] <= row["high"]


def test_one_model_or_nothing_shared_has_no_difference() -> None:
    table = answered([0, 1, 0, 1, 1])
    assert drop_differences({"A": run(table)}, every, by=("site",)).empty
    other = table.assign(id=table["id"] + "2")
    assert drop_differences({"A": run(table), "B": run(other)}, every, by=("site",)).empty


@pytest.mark.parametrize("record", [{"version": 2}, {"data_fingerprint": "another"}, {"config": {"block": 4}}])
def test_a_model_that_was_measured_otherwise_has_no_difference(record: dict[str, object]) -> None:
    table = answered([0, 1, 0, 1, 1])
    runs = {"A": run(table), "B": run(table, **record), "C": run(table)}
    assert drop_differences(runs, every, by=("site",))["model"].tolist() == ["C"]
