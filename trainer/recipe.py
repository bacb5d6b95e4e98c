"""Recipes: everything that determines a training run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, Literal

from workbench.errors import ConfigError


def _at_least(section: str, least: float, **values: float) -> None:
    for name, value in values.items():
        if not least <= value < inf:
            raise ConfigError(f"{section}{name} is {value}: expected at least {least}{', and finite' * (value == inf)}")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) on linear layers of the language model: W x + (alpha / rank) B A x."""

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get one, in every block."""

    def __post_init__(self) -> None:
        _at_least("model.lora.", 1, rank=self.rank)
        _at_least("model.lora.", 0, alpha=self.alpha)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.lora.dropout is {self.dropout}: expected 0 to below 1")
        if not self.targets:
            raise ConfigError("model.lora.targets is empty: expected names of linear layers, such as q_proj")


@dataclass(frozen=True)
class ModelConfig:
    """Any multimodal model (`name`), a LLaVA of released parts (`tower` and `language` with a slash), or a small LLaVA: a real frozen tower, a two-layer
    connector, and a language model trained from nothing or a pretrained one."""

    name: str | None = None
    """Hub id or folder of a multimodal model of a family that workbench.mllm knows, trained as it is on conversations; then no other part is named."""
    revision: str | None = None
    """Branch, tag or commit of a `name` that is a hub id."""
    tower: str = "dinov2-small"
    """Weights of the vision tower; hub id or folder of a CLIP or SigLIP (with a slash) for a LLaVA of released parts, whose connector is new."""
    tower_revision: str | None = None
    """Branch, tag or commit of a `tower` that is a hub id."""
    tower_features: tuple[int, ...] = (0, 8)
    """Hidden states of the tower that feed the connector, side by side: 0 is the patch embedding with its position, l the output of block l."""
    image_size: int = 112
    """Pixels per side after resizing; a multiple of the tower's patch size."""
    language: str | None = None
    """Weights of a pretrained language model (or hub id or folder, with a slash), which brings its own sizes and tokenizer; by default one of the sizes
    below, trained from nothing."""
    language_revision: str | None = None
    """Branch, tag or commit of a `language` that is a hub id."""
    train: Literal["all", "connector", "lora"] = "all"
    """`connector` leaves the language model as it is, `lora` gives it low-rank adapters; the connector is always trained, the tower is frozen."""
    train_tower: bool = False
    """Train the vision tower too; only of a model by `name` or of released parts, with `train: all`."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    layers: int = 6
    width: int = 128
    heads: int = 4
    ffn: int = 384
    init: float = 0.03
    """Standard deviation of the language model's initial weights."""
    second_encoder: str | None = None
    """A VFM, named as in `alignment.vfm`, whose frozen features a small LLaVA's connector receives beside the tower's; only the trainer runs such a model."""
    dropout: float = 0.0
    """Share of what each block of a small LLaVA's language model adds to the residual stream that is dropped while training (GPT-2's `resid_pdrop`)."""

    def __post_init__(self) -> None:
        _at_least("model.", 1, image_size=self.image_size, layers=self.layers, width=self.width, heads=self.heads, ffn=self.ffn)
        if not self.tower_features or min(self.tower_features) < 0:
            raise ConfigError(f"model.tower_features is {self.tower_features}: expected one or more block numbers from 0")
        _at_least("model.", 0, init=self.init)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout is {self.dropout}: expected 0 to below 1")
        if self.width % (2 * self.heads):  # rotary positions turn pairs
            raise ConfigError(f"model.width is {self.width}: expected a multiple of {2 * self.heads} = 2 x model.heads")
        for key, part in (("revision", "name"), ("tower_revision", "tower"), ("language_revision", "language")):
            revision, model = getattr(self, key), getattr(self, part)
            if revision is not None and (model is None or Path(model).is_dir() or (part != "name" and "/" not in model)):
                raise ConfigError(f"model.{key} is {revision}: expected none, since model.{part} is {model}, which is no hub id")
        if self.released:
            self._check_released()
        elif self.train_tower:
            raise ConfigError("model.train_tower is yes: expected no, since the tower of a small LLaVA stays as it is")
        for size in fields(self):
            if self.language is not None and size.name in ("layers", "width", "heads", "ffn", "init") and getattr(self, size.name) != size.default:
                raise ConfigError(f"model.{size.name} is {getattr(self, size.name)}: expected none, since model.language = {self.language} brings its own")

    @property
    def released(self) -> bool:
        """Whether it is a model, or made of parts, as others release them; it then learns from conversations."""
        return self.name is not None or "/" in self.tower or "/" in (self.language or "")

    def _check_released(self) -> None:
        given = [f.name for f in fields(self) if f.name not in ("name", "revision", "train", "lora", "train_tower") and getattr(self, f.name) != f.default]
        if self.name is None:
            if "/" not in self.tower or self.language is None:
                raise ConfigError(f"model.tower is {self.tower} and model.language {self.language}: expected hub ids or folders of both, or model.name")
            given = [name for name in given if name not in ("tower", "language", "tower_revision", "language_revision")]
        if given:
            whose = f"model.name = {self.name} brings its own" if self.name else "the released parts bring their own"
            raise ConfigError(f"model.{given[0]} is {getattr(self, given[0])}: expected none, since {whose}")
        if self.train_tower and self.train != "all":
            raise ConfigError(f"model.train_tower is yes and model.train {self.train}: expected model.train all for a tower that is trained too")


