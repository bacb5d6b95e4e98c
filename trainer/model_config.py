"""The section `model` of a recipe: which model is trained, and which of its parts.

The text below a field is what `python -m trainer --help` and the documentation show for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from workbench.errors import ConfigError
from workbench.options import check_options

ModelKind = Literal["toy", "assembled", "pretrained"]
TOY_ONLY = (
    "vision_encoder_features",
    "image_size",
    "layers",
    "width",
    "heads",
    "ffn",
    "init",
    "second_encoder",
    "dropout",
)
# keys that describe a randomly initialized language model
LANGUAGE_SIZES = ("layers", "width", "heads", "ffn", "init")
PARTS = ("vision_encoder", "vision_encoder_revision", "language", "language_revision")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) on linear layers of the language model: W x + (alpha / rank) B A x."""

    rank: Annotated[int, Ge(1)] = 16
    """Rank of the adapter matrices A and B."""
    alpha: Annotated[float, Ge(0)] = 32
    """Scale of the adapters, which is divided by the rank."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Probability that an input of an adapter is dropped during training."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter, in every block."""

    def __post_init__(self) -> None:
        check_options(self, "model.lora.")
        if not self.targets:
            raise ConfigError("model.lora.targets is empty: expected names of linear layers, such as q_proj")


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained.

    A toy LLaVA has a frozen vision encoder, a new projector, and a language model that is either small and randomly
    initialized or pretrained. An assembled model is a LLaVA made of a pretrained vision encoder and language model,
    with a new projector. A pretrained model is a multimodal model that is trained further.
    """

    kind: ModelKind | None = None
    """`toy` is trained on packed questions; `assembled` (from `vision_encoder` and `language`) and `pretrained` (from
    `name`) are trained on conversations. By default `pretrained` if `name` is set, else `toy`."""
    name: str | None = None
    """Hub id or folder of a pretrained multimodal model, of a family that workbench.mllm knows. Leave the keys of the
    parts (`vision_encoder`, `language`) out."""
    revision: str | None = None
    """Branch, tag or commit of `name`, if that is a hub id; by default the hub's main branch."""
    vision_encoder: str = "dinov2-small"
    """Name of the weights of a toy LLaVA's vision encoder; for an assembled model hub id or folder of a CLIP or
    SigLIP."""
    vision_encoder_revision: str | None = None
    """Branch, tag or commit of `vision_encoder`, if that is a hub id; by default the hub's main branch."""
    vision_encoder_features: Annotated[tuple[int, ...], Ge(0)] = (0, 8)
    """Hidden states of a toy LLaVA's vision encoder that its projector receives, concatenated: 0 is the patch embedding
    with its position, l the output of block l."""
    image_size: Annotated[int, Ge(1)] = 112
    """Pixels per side to which a toy LLaVA's images are resized; a multiple of the vision encoder's patch size."""
    language: str | None = None
    """Name of the weights of a pretrained language model (for an assembled model also hub id or folder), which has its
    own sizes and tokenizer. By default a toy LLaVA has a randomly initialized language model of the sizes below."""
    language_revision: str | None = None
    """Branch, tag or commit of `language`, if that is a hub id; by default the hub's main branch."""
    train: Literal["all", "connector", "lora"] = "all"
    """What is trained besides the projector: the whole language model (`all`), nothing (`connector`), or low-rank
    adapters in the language model (`lora`). The vision encoder is frozen unless `train_vision_encoder` is set."""
    train_vision_encoder: bool = False
    """Train the vision encoder too; only for a pretrained or an assembled model with `train: all`."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    layers: Annotated[int, Ge(1)] = 6
    """Number of blocks of a toy LLaVA's language model."""
    width: Annotated[int, Ge(1)] = 128
    """Width of the hidden states of a toy LLaVA's language model; a multiple of 2 x `heads`."""
    heads: Annotated[int, Ge(1)] = 4
    """Attention heads of each block of a toy LLaVA's language model."""
    ffn: Annotated[int, Ge(1)] = 384
    """Hidden width of the MLPs of a toy LLaVA's language model."""
    init: Annotated[float, Ge(0)] = 0.03
    """Standard deviation of the initial weights of a toy LLaVA's language model."""
    second_encoder: str | None = None
    """A VFM, named as in `alignment.vfm`, whose frozen features a toy LLaVA's projector receives in addition to those
    of the vision encoder. Only the trainer can run such a model."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Probability of dropout, during training, on the output of each attention and MLP of a toy LLaVA's language model
    (GPT-2's `resid_pdrop`)."""

    def __post_init__(self) -> None:
        if self.kind is None:
            object.__setattr__(self, "kind", "toy" if self.name is None else "pretrained")
        check_options(self, "model.")
        if not self.vision_encoder_features:
            raise ConfigError("model.vision_encoder_features is empty: expected one or more block numbers from 0")
        if self.width % (2 * self.heads):  # rotary position embeddings rotate pairs of channels in each head
            raise ConfigError(f"model.width is {self.width}: expected a multiple of {2 * self.heads} = 2 x model.heads")
        checks = {"toy": self._check_toy, "assembled": self._check_assembled, "pretrained": self._check_pretrained}
        checks[str(self.kind)]()
        for key in ("name", "vision_encoder", "language"):
            revision = "revision" if key == "name" else f"{key}_revision"
            if getattr(self, revision) is not None and Path(getattr(self, key)).is_dir():
                raise self._refused(revision, f"model.{key} is {getattr(self, key)}, a folder")

    def _check_toy(self) -> None:
        """Refuse keys that do not fit a toy LLaVA."""
        if self.name is not None:
            raise ConfigError(
                f"model.kind is toy and model.name {self.name}: expected model.kind pretrained, or no model.name"
            )
        if self.train_vision_encoder:
            raise ConfigError(
                "model.train_vision_encoder is yes: expected no, since a toy LLaVA's vision encoder is always frozen"
            )
        for key in self._changed(("revision", "vision_encoder_revision", "language_revision")):
            raise self._refused(key, "the revisions of a toy LLaVA's weights are fixed")
        for key in self._changed(LANGUAGE_SIZES if self.language is not None else ()):
            raise self._refused(key, f"model.language = {self.language} already defines the language model")

    def _check_assembled(self) -> None:
        """Refuse keys that do not fit an assembled model."""
        parts = f"model.vision_encoder {self.vision_encoder} and model.language {self.language}"
        if self.name is not None:
            raise ConfigError(
                f"model.kind is assembled and model.name {self.name}: expected model.kind pretrained, or no model.name"
            )
        if self.language is None or not self._changed(("vision_encoder",)):
            raise ConfigError(
                f"model.kind is assembled from {parts}: expected hub ids or folders of both, a CLIP or SigLIP and a"
                " language model"
            )
        for key in self._changed(("revision", *TOY_ONLY)):
            why = "model.name is not set" if key == "revision" else "it is for a toy LLaVA only"
            raise self._refused(key, why)
        self._check_training()

    def _check_pretrained(self) -> None:
        """Refuse keys that do not fit a pretrained model."""
        if self.name is None:
            raise ConfigError(
                "model.kind is pretrained without a model.name: expected the hub id or folder of a multimodal model"
            )
        for key in self._changed((*PARTS, *TOY_ONLY)):
            raise self._refused(key, f"model.name = {self.name} already defines the model")
        self._check_training()

    def _check_training(self) -> None:
        if self.train_vision_encoder and self.train != "all":
            raise ConfigError(
                f"model.train_vision_encoder is yes and model.train {self.train}: expected model.train all, since only"
                " then the vision encoder can be trained too"
            )

    def _changed(self, keys: tuple[str, ...]) -> list[str]:
        """Return those of `keys` whose value is not the default."""
        return [key.name for key in fields(self) if key.name in keys and getattr(self, key.name) != key.default]

    def _refused(self, key: str, why: str) -> ConfigError:
        return ConfigError(f"model.{key} is {getattr(self, key)}, but {why}: leave model.{key} out")
