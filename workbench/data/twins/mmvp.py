"""The twin of MMVP: pairs of scenes of `shapes:test` that differ in one attribute, with one question for both."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np

from workbench.data.mmvp import CORRECTED
from workbench.data.shapes import COLORS, SHAPES
from workbench.data.twins.edits import Edited, edited
from workbench.data.twins.files import save_image, write_csv
from workbench.data.twins.select import NAMES, pairs_of
from workbench.data.twins.wordings import Wording, worded

PAIRS = 22  # of each kind


def write_mmvp(folder: Path, seed: int, wording: Wording) -> None:
    """Write `Questions.csv` and `MMVP Images`."""
    rng, taken = np.random.default_rng([seed, 6]), set[int]()
    combinations = list(product(COLORS, SHAPES))
    some = [" ".join(combinations[i]) for i in rng.permutation(len(combinations))[:PAIRS]]
    wanted = {
        "side_x": Counter((name, "") for name in NAMES * 2),
        "side_y": Counter((name, "") for name in NAMES * 2),
        "relation_x": Counter(pairs_of(rng, NAMES)[:PAIRS]),
        "relation_y": Counter(pairs_of(rng, NAMES)[:PAIRS]),
        "exist": Counter((name, "") for name in some),
        "color": Counter((name, "") for name in SHAPES * 4),
    }
    edits = [edit for kind, names in wanted.items() for edit in edited(seed, kind, names, taken)]
    rows: list[dict[str, object]] = []
    for number in rng.permutation(len(edits)):
        rows += _pair(edits[number], len(rows) + 1, bool(rng.integers(2)), folder / "MMVP Images", wording)
    write_csv(rows, folder / "Questions.csv")


def _pair(edit: Edited, index: int, swap: bool, folder: Path, wording: Wording) -> list[dict[str, object]]:
    """Write the images of a pair, and return its rows, the first of which has the number `index`."""
    options = _options(edit)
    # the loader corrects four labels of MMVP, which must then be right in the twin
    swap = edit.answers[0] == options[0] if index in CORRECTED else swap
    rows: list[dict[str, object]] = []
    for place in (1, 0) if swap else (0, 1):
        save_image(edit.images[place], folder / f"{index + len(rows)}.jpg")
        rows.append(
            {
                "Index": index + len(rows),
                "Question": worded(f"mmvp {edit.kind}", wording, edit.a, edit.b),
                "Options": f"(a) {options[0]} (b) {options[1]}",
                "Correct Answer": "(a)" if edit.answers[place] == options[0] else "(b)",
            }
        )
    return rows


def _options(edit: Edited) -> tuple[str, ...]:
    """Return both answers, in an order that does not depend on which image is the changed one."""
    usual = ("yes", "left", "top", "above", *COLORS)
    return tuple(sorted(edit.answers, key=lambda answer: usual.index(answer) if answer in usual else len(usual)))
