"""Options of the linear probes, and their targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

from annotated_types import Ge, Gt, Le

from workbench.analysis.declaration import DataOptions

Target = Literal["class", "colour", "foreground", "x", "y", "count"]
TARGETS: tuple[Target, ...] = get_args(Target)
REGRESSED = ("x", "y", "count")
ENCODER = "tower"  # the vision encoder in stored tables


@dataclass(frozen=True)
class Config(DataOptions):
    """Options of the linear probes."""

    ADDED: ClassVar[tuple[str, ...]] = ("final_norm",)

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Frozen vision foundation models (VFMs) that are probed as ceilings."""
    layers: tuple[int, ...] = ()
    """Layers of the model, 0 to L; all by default."""
    final_norm: bool = False
    """Read the last layer after the language model's final norm, as transformers' `hidden_states[L]` is; by default
    before it, as the output of its block."""
    targets: tuple[Target, ...] = ()
    """What to predict; by default everything for which the data has labels."""
    tokens_per_image: Annotated[int, Ge(1)] = 16
    """Maximum number of random tokens per image for foreground, x and y; as many on objects for class and colour."""
    cover: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of a token's patch that an object must cover."""
    folds: Annotated[int, Ge(2)] = 5
    """Folds of the cross-validation over images."""
    l2: Annotated[float, Gt(0)] = 10.0
    """Penalty of the probes: l2 / 2 |w|^2 is added to the summed log-loss, l2 |w|^2 to the squared errors."""
    controls: Annotated[int, Ge(1)] = 3
    """Random labelings over which the control score is averaged."""
