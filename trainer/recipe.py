"""Recipes: the dataclasses of every key that determines a training run.

The text below a field is what `python -m trainer --help` and the documentation show for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le, Lt

from workbench.errors import ConfigError
from workbench.options import check_ranges
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
        check_ranges(self, "model.lora.")
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
        check_ranges(self, "model.")
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


@dataclass(frozen=True)
class DataConfig:
    """The data that a model is trained and evaluated on."""

    train: tuple[str, ...] = ("shapes:train",)
    """Training data: one data set, or (conversations only) several that are mixed."""
    weights: tuple[float, ...] = ()
    """How often each data set of `train` appears in one epoch: 1 (the default) is all of it once, 0.5 a random half,
    2.5 all of it twice and a random half of it a third time."""
    val: str = "shapes:val"
    """Validation data, on which the model is evaluated during training and, without `test`, at the end."""
    test: str | None = None
    """Test data, on which the finished model is evaluated once; by default it is evaluated on `val`."""
    limit_train: Annotated[int | None, Ge(1)] = None
    """Number of images of each training data set, with all their questions or conversations (one without an image
    counts as one image); by default all. They are drawn at random with the run's seed, so all variants of one seed see
    the same images, and a smaller subset lies within every larger one."""
    limit_val: Annotated[int | None, Ge(1)] = None
    """Number of images of the validation data, the same in every run; by default all."""
    limit_test: Annotated[int | None, Ge(1)] = None
    """Number of images of the test data, the same in every run; by default all."""
    questions: Annotated[int | None, Ge(1)] = None
    """Use only this many questions of each image, the first ones, in all splits; by default all. (The
    questions of `shapes` are in random order.)"""
    features: Literal["cache", "compute"] = "cache"
    """`cache` computes the features of the frozen networks (vision encoder, VFM) once and stores them on disk;
    `compute` runs the networks at every step, for data whose features would not fit."""
    max_length: Annotated[int | None, Ge(2)] = None
    """Length in tokens at which a conversation is cut; by default conversations are never cut."""
    control_tokens: Literal["refuse", "words"] = "refuse"
    """What to do with a text of the data that contains a control token of the model, such as `</s>`: `refuse` stops
    with an error that names its row, `words` reads it as ordinary text, `< /s>`."""
    group: bool = True
    """Put conversations into one batch that all have images or all have none, and are about equally long; the order of
    the batches depends on the seed."""

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
            raise ConfigError(
                f"data.limit_test is {self.limit_test}, but there is no data.test: set data.test, or leave"
                " data.limit_test out"
            )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine decay to `final_rate` times the peak learning rate."""

    steps: Annotated[int, Ge(1)] = 1200
    """Optimizer steps of the training."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Images (packed with all their questions) or conversations per process and forward pass; with `global_batch`, the
    most that fit."""
    accumulation: Annotated[int, Ge(1)] = 1
    """Forward passes of each process per optimizer step."""
    global_batch: Annotated[int | None, Ge(1)] = None
    """Images or conversations of one optimizer step, for any number of processes; batch size and `accumulation` follow
    from it. By default batch_size x accumulation x processes."""
    learning_rate: Annotated[float, Ge(0)] = 1.5e-3
    """Peak learning rate, at the end of the warm-up."""
    final_rate: Annotated[float, Ge(0), Le(1)] = 0.05
    """Learning rate at the last step, as a fraction of `learning_rate`."""
    warmup: Annotated[int, Ge(0)] = 80
    """Optimizer steps in which the learning rate rises from 0 to `learning_rate`."""
    weight_decay: Annotated[float, Ge(0)] = 0.05
    """AdamW's weight decay."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """AdamW's decay rate of the mean gradient."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.98
    """AdamW's decay rate of the mean squared gradient."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Norm to which a larger gradient is scaled down."""
    connector_rate: Annotated[float | None, Ge(0)] = None
    """Learning rate of the projector of a pretrained or an assembled model; by default `learning_rate`."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` means autocast: weights and optimizer states stay float32."""
    frozen_precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` stores the frozen matrices of a pretrained or an assembled model in half the memory. What is trained
    stays float32, and with `precision` bfloat16, which it needs, no loss changes: autocast rounds these matrices in
    every pass anyway. Questions with options are then answered in bfloat16 too, instead of float32."""
    loss_average: Literal["batch", "microbatch"] = "batch"
    """What the language-model loss is a mean over: all answer tokens of the global `batch`, or the means of each
    `microbatch` (forward pass of a process), so that the answers of one with fewer tokens count more, as in the
    official code of the paper."""
    checkpointing: bool = False
    """Activation checkpointing: a pretrained or an assembled model computes its activations again in the backward pass,
    which needs less memory and more time."""

    def __post_init__(self) -> None:
        check_ranges(self, "optim.")
        if self.global_batch is not None and self.accumulation != 1:
            raise ConfigError(
                f"optim.accumulation is {self.accumulation}, but it follows from optim.global_batch ="
                f" {self.global_batch}: leave optim.accumulation out"
            )
        if self.frozen_precision == "bfloat16" and self.precision != "bfloat16":
            raise ConfigError(
                f"optim.frozen_precision is bfloat16 and optim.precision {self.precision}: expected optim.precision"
                " bfloat16 too, or optim.frozen_precision float32"
            )

    def at_once(self, processes: int) -> int:
        """Return the images of a forward pass of each of `processes` processes.

        That is `batch_size` or, with a global batch, the largest number up to `batch_size` that divides the share of a
        process.

        Raises:
            ConfigError: the global batch is not a multiple of the number of processes.
        """
        if self.global_batch is None:
            return self.batch_size
        share, remainder = divmod(self.global_batch, processes)
        if remainder:
            raise ConfigError(
                f"optim.global_batch is {self.global_batch}: expected a multiple of {processes}, the processes that"
                " share it"
            )
        return next(size for size in range(min(self.batch_size, share), 0, -1) if share % size == 0)

    def accumulated(self, processes: int) -> int:
        """Return the forward passes of each of `processes` processes per optimizer step; same errors as `at_once`."""
        if self.global_batch is None:
            return self.accumulation
        return self.global_batch // (self.at_once(processes) * processes)

    def images(self, processes: int) -> int:
        """Return the images of one optimizer step over all of `processes` processes."""
        return self.at_once(processes) * self.accumulated(processes) * processes


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
        check_ranges(self, "alignment.selection.")


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
                raise ConfigError(f"alignment.{name} is {_listed(values)}: expected one or more, none of them twice")
        check_ranges(self, "alignment.")
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
                f"alignment.final_norm is yes and alignment.layer {_listed(self.layer)}: expected {layers}, the last"
                " layer, among them, since only that one is followed by the final norm"
            )


@dataclass(frozen=True)
class MonitorConfig:
    """What is measured and checked during training (docs/howto/watch.md)."""

    cknna_images: Annotated[int, Ge(0)] = 32
    """Number of validation images, the first ones, on which CKNNA of the aligned layers is measured at every
    evaluation; 0 for no CKNNA."""
    k: Annotated[int, Ge(1)] = 10
    """Number of nearest neighbors of CKNNA."""
    permutations: Annotated[int, Ge(10)] = 20
    """Number of random pairings of tokens and features, for the chance level of CKNNA."""
    head_steps: Annotated[int, Ge(1)] = 5
    """Number of steps after which an alignment head whose weights have not changed causes a warning."""

    def __post_init__(self) -> None:
        check_ranges(self, "monitor.")


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values)) or "empty"


@dataclass(frozen=True)
class Recipe:
    """A training run: `python -m trainer RECIPE --section.key value ...`."""

    RENAMED: ClassVar[Mapping[str, str]] = RENAMED

    output_dir: Path = Path("runs/model")
    """A new folder for the results; it becomes a model folder that plain transformers can load."""
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 0
    """Seed of the initial weights, the order of the data, and every other random draw."""
    start: Path | None = None
    """Folder of a finished training whose model this run starts from; it overrides `stage1`."""
    stage1: Path | None = None
    """Recipe of the pre-training (stage 1) that this run starts from, a YAML file beside this one. If it is not trained
    yet, it is trained first, with this run's seed, data and model, in a folder beside output_dir."""
    resume: bool = False
    """Continue from the newest complete checkpoint in output_dir."""
    repaired: bool = False
    """With `resume`: accept data whose content changed since the run began, such as a replaced image or removed rows;
    the other rows keep their order, and the record says so."""
    dry_run: bool = False
    """Train nothing: check names, shapes, data and disk space, and print the sizes of everything. This reads
    configurations but no weights, and writes nothing."""
    log_every: Annotated[int, Ge(1)] = 20
    """Steps between rows of the training log."""
    eval_every: Annotated[int, Ge(1)] = 200
    """Steps between evaluations on the validation data."""
    save_every: Annotated[int, Ge(1)] = 400
    """Steps between checkpoints; a multiple of `log_every`."""
    keep_checkpoints: Annotated[int | None, Ge(1)] = 2
    """Number of checkpoints to keep, the newest ones; None (null in YAML) keeps all, for `analyses.dynamics`."""
    keep_best: bool = False
    """Also keep the model with the best validation score (the highest mean accuracy of question types, or the lowest
    loss) in `best/`, and evaluate it like the last one."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that the log is also sent to, besides the parquet file."""
    push_to_hub: str | None = None
    """Repository on the hub that the finished model is uploaded to, such as NAME/MODEL, with its model card; a new
    repository is private."""
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
                "repaired is yes without resume: expected both, since it lets a resumed run continue with changed data"
            )
        if self.save_every % self.log_every:
            raise ConfigError(
                f"save_every is {self.save_every}: expected a multiple of log_every = {self.log_every}, so that the log"
                " of a resumed run is exact"
            )
        self._check_warmup()
        if self.model.kind == "toy":
            self._check_packed()
        else:
            self._check_conversations()

    def _check_start(self) -> None:
        if self.start is not None and self.start.suffix in (".yaml", ".yml"):
            raise ConfigError(
                f"start is {self.start}, a recipe: expected the folder of a finished training, or the recipe as the"
                " value of stage1"
            )
        if self.start is not None:
            object.__setattr__(self, "stage1", None)

    def _check_warmup(self) -> None:
        alignment, steps = self.alignment, self.optim.steps
        if alignment.aligned and alignment.warmup > steps:
            raise ConfigError(f"alignment.warmup is {alignment.warmup}: expected at most optim.steps = {steps}")
        if alignment.aligned and alignment.schedule != "constant" and alignment.warmup == steps:
            raise ConfigError(
                f"alignment.warmup is {alignment.warmup}: expected less than optim.steps = {steps}, since schedule"
                f" {alignment.schedule} comes after it"
            )

    def _check_packed(self) -> None:
        """Refuse what is impossible for a toy LLaVA, which is trained on packed questions."""
        data, alignment = self.data, self.alignment
        if len(data.train) > 1:
            raise ConfigError(
                f"data.train is {_listed(data.train)}: expected one data set, since a toy LLaVA cannot mix several"
            )
        if data.max_length is not None:
            raise ConfigError(
                f"data.max_length is {data.max_length}, but a toy LLaVA's questions are packed and never cut: leave"
                " data.max_length out"
            )
        if data.weights:
            raise ConfigError(
                f"data.weights is {_listed(data.weights)}, but a toy LLaVA is trained on one data set: leave"
                " data.weights out, or choose a subset with data.limit_train"
            )
        optim = self.optim
        if optim.checkpointing or optim.connector_rate is not None or optim.frozen_precision != "float32":
            raise ConfigError(
                "optim.checkpointing, optim.connector_rate and optim.frozen_precision do not work with a toy LLaVA:"
                " leave them out, or set model.kind to pretrained or assembled"
            )
        for key, value in (("target", alignment.target if alignment.aligned else ""), ("residual", alignment.residual)):
            # in the concatenated features of two encoders, the encoder with the larger values would dominate
            if self.model.second_encoder is not None and value == "encoder":
                raise ConfigError(
                    f"alignment.{key} is encoder with model.second_encoder {self.model.second_encoder}: expected"
                    " another, since the features of two encoders would be mixed (alignment.vfm takes several VFMs,"
                    " each with its own heads)"
                )
        if alignment.chooses_heads and self.model.second_encoder is not None:
            raise ConfigError(
                f"alignment.where is heads with model.second_encoder {self.model.second_encoder}: expected one encoder,"
                " since the heads are chosen with the model as analyses load it"
            )
        if self.model.language is None:
            alignment.check_layers(self.model.layers)

    def _check_conversations(self) -> None:
        """Refuse what is impossible for a pretrained or an assembled model, which is trained on conversations."""
        alignment = self.alignment
        if self.model.train_vision_encoder and self.optim.frozen_precision == "bfloat16":
            raise ConfigError(
                "optim.frozen_precision is bfloat16 and model.train_vision_encoder yes, so that nothing is frozen:"
                " leave optim.frozen_precision out"
            )
        if self.start is not None or self.stage1 is not None:
            key, value = ("start", self.start) if self.start is not None else ("stage1", self.stage1)
            raise ConfigError(
                f"{key} is {value}, but a model of kind {self.model.kind} does not use it: leave {key} out, and write"
                " the folder to start from as model.name"
            )
        if (alignment.center or alignment.images == "others") and (
            alignment.target == "encoder" or self.data.features == "compute"
        ):
            raise ConfigError(
                "alignment.center and alignment.images others need all targets before the training: expected"
                " alignment.target vfm and data.features cache"
            )
