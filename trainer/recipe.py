"""Recipes: everything that determines a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le, Lt

from workbench.errors import ConfigError
from workbench.ranges import check_ranges
from workbench.stored_recipe import RENAMED

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
OWN_SIZES = ("layers", "width", "heads", "ffn", "init")  # of a language model that is randomly initialized
PARTS = ("vision_encoder", "vision_encoder_revision", "language", "language_revision")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) on linear layers of the language model: W x + (alpha / rank) B A x."""

    rank: Annotated[int, Ge(1)] = 16
    alpha: Annotated[float, Ge(0)] = 32
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get one, in every block."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.lora.")
        if not self.targets:
            raise ConfigError("model.lora.targets is empty: expected names of linear layers, such as q_proj")


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained: a toy LLaVA (a frozen vision encoder, a new projector, and a small language model that
    is randomly initialized or a pretrained one), a LLaVA that is assembled from pretrained parts, or a pretrained
    multimodal model as it is."""

    kind: ModelKind | None = None
    """`toy` learns from packed questions; `assembled` (from `vision_encoder` and `language`) and `pretrained` (`name`)
    from conversations. Where it is not given: `pretrained` with a `name`, else `toy`."""
    name: str | None = None
    """Hub id or folder of a pretrained multimodal model of a family that workbench.mllm knows; then no other part is
    named."""
    revision: str | None = None
    """Branch, tag or commit of a `name` that is a hub id."""
    vision_encoder: str = "dinov2-small"
    """Weights of a toy LLaVA's vision encoder; or hub id or folder of the CLIP or SigLIP that a LLaVA is assembled
    from."""
    vision_encoder_revision: str | None = None
    """Branch, tag or commit of a `vision_encoder` that is a hub id."""
    vision_encoder_features: Annotated[tuple[int, ...], Ge(0)] = (0, 8)
    """Hidden states of the vision encoder that the projector receives, side by side: 0 is the patch embedding with its
    position, l the output of block l."""
    image_size: Annotated[int, Ge(1)] = 112
    """Pixels per side after resizing; a multiple of the vision encoder's patch size."""
    language: str | None = None
    """Weights of a pretrained language model (assembled: or its hub id or folder), which brings its own sizes and
    tokenizer; by default a toy LLaVA has one of the sizes below, randomly initialized."""
    language_revision: str | None = None
    """Branch, tag or commit of a `language` that is a hub id."""
    train: Literal["all", "connector", "lora"] = "all"
    """`connector` leaves the language model as it is, `lora` gives it low-rank adapters; the projector is always
    trained, the vision encoder is frozen."""
    train_vision_encoder: bool = False
    """Train the vision encoder too; only of a pretrained or an assembled model, with `train: all`."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    layers: Annotated[int, Ge(1)] = 6
    width: Annotated[int, Ge(1)] = 128
    heads: Annotated[int, Ge(1)] = 4
    ffn: Annotated[int, Ge(1)] = 384
    init: Annotated[float, Ge(0)] = 0.03
    """Standard deviation of the language model's initial weights."""
    second_encoder: str | None = None
    """A VFM, named as in `alignment.vfm`, whose frozen features a toy LLaVA's projector receives beside the vision
    encoder's; only the trainer runs such a model."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of what each block of a toy LLaVA's language model adds to the residual stream that is dropped while
    training (GPT-2's `resid_pdrop`)."""

    def __post_init__(self) -> None:
        if self.kind is None:
            object.__setattr__(self, "kind", "toy" if self.name is None else "pretrained")
        check_ranges(self, "model.")
        if not self.vision_encoder_features:
            raise ConfigError("model.vision_encoder_features is empty: expected one or more block numbers from 0")
        if self.width % (2 * self.heads):  # rotary positions turn pairs
            raise ConfigError(f"model.width is {self.width}: expected a multiple of {2 * self.heads} = 2 x model.heads")
        {"toy": self._check_toy, "assembled": self._check_assembled, "pretrained": self._check_pretrained}[
            str(self.kind)
        ]()
        for key in ("name", "vision_encoder", "language"):
            revision = "revision" if key == "name" else f"{key}_revision"
            if getattr(self, revision) is not None and Path(getattr(self, key)).is_dir():
                raise self._refused(revision, f"model.{key} is {getattr(self, key)}, a folder")

    def _check_toy(self) -> None:
        if self.name is not None:
            raise ConfigError(
                f"model.kind is toy and model.name {self.name}: expected model.kind pretrained, or no model.name"
            )
        if self.train_vision_encoder:
            raise ConfigError(
                "model.train_vision_encoder is yes: expected no, since the vision encoder of a toy LLaVA stays as it is"
            )
        for key in self._changed(("revision", "vision_encoder_revision", "language_revision")):
            raise self._refused(key, "a toy LLaVA's weights are pinned")
        for key in self._changed(OWN_SIZES if self.language is not None else ()):
            raise self._refused(key, f"model.language = {self.language} brings its own")

    def _check_assembled(self) -> None:
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
            raise self._refused(
                key, "no model.name is given" if key == "revision" else "the assembled parts bring their own"
            )
        self._check_training()

    def _check_pretrained(self) -> None:
        if self.name is None:
            raise ConfigError(
                "model.kind is pretrained without a model.name: expected the hub id or folder of a multimodal model"
            )
        for key in self._changed((*PARTS, *TOY_ONLY)):
            raise self._refused(key, f"model.name = {self.name} brings its own")
        self._check_training()

    def _check_training(self) -> None:
        if self.train_vision_encoder and self.train != "all":
            raise ConfigError(
                f"model.train_vision_encoder is yes and model.train {self.train}: expected model.train all for a vision"
                " encoder that is trained too"
            )

    def _changed(self, keys: tuple[str, ...]) -> list[str]:
        """Those of `keys` whose value is not the default."""
        return [own.name for own in fields(self) if own.name in keys and getattr(self, own.name) != own.default]

    def _refused(self, key: str, why: str) -> ConfigError:
        return ConfigError(f"model.{key} is {getattr(self, key)}: expected none, since {why}")


