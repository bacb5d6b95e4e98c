"""What charts of a comparison say about themselves."""

from __future__ import annotations

import pandas as pd

from workbench.overview.charts import lines_words


def test_a_variant_whose_seeds_have_no_layer_in_common_is_named() -> None:
    curves = pd.DataFrame(
        {"name": ["a0", "a1", "b0", "b1"], "group": ["a", "a", "b", "b"], "at": [1, 1, 1, 2], "score": 0.5}
    ).assign(chance=float("nan"))
    assert lines_words(curves, zero=True) == (
        "thick: mean over seeds, thin: each seed; no mean of b: no layer is measured for all seeds",
        "no effect",
    )
    assert lines_words(curves.drop(columns="group"), zero=False) == ("95 % intervals", "")
