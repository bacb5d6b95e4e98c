"""Options of the alignment analysis, and what a model is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from workbench.analysis.declaration import DataOptions
from workbench.errors import ConfigError
from workbench.metrics import METRICS
from workbench.vfm import OWN, vfm_label


@dataclass(frozen=True)
class Config(DataOptions):
    """What to compare the visual tokens with, and how."""

    ADDED: ClassVar[tuple[str, ...]] = ("by", "final_norm")

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Vision foundation models to compare with; own is the model's own vision encoder, as its projector receives it."""
    vfm_layers: tuple[int, ...] = ()
    """Layers of each VFM, 1 to its depth; by default its own output."""
    layers: tuple[int, ...] = ()
    """Layers of the model, 0 to L; all by default."""
    final_norm: bool = False
    """Read the last layer after the language model's final norm, as transformers' `hidden_states[L]` is; by default
    before it, as the output of its block."""
    metric: Literal["cknna", "cka", "mutual_knn", "svcca", "rsa"] = "cknna"
    """Metric of alignment."""
    k: Annotated[int, Ge(1)] = 10
    """Nearest neighbors, for cknna and mutual_knn."""
    dim: Annotated[int, Ge(1)] = 10
    """Principal components, for svcca."""
    pooling: Literal["within", "tokens", "pooled"] = "within"
    """within: tokens of one image, mean over images; tokens: sampled tokens of all images; pooled: one mean token per
    image."""
    by: Literal["grid", "tile"] = "grid"
    """What of an image is compared by itself: each patch grid, or each tile of models that join tiles to one grid."""
    tokens_per_image: Annotated[int, Ge(1)] = 16
    """Tokens sampled from each image, with pooling `tokens`."""
    null: Annotated[int, Ge(10)] = 100
    """Permutations for the null."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vfm:
            raise ConfigError("no VFM given: name at least one with --vfm NAME ...")
        if OWN in self.vfm and self.vfm_layers:
            raise ConfigError(
                f"vfm_layers is {', '.join(map(str, self.vfm_layers))} with vfm own, the encoder's features as the"
                " projector receives them: expected no vfm_layers, or VFMs alone"
            )

    @property
    def option(self) -> int:
        """Value of the metric's option (`k` or `dim`), 0 where it has none."""
        name = METRICS.get(self.metric).option
        return int(getattr(self, name)) if name else 0


@dataclass(frozen=True)
class Target:
    """What the model is compared with: a VFM's output (`layer` None), one of its layers, or the model's own encoder."""

    vfm: str
    layer: int | None

    @property
    def label(self) -> str:
        return vfm_label(self.vfm) if self.layer is None else f"{self.vfm} L{self.layer}"