@dataclass(frozen=True)
class DataConfig:
    """What is learned from and evaluated on."""

    train: tuple[str, ...] = ("shapes:train",)
    """One data set, or several that are mixed (conversations only)."""
    weights: tuple[float, ...] = ()
    """How often each data set comes in one epoch: 1 is all of it once, 0.5 a random half, 2.5 all of it twice and half
    of it again; 1 by default."""
    val: str = "shapes:val"
    test: str | None = None
    """What the finished model is evaluated on, once, instead of `val`, on which it is watched while it trains."""
    limit_train: Annotated[int | None, Ge(1)] = None
    """Images of each training data set, with all their questions or conversations (a text alone counts as one); all by
    default. The run's seed draws them at random, so all variants of one seed learn from the same images; a smaller
    subset lies within every larger one."""
    limit_val: Annotated[int | None, Ge(1)] = None
    limit_test: Annotated[int | None, Ge(1)] = None
    questions: Annotated[int | None, Ge(1)] = None
    """The first so many questions of each image, of both splits; all by default. (Those of `shapes` stand in random
    order.)"""
    features: Literal["cache", "compute"] = "cache"
    """`cache` computes the features of the frozen networks (vision encoder, VFM) once and keeps them on disk; `compute`
    runs the networks at every step, for data too large for that."""
    max_length: Annotated[int | None, Ge(2)] = None
    """Tokens at which a conversation is cut."""
    control_tokens: Literal["refuse", "words"] = "refuse"
    """A control token of the model that a text of the data spells (such as `</s>`) is refused with its row, or read as
    `words`, `< /s>`."""
    group: bool = True
    """Batches of conversations that all have images, or none, and are of about the same length, in an order that
    depends on the seed."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.")
        if not self.train:
            raise ConfigError("data.train is empty: expected a data set, such as shapes:train")
        if self.weights and (
            len(self.weights) != len(self.train) or not all(0 < weight < float("inf") for weight in self.weights)
        ):
            raise ConfigError(
                f"data.weights is {_listed(self.weights)}: expected {len(self.train)} numbers above 0, one for each of"
                " data.train"
            )
        if self.limit_test is not None and self.test is None:
            raise ConfigError(f"data.limit_test is {self.limit_test}: expected none without data.test")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and a cosine to `final_rate` of the peak."""

    steps: Annotated[int, Ge(1)] = 1200
    batch_size: Annotated[int, Ge(1)] = 16
    """Images per process and forward pass (with `global_batch`: at most); all questions of an image are packed into one
    sequence."""
    accumulation: Annotated[int, Ge(1)] = 1
    """Forward passes of each process per optimizer step."""
    global_batch: Annotated[int | None, Ge(1)] = None
    """Images of one optimizer step, whatever the number of processes; images per pass and `accumulation` follow from
    it."""
    learning_rate: Annotated[float, Ge(0)] = 1.5e-3
    final_rate: Annotated[float, Ge(0), Le(1)] = 0.05
    warmup: Annotated[int, Ge(0)] = 80
    weight_decay: Annotated[float, Ge(0)] = 0.05
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.98
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    connector_rate: Annotated[float | None, Ge(0)] = None
    """Learning rate of the projector of a pretrained or an assembled model, where it has one of its own."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` is autocast: weights and optimizer stay float32."""
    checkpointing: bool = False
    """A pretrained or an assembled model computes its activations again in the backward pass, instead of keeping
    them."""

    def __post_init__(self) -> None:
        check_ranges(self, "optim.")
        if self.global_batch is not None and self.accumulation != 1:
            raise ConfigError(
                f"optim.accumulation is {self.accumulation}: expected none, since it follows from optim.global_batch ="
                f" {self.global_batch}"
            )

    def at_once(self, processes: int) -> int:
        """Images of each of so many processes per forward pass: `batch_size`, or the most below it of which its share
        of the global batch is a multiple.

        Raises:
            ConfigError: the processes cannot share the global batch.
        """
        if self.global_batch is None:
            return self.batch_size
        share, rest = divmod(self.global_batch, processes)
        if rest:
            raise ConfigError(
                f"optim.global_batch is {self.global_batch}: expected a multiple of {processes}, the processes that"
                " share it"
            )
        return next(size for size in range(min(self.batch_size, share), 0, -1) if share % size == 0)

    def accumulated(self, processes: int) -> int:
        """Forward passes of each of so many processes per optimizer step; raises as `at_once`."""
        return (
            self.accumulation
            if self.global_batch is None
            else self.global_batch // (self.at_once(processes) * processes)
        )

    def images(self, processes: int) -> int:
        """Images of one optimizer step over all processes."""
        return self.at_once(processes) * self.accumulated(processes) * processes


