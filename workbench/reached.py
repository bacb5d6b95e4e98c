"""When a curve of training first reaches a level, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from workbench.errors import DataError
from workbench.intervals import finite


@dataclass(frozen=True)
class Reached:
    """The step at which a curve first reaches a level, None if that is not known, and the same in words."""

    step: float | None
    text: str


def first_reached(steps: Sequence[float] | np.ndarray, scores: Sequence[float] | np.ndarray, level: float) -> Reached:
    """Return the first step at which a curve is at or above `level`, interpolated linearly between evaluations.

    A curve that is above the level at its first evaluation reached it at an unknown earlier step, unless that
    evaluation is at step 0.

    Raises:
        DataError: no evaluations, not one score per step, steps that do not increase, or a value that is not finite.
    """
    x, y = finite(steps), finite(scores)
    if len(x) != len(y) or (np.diff(x) <= 0).any():
        raise DataError(
            f"{len(y)} scores at steps {', '.join(f'{step:g}' for step in x)}: expected increasing steps with one score"
            " for each"
        )
    step, first, last = float(steps_reached(x, y[None], np.array([level]))[0]), float(x[0]), float(x[-1])
    if step == np.inf:
        return Reached(None, f"not within {last:g} steps")
    if y[0] >= level:
        unknown = Reached(None, f"before the first evaluation at step {first:g}")
        return Reached(0.0, "at the start") if first == 0 else unknown
    return Reached(step, f"step {step:.0f}")


def steps_reached(
    steps: Float[np.ndarray, " step"], curves: Float[np.ndarray, "curve step"], levels: Float[np.ndarray, " curve"]
) -> Float[np.ndarray, " curve"]:
    """Return the first step at which each curve is at or above its level, interpolated linearly between evaluations.

    A curve that never is has infinity; one that is at its first evaluation has the step of this evaluation.
    """
    above = curves >= levels[:, None]
    at, rows = above.argmax(axis=1), np.arange(len(curves))
    before = np.maximum(at - 1, 0)
    start, end = curves[rows, before], curves[rows, at]
    with np.errstate(invalid="ignore", divide="ignore"):
        between = steps[before] + (levels - start) / (end - start) * (steps[at] - steps[before])
    return np.where(above.any(axis=1), np.where(at == 0, steps[0], between), np.inf)
