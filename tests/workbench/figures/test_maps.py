"""Figures over images."""

from __future__ import annotations

import numpy as np
import pandas as pd

from workbench.figures.maps import WordMap, word_maps


def test_control_tokens_are_gray_on_objects_too() -> None:
    words = ["red", "blue", "<unk>", "<|im_end|>", "a < b > c", "blue"]
    table = pd.DataFrame({"layer": 1, "token": range(6), "top": 0.0, "bottom": 1.0, "rank": 1, "word": words})
    table = table.assign(left=np.arange(6) / 6, right=np.arange(1, 7) / 6, probability=0.5, right_word=table.index == 0)
    table["truth"] = ["red"] * 5 + [""]
    figure = word_maps([WordMap("x", np.zeros((8, 8, 3), np.uint8), table)])
    yellow, white, *control, other, background = figure.data[-1].textfont.color
    assert control == [background, background]
    assert other == white
    assert len({yellow, white, background}) == 3