@dataclass(frozen=True)
class AlignmentConfig:
    """The second loss, on the visual tokens inside the language model (L_VRA; variants and equations in
    docs/concepts/alignment_loss.md)."""

    objective: Literal["none", "cosine", "relation"] = "none"
    """`none` is the baseline; `relation` compares the two tables of similarities between the tokens of an image."""
    weight: Annotated[float, Ge(0)] = 0.5
    """lambda in L = L_LM + lambda * L_VRA."""
    layer: Annotated[tuple[int, ...], Ge(1)] = (3,)
    """Layers l that are aligned, 1 to the language model's last."""
    heads: Literal["each", "shared", "none"] = "each"
    """A head for each layer, one for all, or `none`, where `relation` compares the tokens as they are."""
    where: Literal["output", "attention"] = "output"
    """What of a layer: its output, or that of its attention, all heads side by side (the input of o_proj)."""
    target: Literal["vfm", "encoder", "projector"] = "vfm"
    """`encoder` is what the model's own projector receives, `projector` what it gives (without gradient)."""
    vfm: tuple[str, ...] = ("efficientnet-lite0",)
    """Names that `python -m workbench.vfm` lists, hf:ID, timm:NAME, or folders; with several, each has its own heads
    and L_VRA is the mean."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How lambda goes from `weight`, after the warm-up, to `final_weight` in the last step."""
    final_weight: Annotated[float | None, Ge(0)] = None
    """0 by default; for `linear` and `cosine` only."""
    warmup: Annotated[int, Ge(0)] = 0
    """Steps in which lambda rises to `weight`."""
    teacher_norm: Literal["own", "student"] = "own"
    """Whose normalization the VFM's pixels get; `student` is CLIP's, as in the official code of the paper, whatever the
    VFM was trained on."""
    hidden: Annotated[int, Ge(1)] = 256
    """Width of a head's two hidden layers."""
    images: Literal["same", "others"] = "same"
    """`others` is a control: the target is the feature map of another training image, the same one at every step."""
    center: bool = False
    """Subtract the training set's mean feature vector from the target, so that a constant prediction earns nothing."""
    residual: Literal["none", "encoder", "projector"] = "none"
    """Add the image again to the visual tokens after each layer of `layer`: a light adapter of what the projector
    receives, or what it gave."""

    def __post_init__(self) -> None:
        for name, values in (("layer", self.layer), ("vfm", self.vfm)):
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"alignment.{name} is {_listed(values)}: expected one or more, none of them twice")
        check_ranges(self, "alignment.")
        if self.objective == "cosine" and self.heads == "none":
            raise ConfigError(
                "alignment.heads is none: expected each or shared for the cosine objective, whose two sides have"
                " different widths"
            )
        if self.schedule == "constant" and self.final_weight is not None:
            raise ConfigError(
                f"alignment.final_weight is {self.final_weight}: expected none for a constant schedule, or schedule"
                " linear or cosine"
            )
        if self.target == "projector" and (self.center or self.images == "others"):
            raise ConfigError(
                "alignment.target is projector, which changes in training: expected no center and no other images"
                " for it"
            )

    @property
    def aligned(self) -> bool:
        return self.objective != "none"

    @property
    def reads_encoder(self) -> bool:
        """Whether the vision encoder's features are a target, or are added again."""
        return self.residual == "encoder" or (self.aligned and self.target == "encoder")

    @property
    def changes_layers(self) -> bool:
        """Whether something is done with the layers of `layer`."""
        return self.aligned or self.residual != "none"

    def check_layers(self, layers: int) -> None:
        """Check that the aligned layers are among the model's `layers`; a pretrained language model says only when it
        is loaded how many it has."""
        if self.changes_layers and max(self.layer) > layers:
            raise ConfigError(f"alignment.layer is {max(self.layer)}: expected 1 to {layers}, the layers of the model")