@dataclass(frozen=True)
class DataConfig:
    """What is learnt from and evaluated on."""

    train: tuple[str, ...] = ("shapes:train",)
    """One data set, or several that are mixed (conversations only)."""
    weights: tuple[float, ...] = ()
    """How often each data set comes in one epoch: 1 is all of it once, 0.5 a random half, 2.5 all of it twice and half of it again; 1 by default."""
    val: str = "shapes:val"
    test: str | None = None
    """What the finished model is evaluated on, once, instead of `val`, on which it is watched while it trains."""
    limit_train: int | None = None
    """Images of each training data set, with all their questions or conversations (a text alone counts as one); all by default. The run's seed draws them at
    random, so all variants of one seed learn from the same images; a smaller subset lies within every larger one."""
    limit_val: int | None = None
    limit_test: int | None = None
    questions: int | None = None
    """The first so many questions of each image, of both splits; all by default. (Those of `shapes` stand in random order.)"""
    features: Literal["cache", "compute"] = "cache"
    """`cache` computes what the frozen networks (tower, VFM) say once and keeps it on disk; `compute` runs them at every step, for data too large for that."""
    max_length: int | None = None
    """Tokens at which a conversation is cut."""
    control_tokens: Literal["refuse", "words"] = "refuse"
    """A control token of the model that a text of the data spells (such as `</s>`) is refused with its row, or read as `words`, `< /s>`."""
    group: bool = True
    """Batches of conversations that all have images, or none, and are of about the same length, in an order that depends on the seed."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("data.train is empty: expected a data set, such as shapes:train")
        if self.weights and (len(self.weights) != len(self.train) or not all(0 < weight < inf for weight in self.weights)):
            raise ConfigError(f"data.weights is {_listed(self.weights)}: expected {len(self.train)} numbers above 0, one for each of data.train")
        if self.max_length is not None:
            _at_least("data.", 2, max_length=self.max_length)
        if self.limit_test is not None and self.test is None:
            raise ConfigError(f"data.limit_test is {self.limit_test}: expected none without data.test")
        for name, value in (("limit_train", self.limit_train), ("limit_val", self.limit_val), ("limit_test", self.limit_test), ("questions", self.questions)):
            if value is not None:
                _at_least("data.", 1, **{name: value})


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and a cosine to `final_rate` of the peak."""

    steps: int = 1200
    batch_size: int = 16
    """Images per process and forward pass (with `global_batch`: at most); all questions of an image are packed into one sequence."""
    accumulation: int = 1
    """Forward passes of each process per optimiser step."""
    global_batch: int | None = None
    """Images of one optimiser step, whatever the number of processes; images per pass and `accumulation` follow from it."""
    learning_rate: float = 1.5e-3
    final_rate: float = 0.05
    warmup: int = 80
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    max_grad_norm: float = 1.0
    connector_rate: float | None = None
    """Learning rate of a released model's connector, where it has one of its own."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` is autocast: weights and optimiser stay float32."""
    checkpointing: bool = False
    """A released model computes its activations again in the backward pass, instead of keeping them."""

    def __post_init__(self) -> None:
        _at_least("optim.", 1, steps=self.steps, batch_size=self.batch_size, accumulation=self.accumulation)
        if self.global_batch is not None:
            _at_least("optim.", 1, global_batch=self.global_batch)
            if self.accumulation != 1:
                raise ConfigError(f"optim.accumulation is {self.accumulation}: expected none, since it follows from optim.global_batch = {self.global_batch}")
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise ConfigError(f"optim.{name} is {value}: expected 0 to below 1")
        if not 0 <= self.final_rate <= 1:
            raise ConfigError(f"optim.final_rate is {self.final_rate}: expected 0 to 1")
        _at_least("optim.", 0, max_grad_norm=self.max_grad_norm)
        _at_least("optim.", 0, learning_rate=self.learning_rate, warmup=self.warmup, weight_decay=self.weight_decay)
        _at_least("optim.", 0, connector_rate=self.connector_rate or 0)

    def at_once(self, processes: int) -> int:
        """Images of each of so many processes per forward pass: `batch_size`, or the most below it of which its share of the global batch is a multiple.

        Raises:
            ConfigError: the processes cannot share the global batch.
        """
        if self.global_batch is None:
            return self.batch_size
        share, rest = divmod(self.global_batch, processes)
        if rest:
            raise ConfigError(f"optim.global_batch is {self.global_batch}: expected a multiple of {processes}, the processes that share it")
        return next(size for size in range(min(self.batch_size, share), 0, -1) if share % size == 0)

    def accumulated(self, processes: int) -> int:
        """Forward passes of each of so many processes per optimiser step; raises as `at_once`."""
        return self.accumulation if self.global_batch is None else self.global_batch // (self.at_once(processes) * processes)

    def images(self, processes: int) -> int:
        """Images of one optimiser step over all processes."""
        return self.at_once(processes) * self.accumulated(processes) * processes


