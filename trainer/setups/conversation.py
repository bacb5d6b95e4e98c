"""Training of a pretrained or an assembled model on conversations."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import set_seed

from trainer import distributed
from trainer.aligned_model import AlignedMLLMForConditionalGeneration
from trainer.alignment import Alignment, attach_alignment
from trainer.build.assembled_llava import build_from_parts
from trainer.build.partition import checkpoint_activations, choose_trained
from trainer.evaluation import Evaluation, answer_questions, language_loss
from trainer.frozen import check_frozen, frozen_fingerprint
from trainer.preflight import look_through
from trainer.recipe import AlignmentConfig, DataConfig, ModelConfig, Recipe
from trainer.setups.base import MonitorBatch, MonitorBatches
from trainer.setups.conversation_data import Collator, ConversationSet, GroupedSampler
from trainer.setups.packed_data import first_questions, load_training
from trainer.setups.rows import Rows
from trainer.setups.stored_targets import StoredTargets
from trainer.targets.vfm_targets import Targets, load_vfms, vfm_record
from workbench.capture.hidden_states import read
from workbench.data import Dataset, Sample, load_data
from workbench.data.base import mixed
from workbench.errors import ConfigError
from workbench.mllm import MLLM
from workbench.mllm.conversation import IGNORED, encode_conversations
from workbench.mllm.residual import KEY, Residual, attach_residual
from workbench.scoring.questions import option_ids, questions_of
from workbench.vfm import VFM

log = logging.getLogger(__name__)
CONVERSATIONS_CHECKED = 4  # of each kind, with and without images


@dataclass(frozen=True)
class ConversationSplits:
    """The data of a run; `test` is None if the finished model is evaluated on `val`."""

    train: ConversationSet
    val: ConversationSet
    test: ConversationSet | None

    @property
    def all(self) -> list[ConversationSet]:
        """The splits that the run has, in the order train, val, test."""
        return [data for data in (self.train, self.val, self.test) if data is not None]

    @property
    def evaluated(self) -> list[ConversationSet]:
        """The splits that the model is evaluated on."""
        return self.all[1:]


@dataclass(frozen=True)
class ConversationSetup:
    """A multimodal model and the conversations that it learns from; see `Setup`.

    Attributes:
        test: what the finished model is evaluated on; None if that is `val`.
        questions: questions with options of `val` and, if there is one, of `test`, by image. Where they are empty, the
            loss is evaluated instead of the accuracy.
        trained: the part that each trained parameter of the model belongs to, by the parameter's name.
        frozen: fingerprint of all other parameters.
        vfms: the VFMs whose features are alignment targets.
    """

    recipe: Recipe
    model: AlignedMLLMForConditionalGeneration
    mllm: MLLM
    train: ConversationSet
    val: ConversationSet
    test: ConversationSet | None
    collate: Collator
    questions: list[list[list[Sample]]]
    trained: dict[str, str]
    frozen: str
    vfms: Sequence[VFM]
    record: dict[str, object]
    unit: ClassVar[str] = "conversations"

    @classmethod
    def from_recipe(cls, recipe: Recipe, checkpoint: Path | None = None) -> ConversationSetup:
        """Load data, model and features; see `Setup`. A resumed run has the order of the rows in its checkpoint."""
        splits = load_conversations(recipe, Rows.load(checkpoint) if checkpoint is not None else None)
        set_seed(recipe.seed)
        mllm = _load_model(recipe.model)
        questions = check_conversations(recipe, mllm, splits)
        record = _sources_record(mllm, splits, recipe.data.max_length)
        trained = choose_trained(mllm, recipe.model)
        if recipe.optim.checkpointing:
            checkpoint_activations(mllm.model)
        settings = recipe.alignment
        width = encoder_width(mllm, splits.train) if settings.reads_encoder else 0
        residual = _add_residual(mllm, settings, width)
        vfms, targets = _load_targets(mllm, splits.train, recipe)
        heads = _attach_heads(mllm, settings, targets, width, recipe.seed)
        frozen = frozen_fingerprint(mllm.model, mllm.model.state_dict())
        sizes = _parameter_counts(mllm, trained, residual, heads)
        return cls(
            recipe=recipe,
            model=AlignedMLLMForConditionalGeneration(mllm, heads, residual, target=settings.target),
            mllm=mllm,
            train=splits.train,
            val=splits.val,
            test=splits.test,
            collate=Collator(
                mllm, splits.train, recipe.data.max_length, targets, count_tiles=settings.objective == "relation"
            ),
            questions=questions,
            trained=trained,
            frozen=frozen,
            vfms=vfms,
            record=record | (vfm_record(vfms) if vfms else {}) | {"trained": sizes},
        )

    @property
    def processor(self) -> Any:
        """The model's."""
        return self.mllm.processor

    def sampler(self, processes: int) -> GroupedSampler:
        optim = self.recipe.optim
        group = optim.images(processes)
        return GroupedSampler(
            self.train.rows, group, group * optim.steps, self.recipe.seed, grouped=self.recipe.data.group
        )

    def warnings(self, processes: int) -> list[str]:
        rare_kind = self.sampler(processes).rare_kind()
        return [*self.train.warnings(), *self.val.warnings(), *([rare_kind] if rare_kind else [])]

    def count_aligned(self, batch: dict[str, Any]) -> Tensor:
        """Return the number that the Collator counted."""
        return torch.tensor(batch["aligned"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return AdamW's parameter groups: the projector may have its own learning rate; vectors do not decay."""
        optim = self.recipe.optim
        trainable = [(name.removeprefix("base."), p) for name, p in self.model.named_parameters() if p.requires_grad]
        rates = {
            True: optim.learning_rate if optim.connector_rate is None else optim.connector_rate,
            False: optim.learning_rate,
        }
        groups = []
        for connector, rate in rates.items():
            values = [p for name, p in trainable if (self.trained.get(name) == "connector") == connector]
            groups.append({"params": [p for p in values if p.ndim > 1], "lr": rate, "weight_decay": optim.weight_decay})
            groups.append({"params": [p for p in values if p.ndim <= 1], "lr": rate, "weight_decay": 0.0})
        return groups

    def evaluate(self, *, final: bool = False) -> Evaluation:
        """Return the answers to the questions with options or, if there are none, the loss of each conversation."""
        was_training, batch_size = self.model.training, self.recipe.optim.batch_size
        data, questions = self.val, self.questions[0]
        if final and self.test is not None:
            data, questions = self.test, self.questions[1]
        self.model.eval()
        try:
            if questions:
                return Evaluation(answer_questions(self.model, self.mllm, questions, batch_size))
            return Evaluation(language_loss(self.model, self.mllm, data, batch_size, self.collate.max_length))
        finally:
            self.model.train(was_training)

    def monitor_batches(self) -> MonitorBatches:
        """Return the first validation conversations with an image; see `Setup`.

        Raises:
            ConfigError: there is no conversation with an image.
            DataError: the model's visual tokens have no rows and columns.
        """
        batch_size = self.recipe.optim.batch_size
        numbers = [n for n, c in enumerate(self.val.conversations) if c.loads][: self.recipe.monitor.cknna_images]
        if not numbers:
            raise ConfigError(f"no conversation of {self.val.data.name} has an image")
        vfms = self.vfms or load_vfms(self.recipe.alignment, str(self.mllm.device))
        collate, targets = Collator(self.mllm, self.val, self.collate.max_length), Targets(vfms)
        batches = [
            self._monitor_batch(numbers[start : start + batch_size], collate, targets)
            for start in range(0, len(numbers), batch_size)
        ]
        return MonitorBatches(batches, vfm_record(vfms)["vfm_fingerprint"])

    def _monitor_batch(self, numbers: list[int], collate: Collator, targets: Targets) -> MonitorBatch:
        inputs = collate(numbers)
        images = [self.val.conversations[number].images for number in numbers]
        # one entry per image: its row of the batch, and its patch grids (several if the image is tiled)
        grids_by_image = [
            (row, [grid for grid in inputs["visual"][row] if grid.image == image])
            for row, row_images in enumerate(images)
            for image in range(len(row_images))
        ]
        features_by_row = targets(numbers, images, inputs["visual"])
        vfm_features = {}
        for name, rows in features_by_row.items():
            remaining = [iter(features) for features in rows]  # of each row, in the order of its patch grids
            vfm_features[name] = [[next(remaining[row]) for _ in grids] for row, grids in grids_by_image]
        visual = [(row, [grid.index for grid in grids]) for row, grids in grids_by_image]
        return MonitorBatch(inputs, visual, vfm_features)

    def check_frozen(self, state: Mapping[str, Tensor]) -> None:
        check_frozen(self.mllm.model, state, self.frozen, self.vfms)

    def write_extras(self, checkpoint: Path) -> None:
        """Write the rows that the order of the training depends on."""
        self.train.rows.save(checkpoint)


# --- data -----------------------------------------------------------------------------------------


def load_conversations(recipe: Recipe, stored: Rows | None = None) -> ConversationSplits:
    """Load the training, validation and, if the recipe has it, test data.

    Args:
        stored: for a resumed run, the training rows that it was started with; see `ConversationSet`.

    Raises:
        ConfigError: see `_check_kinds`.
    """
    config = recipe.data

    def load_evaluated(spec: str, limit: int | None) -> ConversationSet:
        return ConversationSet(first_questions(load_data(spec, limit=limit), config.questions))

    parts = [
        first_questions(load_training(spec, config.limit_train, recipe.seed), config.questions) for spec in config.train
    ]
    weights = config.weights or (1.0,) * len(parts)
    train = parts[0] if len(parts) == 1 and weights == (1.0,) else mixed(parts, weights, recipe.seed)
    _check_kinds(train, config)
    test = None if config.test is None else load_evaluated(config.test, config.limit_test)
    return ConversationSplits(ConversationSet(train, parts, stored), load_evaluated(config.val, config.limit_val), test)


def _check_kinds(data: Dataset, config: DataConfig) -> None:
    """Check that the launch file can train on data that mix conversations with images and conversations without.

    Raises:
        ConfigError: the launch file is ZeRO-3's; or it is FSDP's and the kinds are not grouped, so that a rank with an
            image would wait forever for the others to gather the vision encoder's weights.
    """
    strategy, kinds = distributed.strategy(), {bool(c.loads) for c in data.conversations}
    if strategy == "zero3" and len(kinds) > 1:
        raise ConfigError(
            "zero3 cannot train on conversations with and without images: expected the launch file fsdp.yaml, since"
            " DeepSpeed applies an old gradient again to parameters that get none from a text"
        )
    if distributed.is_sharded() and not config.group and len(kinds) > 1:
        raise ConfigError(
            f"data.group is no with {strategy} for conversations with and without images: expected yes, since ranks"
            " that share the weights must have images in the same forward passes"
        )


# --- checks that recipe, model and data fit together ---------------------------------------------


def check_conversations(recipe: Recipe, mllm: MLLM, splits: ConversationSplits) -> list[list[list[Sample]]]:
    """Check that recipe, model and data fit together, before anything is written.

    All texts are read; the first conversations with and without images are encoded.

    Returns:
        The questions with options, by image, of the validation split and, if there is one, of the test split. An empty
        list for a split whose questions have no options.

    Raises:
        WorkbenchError: recipe, model and data do not fit together.
    """
    _check_model(mllm, recipe.model)
    recipe.alignment.check_layers(mllm.n_layers)
    mllm.control_tokens_as_words = recipe.data.control_tokens == "words"
    for data in splits.all:
        _check_texts(mllm, data, recipe.data.max_length)
    if recipe.alignment.changes_layers and not any(c.loads for c in splits.train.conversations):
        count, name = len(splits.train), splits.train.data.name
        raise ConfigError(
            f"none of the {count} conversations of {name} has an image: expected some, or alignment.objective none"
        )
    return [_questions_with_options(mllm, data.data) for data in splits.evaluated]


def _check_model(mllm: MLLM, config: ModelConfig) -> None:
    if hasattr(mllm.config, KEY):
        raise ConfigError(
            f"model.name is {config.name}, which has a residual: expected a model trained without a residual"
        )
    if (quantized := getattr(mllm.config, "quantization_config", None)) is not None:
        if isinstance(quantized, dict):
            method = quantized.get("quant_method")
        else:
            method = getattr(quantized, "quant_method", quantized)
        raise ConfigError(
            f"model.name is {config.name}, quantized with {getattr(method, 'value', method)}: expected a model in full"
            " precision, since a quantized one cannot be trained"
        )


def _check_texts(mllm: MLLM, data: ConversationSet, max_length: int | None) -> None:
    """Check all texts, and that `max_length` does not cut off the answers of all the first conversations of a kind."""
    if distributed.is_main():  # an error on the main rank ends the others too
        data.preflight_warnings = look_through(mllm, data, max_length)
    for with_image in (True, False):
        first = [c for c in data.conversations if bool(c.loads) == with_image][:CONVERSATIONS_CHECKED]
        has_answer = [
            bool(encode_conversations(mllm, [c.images], [c.turns], max_length=max_length)[1].ne(IGNORED).any())
            for c in first
        ]
        if first and not any(has_answer):
            kind = "with" if with_image else "without"
            which = f"the first {len(first)} conversations {kind} an image of {data.data.name}"
            raise ConfigError(
                f"data.max_length is {max_length}, which leaves none of the answers in {which}: expected more tokens"
            )


def _questions_with_options(mllm: MLLM, data: Dataset) -> list[list[Sample]]:
    """Return the questions by image; an empty list if none has options.

    Raises:
        ConfigError: the answer of a question is not among its options.
    """
    if lost := [sample for sample in data if sample.options and sample.answer not in sample.options]:
        raise ConfigError(
            f"the answer '{lost[0].answer}' of question {lost[0].id} of {data.name} is not among its options"
            f" ({len(lost)} such questions): expected one of them"
        )
    if not any(sample.options for sample in data):
        return []
    scenes = questions_of(data.scenes)
    option_ids(mllm, [sample for scene in scenes for sample in scene])  # raises if the options cannot be scored
    return scenes


# --- the steps of from_recipe, in their order -----------------------------------------------------


def _load_model(config: ModelConfig) -> MLLM:
    """Load the model in float32 onto the device of this rank."""
    device = distributed.device()
    mllm = (
        build_from_parts(config)
        if config.name is None
        else MLLM.load(config.name, dtype="float32", device=device, revision=config.revision)
    )
    mllm.model.to(device)
    return mllm


def _sources_record(mllm: MLLM, splits: ConversationSplits, max_length: int | None) -> dict[str, object]:
    """Return the record's entries about model and data."""
    record: dict[str, object] = {"model": mllm.name, "model_fingerprint": mllm.fingerprint}
    record |= {"data": splits.train.data.fingerprint, "val": splits.val.data.fingerprint}
    record |= {} if splits.test is None else {"test": splits.test.data.fingerprint}
    left_out = [sentence for data in splits.all for sentence in data.warnings()]
    record |= {"max_length": max_length, "left_out": left_out, "dropped": splits.train.dropped}
    return record | {"commit": getattr(mllm.config, "_commit_hash", None)}  # the commit that a hub id resolved to


def encoder_width(mllm: MLLM, train: ConversationSet) -> int:
    """Return the number of features that the projector receives for each visual token.

    Raises:
        ConfigError: no training conversation has an image to measure it on.
    """
    first = next((c for c in train.conversations if c.loads), None)
    if first is None:
        raise ConfigError("alignment uses the encoder's features, but no training conversation has an image")
    features = read(mllm, mllm.encode([first.images], ["?"]), layers=[0], encoder=True)[0].encoder_features
    assert features is not None
    return int(features.shape[-1])


def _add_residual(mllm: MLLM, settings: AlignmentConfig, width: int) -> Residual | None:
    """Add the residual, if the recipe has one, and return it.

    Args:
        width: number of features that the projector receives per visual token.
    """
    if settings.residual == "none":
        return None
    mllm.residual = attach_residual(mllm.model, settings.residual, sorted(settings.layer), width)
    return mllm.residual


def _load_targets(mllm: MLLM, train: ConversationSet, recipe: Recipe) -> tuple[Sequence[VFM], Targets | None]:
    """Load the VFMs of the recipe's targets, and return them with what computes or reads their features for a batch.

    Without an alignment, or where the target is the model's own encoder or projector, there are no VFMs and the second
    value is None.
    """
    settings, data = recipe.alignment, recipe.data
    if not settings.aligned or settings.target != "vfm":
        return (), None
    vfms = load_vfms(settings, str(mllm.device))
    if data.features == "compute":
        return vfms, Targets(vfms)
    return vfms, StoredTargets(vfms, mllm, train, settings, recipe.seed, data.max_length)


def _attach_heads(
    mllm: MLLM, settings: AlignmentConfig, targets: Targets | None, width: int, seed: int
) -> Alignment | None:
    """Attach the alignment heads, drawn from the seed, and return them; None for a baseline.

    Args:
        width: number of features that the projector receives per visual token.
    """
    if settings.objective == "none":
        return None
    torch.manual_seed(seed)
    widths: dict[str, int] = {"encoder": width, "projector": mllm.config.get_text_config().hidden_size}
    dims: dict[str, int] = targets.dims if targets is not None else {settings.target: widths[settings.target]}
    return attach_alignment(
        mllm,
        layers=settings.layer,
        dims=dims,
        objective=settings.objective,
        heads=settings.heads,
        where=settings.where,
        hidden=settings.hidden,
    )


def _parameter_counts(
    mllm: MLLM, trained: Mapping[str, str], residual: torch.nn.Module | None, heads: torch.nn.Module | None
) -> dict[str, int]:
    """Return the number of trained parameters of each part."""
    counts = dict.fromkeys(("tower", "connector", "language", "lora"), 0)
    for name, p in mllm.model.named_parameters():
        if name in trained:
            counts[trained[name]] += p.numel()
    for part, module in (("residual", residual), ("head", heads)):
        counts[part] = 0 if module is None else sum(p.numel() for p in module.parameters())
    return counts
