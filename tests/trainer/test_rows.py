"""The rows of a run that is resumed: repaired or left out, but not others and not in another order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.setups.rows import Rows
from workbench.data import load_data
from workbench.data.base import Conversation
from workbench.data.conversations import mixed
from workbench.errors import RunError


def rows_of(words: list[str]) -> Rows:
    return Rows.of([Conversation(str(n), (("q", word),), ()) for n, word in enumerate(words)])


def test_rows_in_another_order_are_refused() -> None:
    """As a fraction of a data set is drawn anew when a row is left out: the same number of rows, but other ones."""
    stored = rows_of(list("abcdef"))
    assert rows_of(list("abXdef")).match_stored(stored, "data") == (list(range(6)), 0)  # one repaired
    assert rows_of(list("abcef")).match_stored(stored, "data")[1] == 1
    with pytest.raises(RunError, match="row 3 of the 6 conversations now in data is another one of those"):
        rows_of(list("abdefg")).match_stored(stored, "data")


def test_equal_rows_stay_where_they_are() -> None:
    stored = rows_of(list("aabb"))
    assert rows_of(list("aabb")).match_stored(stored, "data") == ([0, 1, 2, 3], 0)
    assert rows_of(list("aXbb")).match_stored(stored, "data") == ([0, 1, 2, 3], 0)


def test_half_of_a_data_set_is_another_half_without_a_row(tmp_path: Path) -> None:
    turns = [[{"from": "human", "value": f"what is {n} ?"}, {"from": "gpt", "value": "two"}] for n in range(40)]
    (tmp_path / "mix.json").write_text(json.dumps([{"id": n, "conversations": own} for n, own in enumerate(turns)]))

    def half(drop: str) -> Rows:
        return Rows.of(mixed([load_data(f"llava_json:{tmp_path / 'mix.json'}{drop}")], [0.5], 0).conversations)

    with pytest.raises(RunError, match="under a weight that is no whole number, repair it"):
        half("?drop=17").match_stored(half(""), "data")