@dataclass(frozen=True)
class AlignmentConfig:
    """The second loss, on the visual tokens inside the language model (L_VRA; variants and equations in docs/concepts/alignment_loss.md)."""

    objective: Literal["none", "cosine", "relation"] = "none"
    """`none` is the baseline; `relation` compares the two tables of similarities between the tokens of an image."""
    weight: float = 0.5
    """lambda in L = L_LM + lambda * L_VRA."""
    layer: tuple[int, ...] = (3,)
    """Layers l that are aligned, 1 to the language model's last."""
    heads: Literal["each", "shared", "none"] = "each"
    """A head for each layer, one for all, or `none`, where `relation` compares the tokens as they are."""
    where: Literal["output", "attention"] = "output"
    """What of a layer: its output, or that of its attention, all heads side by side (the input of o_proj)."""
    target: Literal["vfm", "encoder", "projector"] = "vfm"
    """`encoder` is what the model's own connector receives, `projector` what it gives (without gradient)."""
    vfm: tuple[str, ...] = ("efficientnet-lite0",)
    """Names that `python -m workbench.vfm` lists, hf:ID, timm:NAME, or folders; with several, each has its own heads and L_VRA is the mean."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How lambda goes from `weight`, after the warm-up, to `final_weight` in the last step."""
    final_weight: float | None = None
    """0 by default; for `linear` and `cosine` only."""
    warmup: int = 0
    """Steps in which lambda rises to `weight`."""
    teacher_norm: Literal["own", "student"] = "own"
    """Whose normalisation the VFM's pixels get; `student` is CLIP's, as in the official code of the paper, whatever the VFM was trained on."""
    hidden: int = 256
    """Width of a head's two hidden layers."""
    images: Literal["same", "others"] = "same"
    """`others` is a control: the target is the feature map of another training image, the same one at every step."""
    center: bool = False
    """Subtract the training set's mean feature vector from the target, so that a constant prediction earns nothing."""
    residual: Literal["none", "encoder", "projector"] = "none"
    """Add the image again to the visual tokens after each layer of `layer`: a light adapter of what the connector receives, or what it gave."""

    def __post_init__(self) -> None:
        for name, values in (("layer", self.layer), ("vfm", self.vfm)):
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"alignment.{name} is {_listed(values)}: expected one or more, none of them twice")
        _at_least("alignment.", 0, weight=self.weight, warmup=self.warmup, final_weight=self.final_weight or 0.0)
        _at_least("alignment.", 1, hidden=self.hidden, layer=min(self.layer))
        if self.objective == "cosine" and self.heads == "none":
            raise ConfigError("alignment.heads is none: expected each or shared for the cosine objective, whose two sides have different widths")
        if self.schedule == "constant" and self.final_weight is not None:
            raise ConfigError(f"alignment.final_weight is {self.final_weight}: expected none for a constant schedule, or schedule linear or cosine")
        if self.target == "projector" and (self.center or self.images == "others"):
            raise ConfigError("alignment.target is projector, which changes in training: expected no center and no other images for it")

    @property
    def aligned(self) -> bool:
        return self.objective != "none"


@dataclass(frozen=True)
class MonitorConfig:
    """What is watched while training (docs/howto/watch.md)."""

    cknna_images: int = 32
    """The first so many images of the validation split, on which CKNNA of the aligned layer is measured at every evaluation; 0 for none."""
    k: int = 10
    """Neighbours of CKNNA."""
    permutations: int = 20
    """Of the pairing, for its chance level."""
    head_steps: int = 5
    """A head that has not moved after so many steps is warned of."""

    def __post_init__(self) -> None:
        _at_least("monitor.", 0, cknna_images=self.cknna_images)
        _at_least("monitor.", 1, k=self.k, head_steps=self.head_steps)
        _at_least("monitor.", 10, permutations=self.permutations)


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values)) or "empty"


