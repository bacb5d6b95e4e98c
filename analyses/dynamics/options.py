"""Options of the dynamics analysis, and the names of its scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from workbench.benchmarks.asking import QuestionOptions
from workbench.errors import ConfigError

ACCURACY, CKNNA, DROP = "accuracy", "CKNNA", "drop in accuracy"


@dataclass(frozen=True)
class Config(QuestionOptions):
    """Options of the evaluation of every checkpoint."""

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Vision foundation models (VFMs) that the visual tokens are compared with; own is the model's own encoder."""
    layers: tuple[int, ...] = ()
    """Layers for CKNNA, 0 to L; by default 1, the aligned layer (the middle one without alignment) and the last."""
    k: Annotated[int, Ge(1)] = 10
    """Nearest neighbors in CKNNA."""
    null: Annotated[int, Ge(10)] = 20
    """Permutations for CKNNA's null."""
    permutations: Annotated[int, Ge(1)] = 2
    """Random permutations of each image's tokens; the accuracy drop is averaged over them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vfm:
            raise ConfigError("vfm is empty: expected at least one VFM, as --vfm NAME ...")
