"""The section `alignment` of a recipe: the alignment loss, its targets and its controls.

The text below a field is what `python -m trainer --help` and the documentation show for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from workbench.errors import ConfigError, listed
from workbench.options import check_options


@dataclass(frozen=True)
class SelectionConfig:
    """How the attention heads that `alignment.where: heads` aligns are chosen, before the first step.

    Candidates are all attention heads of the layers of `alignment.layer`. Those with the lowest mutual kNN with the VFM
    are aligned.
    """

    heads: Annotated[int, Ge(1)] = 4
    """Number of attention heads that are aligned."""
    k: Annotated[int, Ge(1)] = 10
    """Number of nearest neighbors of the mutual kNN."""
    images: Annotated[int, Ge(1)] = 32
    """Number of training images, the first ones, on which it is measured."""

    def __post_init__(self) -> None:
        check_options(self, "alignment.selection.")


@dataclass(frozen=True)
class AlignmentConfig:
    """The alignment loss L_VRA on the visual tokens inside the language model.

    Variants and equations: docs/concepts/alignment_loss.md.
    """

    objective: Literal["none", "cosine", "relation", "predict"] = "none"
    """`none` is the baseline without alignment, `cosine` the similarity of tokens and targets, `relation` the agreement
    of the similarities among the tokens of an image with those among its targets, `predict` the squared error of
    predicting the normalized targets from the tokens."""
    weight: Annotated[float, Ge(0)] = 0.5
    """lambda in L = L_LM + lambda * L_VRA."""
    layer: Annotated[tuple[int, ...], Ge(1)] = (3,)
    """Aligned layers of the language model, from 1 to its last; layer l is the output of block l."""
    heads: Literal["each", "shared", "none"] = "each"
    """`each` layer has its own alignment head, one head is `shared` by all layers, or (`relation` only) `none` compares
    the visual tokens without a head."""
    where: Literal["output", "attention", "heads"] = "output"
    """Which states of a layer are aligned: its `output`, the concatenated outputs of its `attention` heads (the input
    of o_proj), or the outputs of those single `heads` that `selection` chooses."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    mask: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the visual tokens of each image that the language model does not see during training: each is replaced
    by the mean of the visible ones, and the loss is a mean over these hidden tokens alone."""
    target: Literal["vfm", "encoder", "projector"] = "vfm"
    """What the visual tokens are aligned with: features of the frozen `vfm`, or the input (`encoder`) or output
    (`projector`) of the model's own projector, without gradient."""
    vfm: tuple[str, ...] = ("efficientnet-lite0",)
    """One or more VFMs: names that `python -m workbench.vfm` lists, hf:ID, timm:NAME, or folders. Each has its own
    heads, and L_VRA is the mean over them."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of lambda after the warm-up: it stays at `weight`, or approaches `final_weight`, which it reaches at the
    last step."""
    final_weight: Annotated[float | None, Ge(0)] = None
    """lambda at the last step of a `linear` or `cosine` schedule; by default 0."""
    warmup: Annotated[int, Ge(0)] = 0
    """Steps in which lambda rises to `weight`."""
    teacher_norm: Literal["own", "student"] = "own"
    """Normalization of the VFM's pixels: its `own`, or always CLIP's (`student`), as in the official code of the
    paper."""
    final_norm: bool = False
    """Read the last layer after the final norm of the language model, as the official code does, instead of before it;
    other layers do not change."""
    hidden: Annotated[int, Ge(1)] = 256
    """Width of the two hidden layers of an alignment head."""
    images: Literal["same", "others"] = "same"
    """`others` is a control: the targets of an image are the features of another training image, the same one at every
    step."""
    center: bool = False
    """Subtract the mean feature vector of the training set from the targets, so that a constant prediction gains
    nothing."""
    residual: Literal["none", "encoder", "projector"] = "none"
    """Add image features again to the visual tokens after each layer of `layer`: the projector's input through a small
    trained adapter (`encoder`), or its output (`projector`)."""

    def __post_init__(self) -> None:
        for name, values in (("layer", self.layer), ("vfm", self.vfm)):
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"alignment.{name} is {listed(values)}: expected one or more, none of them twice")
        check_options(self, "alignment.")
        if self.objective in ("cosine", "predict") and self.heads == "none":
            raise ConfigError(
                f"alignment.heads is none: expected each or shared for the {self.objective} objective, since tokens and"
                " targets have different widths"
            )
        self._check_selection()
        self._check_mask()
        if self.final_norm and (self.where != "output" or not self.aligned):
            raise ConfigError(
                f"alignment.final_norm is yes with alignment.objective {self.objective} and alignment.where"
                f" {self.where}: expected an aligned output of the last layer, or alignment.final_norm no"
            )
        if self.schedule == "constant" and self.final_weight is not None:
            raise ConfigError(
                f"alignment.final_weight is {self.final_weight}, but the schedule is constant: leave it out, or set"
                " alignment.schedule to linear or cosine"
            )
        if self.target == "projector" and (self.center or self.images == "others"):
            raise ConfigError(
                "alignment.target is projector, whose output changes during training: expected alignment.center no and"
                " alignment.images same"
            )

    def _check_selection(self) -> None:
        if not self.chooses_heads and self.selection != SelectionConfig():
            why = f"alignment.where is {self.where}" if self.aligned else "alignment.objective is none"
            raise ConfigError(
                f"alignment.selection is changed, but {why}: expected an alignment loss on single heads"
                " (alignment.where heads), or no alignment.selection"
            )
        if self.where == "heads" and self.target != "vfm":
            raise ConfigError(
                f"alignment.where is heads with alignment.target {self.target}: expected target vfm, since heads are"
                " chosen by their alignment with the VFM"
            )

    def _check_mask(self) -> None:
        if not self.mask:
            return
        if self.objective not in ("cosine", "predict"):
            raise ConfigError(
                f"alignment.mask is {self.mask} with alignment.objective {self.objective}: expected predict or cosine,"
                " whose loss is a mean over tokens"
            )
        for key, value in (("target", self.target), ("residual", self.residual)):
            if value == "projector" or (key, value) == ("residual", "encoder"):
                why = "would be the replaced token" if key == "target" else "would show the hidden tokens"
                raise ConfigError(
                    f"alignment.mask is {self.mask} with alignment.{key} {value}, which {why}: expected another"
                    f" alignment.{key}, or no mask"
                )

    @property
    def aligned(self) -> bool:
        """Whether there is an alignment loss."""
        return self.objective != "none"

    @property
    def chooses_heads(self) -> bool:
        """Whether single attention heads are aligned, which are chosen before the first step."""
        return self.aligned and self.where == "heads"

    @property
    def reads_encoder(self) -> bool:
        """Whether the projector's input is needed, as a target or as a residual."""
        return self.residual == "encoder" or (self.aligned and self.target == "encoder")

    @property
    def changes_layers(self) -> bool:
        """Whether the layers of `layer` are aligned or get a residual."""
        return self.aligned or self.residual != "none"

    def check_layers(self, layers: int) -> None:
        """Check that the aligned layers exist in a model of `layers` layers.

        How many a pretrained language model has is known only once its configuration is read.
        """
        if self.changes_layers and max(self.layer) > layers:
            raise ConfigError(f"alignment.layer is {max(self.layer)}: expected 1 to {layers}, the layers of the model")
        if self.final_norm and layers not in self.layer:
            raise ConfigError(
                f"alignment.final_norm is yes and alignment.layer {listed(self.layer)}: expected {layers}, the last"
                " layer, among them, since only that one is followed by the final norm"
            )