@dataclass(frozen=True)
class Recipe:
    """A training run. `python -m trainer RECIPE --section.key value ...`"""

    output_dir: Path = Path("runs/model")
    """A new folder; it becomes a plain transformers model folder."""
    seed: int = 0
    start: Path | None = None
    """What this run starts from, by default nothing: a finished training folder, or the recipe of a first stage (a YAML beside this one), which
    is trained with this seed beside output_dir if it is not there yet."""
    resume: bool = False
    """Continue from the newest whole checkpoint in output_dir."""
    repaired: bool = False
    """With `resume`: the data may have other content than before, such as an image that was replaced or fewer rows; the others keep their order, and the
    record says so."""
    dry_run: bool = False
    """Train nothing: check names, shapes, data and disk, and say how large everything is; reads configurations, no weights, and writes nothing."""
    log_every: int = 20
    """Steps between rows of the training log."""
    eval_every: int = 200
    """Steps between evaluations on the validation split."""
    save_every: int = 400
    """Steps between checkpoints."""
    keep_checkpoints: int | None = 2
    """The newest so many stay; None (null) keeps all, which `analyses.dynamics` reads."""
    keep_best: bool = False
    """Keep the model of the highest validation score (mean accuracy of the types, or the least loss) as `best/` too; it is evaluated as the last one is."""
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
        _at_least("", 1, log_every=self.log_every, eval_every=self.eval_every, save_every=self.save_every)
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}: expected 0 to {2**32 - 1}")
        if self.keep_checkpoints is not None:
            _at_least("", 1, keep_checkpoints=self.keep_checkpoints)
        if self.repaired and not self.resume:
            raise ConfigError("repaired is yes without resume: expected both, since it says that a run goes on with other data")
        if self.save_every % self.log_every:
            raise ConfigError(f"save_every is {self.save_every}: expected a multiple of log_every = {self.log_every}, so that a resumed log is exact")
        if self.alignment.aligned and self.alignment.warmup > self.optim.steps:
            raise ConfigError(f"alignment.warmup is {self.alignment.warmup}: expected at most optim.steps = {self.optim.steps}")
        if self.alignment.aligned and self.alignment.schedule != "constant" and self.alignment.warmup == self.optim.steps:
            raise ConfigError(
                f"alignment.warmup is {self.alignment.warmup}, all steps: expected fewer for schedule {self.alignment.schedule}, which follows it"
            )
        if self.model.released:
            self._check_released()
            return
        if len(self.data.train) > 1 or self.data.max_length is not None:
            key, value = ("train", _listed(self.data.train)) if len(self.data.train) > 1 else ("max_length", self.data.max_length)
            raise ConfigError(f"data.{key} is {value}: expected {'one data set' if key == 'train' else 'none'} for a small LLaVA, whose questions are packed")
        if self.data.weights:
            raise ConfigError(
                f"data.weights is {_listed(self.data.weights)}: expected none for a small LLaVA, which learns from one data set; see data.limit_train"
            )
        if self.optim.checkpointing or self.optim.connector_rate is not None:
            raise ConfigError("optim.checkpointing and optim.connector_rate are for a released model: expected model.name, or a tower and a language model")
        if self.model.second_encoder is not None:
            for key, value in (("target", self.alignment.target if self.alignment.aligned else ""), ("residual", self.alignment.residual)):
                if value == "encoder":  # of two encoders side by side, the one with the larger numbers alone would count
                    expected = "another, since it would mix two encoders; alignment.vfm takes several, each with its own heads"
                    raise ConfigError(f"alignment.{key} is encoder with model.second_encoder {self.model.second_encoder}: expected {expected}")
        if self.model.language is None:
            self.check_layer(self.model.layers)

    def _check_released(self) -> None:
        """What a released model cannot be asked for."""
        if self.start is not None:
            raise ConfigError(f"start is {self.start}: expected none for a released model; a folder to start from is a model.name")
        own = self.alignment
        if (own.center or own.images == "others") and (own.target == "encoder" or self.data.features == "compute"):
            raise ConfigError("alignment.center and images others need all targets beforehand: expected target vfm and data.features cache")

    def check_layer(self, layers: int) -> None:
        """See that the aligned layers are the model's; a pretrained language model says only when it is loaded how many it has."""
        if (self.alignment.aligned or self.alignment.residual != "none") and max(self.alignment.layer) > layers:
            raise ConfigError(f"alignment.layer is {max(self.alignment.layer)}: expected 1 to {layers}, the layers of the model")