@dataclass(frozen=True)
class MonitorConfig:
    """What is watched while training (docs/howto/watch.md)."""

    cknna_images: Annotated[int, Ge(0)] = 32
    """The first so many images of the validation split, on which CKNNA of the aligned layer is measured at every
    evaluation; 0 for none."""
    k: Annotated[int, Ge(1)] = 10
    """Neighbors of CKNNA."""
    permutations: Annotated[int, Ge(10)] = 20
    """Of the pairing, for its chance level."""
    head_steps: Annotated[int, Ge(1)] = 5
    """A head that has not moved after so many steps is warned of."""

    def __post_init__(self) -> None:
        check_ranges(self, "monitor.")


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values)) or "empty"


@dataclass(frozen=True)
class Recipe:
    """A training run. `python -m trainer RECIPE --section.key value ...`"""

    RENAMED: ClassVar[Mapping[str, str]] = RENAMED

    output_dir: Path = Path("runs/model")
    """A new folder; it becomes a plain transformers model folder."""
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 0
    start: Path | None = None
    """The folder of a finished training whose model this run starts from; it takes the place of `stage1`."""
    stage1: Path | None = None
    """The recipe of the pre-training (stage 1) that this run starts from, a YAML beside this one; it is trained with
    this run's seed, data and model beside output_dir, if it is not there yet."""
    resume: bool = False
    """Continue from the newest whole checkpoint in output_dir."""
    repaired: bool = False
    """With `resume`: the data may have other content than before, such as an image that was replaced or fewer rows; the
    others keep their order, and the record says so."""
    dry_run: bool = False
    """Train nothing: check names, shapes, data and disk, and say how large everything is; reads configurations, no
    weights, and writes nothing."""
    log_every: Annotated[int, Ge(1)] = 20
    """Steps between rows of the training log."""
    eval_every: Annotated[int, Ge(1)] = 200
    """Steps between evaluations on the validation split."""
    save_every: Annotated[int, Ge(1)] = 400
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int | None, Ge(1)] = 2
    """The newest so many stay; None (null) keeps all, which `analyses.dynamics` reads."""
    keep_best: bool = False
    """Keep the model of the highest validation score (mean accuracy of the types, or the least loss) as `best/` too; it
    is evaluated as the last one is."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers, besides the parquet log."""
    push_to_hub: str | None = None
    """Where the finished model goes on the hub, such as NAME/MODEL, with its card; a new repository is private."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        check_ranges(self)
        self._check_start()
        if self.repaired and not self.resume:
            raise ConfigError(
                "repaired is yes without resume: expected both, since it says that a run goes on with other data"
            )
        if self.save_every % self.log_every:
            raise ConfigError(
                f"save_every is {self.save_every}: expected a multiple of log_every = {self.log_every}, so that a"
                " resumed log is exact"
            )
        self._check_warmup()
        if self.model.kind == "toy":
            self._check_packed()
        else:
            self._check_conversations()

    def _check_start(self) -> None:
        if self.start is not None and self.start.suffix in (".yaml", ".yml"):
            raise ConfigError(
                f"start is {self.start}, a recipe: expected the folder of a finished training, or the recipe under the"
                " key stage1"
            )
        if self.start is not None:
            object.__setattr__(self, "stage1", None)

    def _check_warmup(self) -> None:
        own, steps = self.alignment, self.optim.steps
        if own.aligned and own.warmup > steps:
            raise ConfigError(f"alignment.warmup is {own.warmup}: expected at most optim.steps = {steps}")
        if own.aligned and own.schedule != "constant" and own.warmup == steps:
            raise ConfigError(
                f"alignment.warmup is {own.warmup}, all steps: expected fewer for schedule {own.schedule}, which"
                " follows it"
            )

    def _check_packed(self) -> None:
        """Refuse what a toy LLaVA, which learns from packed questions, cannot do."""
        data, alignment = self.data, self.alignment
        if len(data.train) > 1:
            raise ConfigError(
                f"data.train is {_listed(data.train)}: expected one data set for a toy LLaVA, whose questions are"
                " packed"
            )
        if data.max_length is not None:
            raise ConfigError(
                f"data.max_length is {data.max_length}: expected none for a toy LLaVA, whose questions are packed"
            )
        if data.weights:
            raise ConfigError(
                f"data.weights is {_listed(data.weights)}: expected none for a toy LLaVA, which learns from one data"
                " set; see data.limit_train"
            )
        if self.optim.checkpointing or self.optim.connector_rate is not None:
            raise ConfigError(
                "optim.checkpointing and optim.connector_rate are not for a toy LLaVA: expected model.kind pretrained"
                " or assembled with them"
            )
        for key, value in (("target", alignment.target if alignment.aligned else ""), ("residual", alignment.residual)):
            # of two encoders side by side, the one with the larger numbers alone would count
            if self.model.second_encoder is not None and value == "encoder":
                expected = (
                    "another, since it would mix two encoders; alignment.vfm takes several, each with its own heads"
                )
                raise ConfigError(
                    f"alignment.{key} is encoder with model.second_encoder {self.model.second_encoder}: expected"
                    f" {expected}"
                )
        if self.model.language is None:
            alignment.check_layers(self.model.layers)

    def _check_conversations(self) -> None:
        """Refuse what a pretrained or an assembled model, which learns from conversations, cannot do."""
        alignment = self.alignment
        if self.start is not None or self.stage1 is not None:
            key, value = ("start", self.start) if self.start is not None else ("stage1", self.stage1)
            raise ConfigError(
                f"{key} is {value}: expected none for a model of kind {self.model.kind}; a folder to start from is a"
                " model.name"
            )
        if (alignment.center or alignment.images == "others") and (
            alignment.target == "encoder" or self.data.features == "compute"
        ):
            raise ConfigError(
                "alignment.center and images others need all targets beforehand: expected target vfm and data.features"
                " cache"
            )
