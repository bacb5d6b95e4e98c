"""Linear probes, fitted and scored on different groups (images), and their scores as means over groups.

A score such as balanced accuracy is a ratio of sums, not a mean over images. Each group is therefore given the value of
its influence: the score plus the group's first-order effect on it. These values have the score as their mean, exactly,
and resampling or pairing them gives the score's interval and paired differences (the delta method).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import ThreadpoolController

from workbench.errors import DataError

ITERATIONS = 1000
# a step of a fit is a small product, for which threads cost more than they bring
one_thread = ThreadpoolController().wrap(limits=1, user_api="blas")


def folds_of(groups: Int[np.ndarray, " row"], folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit on and rows to score, `folds` times; no group is on both sides.

    Raises:
        DataError: fewer groups than folds.
    """
    count = len(np.unique(groups))
    if count < folds or folds < 2:
        raise DataError(
            f"{count} images for {folds} folds: expected at least as many images as folds, and 2 folds or more"
        )
    return list(GroupKFold(folds, shuffle=True, random_state=seed).split(groups, groups=groups))


@one_thread
def classify(
    x: Float[np.ndarray, "row d"],
    labels: Int[np.ndarray, "row target"],
    folds: list[tuple[np.ndarray, np.ndarray]],
    *,
    l2: float,
) -> Int[np.ndarray, "row target"]:
    """Out-of-fold predictions of a multinomial logistic regression for each column of `labels`.

    Features are standardised by the fold they are fitted on, classes weighed by the inverse of their frequency there;
    the penalty is l2/2 ||w||^2 beside the sum of losses (scikit-learn's C = 1 / l2).

    Raises:
        DataError: a fold to fit on has one class only.
    """
    predicted = np.empty_like(labels)
    for fit, score in folds:
        scaler = StandardScaler().fit(x[fit])
        seen, new = scaler.transform(x[fit]), scaler.transform(x[score])
        for target, own in enumerate(labels.T):
            if len(np.unique(own[fit])) < 2:
                raise DataError(
                    "the images of a fold hold one class only: expected at least 2, with more images or fewer folds"
                )
            model = LogisticRegression(C=1 / l2, class_weight="balanced", max_iter=ITERATIONS, tol=1e-3).fit(
                seen, own[fit]
            )
            predicted[score, target] = model.predict(new)
    return predicted


@one_thread
def regress(
    x: Float[np.ndarray, "row d"],
    y: Float[np.ndarray, "row target"],
    folds: list[tuple[np.ndarray, np.ndarray]],
    *,
    l2: float,
) -> Any:
    """Out-of-fold predictions (row, target) of a ridge regression with penalty l2 ||w||^2, features standardised by the
    fold they are fitted on."""
    predicted = np.empty(y.shape)
    for fit, score in folds:
        probe = make_pipeline(StandardScaler(), Ridge(alpha=l2)).fit(x[fit].astype(np.float64), y[fit])
        predicted[score] = probe.predict(x[score].astype(np.float64)).reshape(len(score), -1)
    return predicted


def balanced_accuracy(
    truth: Shaped[np.ndarray, " row"], predicted: Shaped[np.ndarray, " row"], groups: Int[np.ndarray, " row"]
) -> Float[np.ndarray, " group"]:
    """Mean recall of the classes, as one value for each group (0 to G - 1) whose mean it is."""
    classes, code = np.unique(truth, return_inverse=True)
    counts = np.bincount(code)
    right = (truth == predicted).astype(float)
    recall = np.bincount(code, right) / counts
    units = int(groups.max()) + 1
    return recall.mean() + units * np.bincount(groups, (right - recall[code]) / (counts[code] * len(classes)), units)


def r_squared(
    truth: Float[np.ndarray, " row"], predicted: Float[np.ndarray, " row"], groups: Int[np.ndarray, " row"]
) -> Float[np.ndarray, " group"]:
    """1 - squared errors / squared deviations from the mean, as one value for each group (0 to G - 1) whose mean it
    is."""
    errors, spread = (truth - predicted) ** 2, (truth - truth.mean()) ** 2
    share = errors.sum() / spread.sum()
    units = int(groups.max()) + 1
    return 1 - share - units * np.bincount(groups, errors - share * spread, units) / spread.sum()
