"""Cross-validated fits of one probe and its controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from analyses.linear_probe.options import REGRESSED, Config
from analyses.linear_probe.tasks import Task
from workbench.metrics.probing import balanced_accuracy, classify, folds_of, r_squared, regress
from workbench.stats import mean_interval


def fit_probe(config: Config, task: Task, x: Float[np.ndarray, "row d"]) -> tuple[dict[str, Any], pd.DataFrame]:
    """Fit and score the probes of one target on one representation.

    Returns:
        Score, mean control score and selectivity with their intervals; and a table with the value and control of each
        image.
    """
    is_regression = task.name in REGRESSED
    folds = folds_of(task.groups, config.folds, config.seed)
    if is_regression:
        predicted, score = regress(x, task.labels, folds, l2=config.l2), r_squared
    else:
        predicted, score = classify(x, task.labels, folds, l2=config.l2), balanced_accuracy
    values, *controls = (
        score(labels, predictions, task.groups) for labels, predictions in zip(task.labels.T, predicted.T, strict=True)
    )
    control = np.mean(controls, axis=0)
    selectivity = values - (control if control.mean() > task.chance else task.chance)
    row: dict[str, Any] = {}
    for name, by_image in (("score", values), ("control", control), ("selectivity", selectivity)):
        # without a miss all values are 1 and show no spread: take the interval of a proportion instead
        is_proportion = not is_regression and np.isin(by_image, (0, 1)).all()
        interval = mean_interval(by_image, kind="proportion" if is_proportion else "real")
        prefix = "" if name == "score" else f"{name}_"
        row |= {name: interval.estimate, f"{prefix}low": interval.low, f"{prefix}high": interval.high}
    row |= {
        "chance": task.chance,
        "measure": "R2" if is_regression else "balanced accuracy",
        "n_images": len(values),
        "n": len(x),
        "d": x.shape[1],
        "classes": len(task.classes),
        "folds": config.folds,
        "l2": config.l2,
        "controls": len(controls),
        "seed": config.seed,
    }
    return row, pd.DataFrame({"value": values, "control": control})
