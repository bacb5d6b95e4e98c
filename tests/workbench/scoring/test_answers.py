"""Scores of answers by question type and for the mean of types, by hand: unequal numbers of questions, and chance
levels that differ within a type."""

from __future__ import annotations

from fractions import Fraction
from statistics import mean

import numpy as np
import pandas as pd
import pytest

from workbench.scoring.tables import accuracy_by_type, change_by_type
from workbench.training_folder import MEAN

QUESTIONS = [  # id, image, type, options, right before, right after in each of two draws, KL of each draw
    ("q0", "i0", "color", 4, True, (True, False), (0.1, 0.3)),
    ("q1", "i0", "color", 2, True, (False, False), (0.5, 0.7)),
    ("q2", "i1", "color", 4, False, (True, True), (0.2, 0.2)),
    ("q3", "i1", "color", 5, True, (True, True), (0.0, 0.1)),
    ("q4", "i2", "color", 2, True, (False, True), (0.9, 1.1)),
    ("q5", "i2", "count", 10, True, (False, False), (2.0, 3.0)),
    ("q6", "i0", "side", 3, False, (False, True), (0.4, 0.0)),
    ("q7", "i3", "side", 2, True, (True, True), (0.3, 0.3)),
]
TYPES = ("color", "count", "side")


def expected(value) -> dict[str, float]:
    """The mean of a value of each question by type, and the mean of these means."""
    means = {name: mean(value(q) for q in QUESTIONS if q[2] == name) for name in TYPES}
    return {name: float(own) for name, own in (means | {MEAN: mean(means.values())}).items()}


CHANCE = expected(lambda q: Fraction(1, q[3]))
BEFORE = expected(lambda q: Fraction(int(q[4])))
AFTER = expected(lambda q: Fraction(sum(q[5]), 2))
KL = expected(lambda q: sum(q[6]) / 2)


def test_accuracy_by_type_by_hand() -> None:
    """The mean of types is the mean of their accuracies, and its chance the mean of their chance levels: .29 here, not
    the .33 of all questions."""
    rows = [{"image_id": q[1], "category": q[2], "chance": 1 / q[3], "correct": q[4]} for q in QUESTIONS]
    table = pd.DataFrame(accuracy_by_type(pd.DataFrame(rows), seed=3)).set_index("category")
    assert list(table.index) == [*TYPES, MEAN]
    assert (table["seed"] == 3).all()
    assert table["accuracy"].to_dict() == pytest.approx(BEFORE)
    assert table["chance"].to_dict() == pytest.approx(CHANCE)
    assert abs(CHANCE[MEAN] - np.mean([1 / q[3] for q in QUESTIONS])) > 0.04
    assert table["n"].to_dict() == {"color": 5, "count": 1, "side": 2, MEAN: 8}
    assert table["n_images"].to_dict() == {"color": 3, "count": 1, "side": 2, MEAN: 4}


def test_changes_by_type_by_hand() -> None:
    """Draws of one question count as one question; every type weighs the same in the mean of types, in accuracy, drop,
    KL and chance."""
    rows = [
        {
            "id": q[0],
            "image_id": q[1],
            "category": q[2],
            "chance": 1 / q[3],
            "correct_before": q[4],
            "correct_after": q[5][draw],
            "kl": q[6][draw],
        }
        for q in QUESTIONS
        for draw in (0, 1)
    ]
    table = pd.DataFrame(change_by_type(pd.DataFrame(rows), seed=3)).set_index("category")
    assert set(table.index) == {*TYPES, MEAN}
    assert (table["seed"] == 3).all()
    for column, wanted in (("chance", CHANCE), ("accuracy_before", BEFORE), ("accuracy_after", AFTER), ("kl", KL)):
        assert table[column].to_dict() == pytest.approx(wanted), column
    assert table["accuracy_drop"].to_dict() == pytest.approx({name: BEFORE[name] - AFTER[name] for name in BEFORE})
    assert table["n"].to_dict() == {"color": 5, "count": 1, "side": 2, MEAN: 8}
    assert table["n_images"].to_dict() == {"color": 3, "count": 1, "side": 2, MEAN: 4}


def test_the_p_of_a_change_is_the_sign_flip_test_of_the_images() -> None:
    """Six images of one question each, five of which lose it: 7 of the 64 flips of five signs and a zero reach as far,
    on either side."""
    rows = [
        {
            "id": str(n),
            "image_id": str(n),
            "category": "a",
            "chance": 0.5,
            "correct_before": True,
            "correct_after": n == 0,
            "kl": 0.0,
        }
        for n in range(6)
    ]
    (row, same) = change_by_type(pd.DataFrame(rows), seed=0)
    assert row["p"] == pytest.approx(2 / 2**5)
    assert same["p"] == row["p"]
    assert row["accuracy_drop"] == pytest.approx(5 / 6)
