"""Recipes: the dataclasses of every key that determines a training run.

The sections `model` and `alignment` are in modules of their own. The text below a field is what `python -m trainer
--help` and the documentation show for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le, Lt

from trainer.alignment_config import AlignmentConfig
from trainer.model_config import ModelConfig
from workbench.errors import ConfigError, listed
from workbench.options import check_options
from workbench.stored_recipe import RENAMED


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
        check_options(self, "data.")
        if not self.train:
            raise ConfigError("data.train is empty: expected a data set, such as shapes:train")
        if self.weights and (
            len(self.weights) != len(self.train) or not all(0 < weight < float("inf") for weight in self.weights)
        ):
            raise ConfigError(
                f"data.weights is {listed(self.weights)}: expected {len(self.train)} numbers above 0, one for each of"
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
    """Learning rate that the cosine reaches after the last step, as a fraction of `learning_rate`."""
    warmup: Annotated[int, Ge(0)] = 80
    """Optimizer steps in which the learning rate rises from 0 to `learning_rate`."""
    weight_decay: Annotated[float, Ge(0)] = 0.05
    """AdamW's weight decay."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """AdamW's decay rate of the mean gradient."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.98
    """AdamW's decay rate of the mean squared gradient."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Norm to which a larger gradient is scaled down; 0 for no limit."""
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
        check_options(self, "optim.")
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
        check_options(self, "monitor.")


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
        check_options(self)
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
                f"data.train is {listed(data.train)}: expected one data set, since a toy LLaVA cannot mix several"
            )
        if data.max_length is not None:
            raise ConfigError(
                f"data.max_length is {data.max_length}, but a toy LLaVA's questions are packed and never cut: leave"
                " data.max_length out"
            )
        if data.weights:
            raise ConfigError(
                f"data.weights is {listed(data.weights)}, but a toy LLaVA is trained on one data set: leave"
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
