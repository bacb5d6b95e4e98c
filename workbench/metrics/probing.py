"""Linear probes, fitted and scored on different groups (images), and their scores as means over groups.

A score says how well a property can be read linearly from the features, not whether the model uses it.

A score such as balanced accuracy is a ratio of sums, not a mean over images. Each group therefore gets an influence
value: the score plus the group's first-order effect on it. The mean of these values is exactly the score, and
resampling or pairing them gives the score's interval and paired differences (the delta method).
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
# each step of a fit is a small matrix product, which several threads make slower
one_thread = ThreadpoolController().wrap(limits=1, user_api="blas")


def folds_of(groups: Int[np.ndarray, " row"], folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (rows to fit on, rows to score) for each fold; no group is on both sides.

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
    """Return out-of-fold predictions of a multinomial logistic regression for each column of `labels`.

    Features are standardized, and classes are weighted by the inverse of their frequency, on the rows that are fitted.
    The objective is the sum of losses plus l2/2 ||w||^2 (scikit-learn's C = 1 / l2).

    Raises:
        DataError: a fold to fit on has one class only.
    """
    predicted = np.empty_like(labels)
    for fit, score in folds:
        scaler = StandardScaler().fit(x[fit])
        x_fit, x_score = scaler.transform(x[fit]), scaler.transform(x[score])
        for target, target_labels in enumerate(labels.T):
            if len(np.unique(target_labels[fit])) < 2:
                raise DataError(
                    "the images of a fold hold one class only: expected at least 2, so use more images or fewer folds"
                )
            model = LogisticRegression(C=1 / l2, class_weight="balanced", max_iter=ITERATIONS, tol=1e-3).fit(
                x_fit, target_labels[fit]
            )
            predicted[score, target] = model.predict(x_score)
    return predicted


@one_thread
def regress(
    x: Float[np.ndarray, "row d"],
    y: Float[np.ndarray, "row target"],
    folds: list[tuple[np.ndarray, np.ndarray]],
    *,
    l2: float,
) -> Any:
    """Return out-of-fold predictions (row, target) of a ridge regression with penalty l2 ||w||^2.

    Features are standardized on the rows that are fitted.
    """
    predicted = np.empty(y.shape)
    for fit, score in folds:
        probe = make_pipeline(StandardScaler(), Ridge(alpha=l2)).fit(x[fit].astype(np.float64), y[fit])
        predicted[score] = probe.predict(x[score].astype(np.float64)).reshape(len(score), -1)
    return predicted


def balanced_accuracy(
    truth: Shaped[np.ndarray, " row"], predicted: Shaped[np.ndarray, " row"], groups: Int[np.ndarray, " row"]
) -> Float[np.ndarray, " group"]:
    """Compute balanced accuracy, as one influence value per group (0 to G - 1); their mean is the score.

    Balanced accuracy is the mean recall of the classes.
    """
    classes, code = np.unique(truth, return_inverse=True)
    counts = np.bincount(code)
    correct = (truth == predicted).astype(float)
    recall = np.bincount(code, correct) / counts
    n_groups = int(groups.max()) + 1
    effects = (correct - recall[code]) / (counts[code] * len(classes))
    return recall.mean() + n_groups * np.bincount(groups, effects, n_groups)


def r_squared(
    truth: Float[np.ndarray, " row"], predicted: Float[np.ndarray, " row"], groups: Int[np.ndarray, " row"]
) -> Float[np.ndarray, " group"]:
    """Compute R^2, as one influence value per group (0 to G - 1); their mean is the score.

    R^2 is 1 - squared errors / squared deviations from the mean.
    """
    errors, spread = (truth - predicted) ** 2, (truth - truth.mean()) ** 2
    share = errors.sum() / spread.sum()
    n_groups = int(groups.max()) + 1
    return 1 - share - n_groups * np.bincount(groups, errors - share * spread, n_groups) / spread.sum()
