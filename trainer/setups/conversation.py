"""Training of any model of workbench/mllm on conversations: a pretrained one, or one that is assembled from parts."""

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
from trainer.setups.base import Watched, WatchedBatch
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
LOOKED_AT = 4  # conversations of each kind


@dataclass(frozen=True)
class ConversationSplits:
    """The data of a run; `test` is None where the finished model is evaluated on `val`."""

    train: ConversationSet
    val: ConversationSet
    test: ConversationSet | None

    @property
    def all(self) -> list[ConversationSet]:
        """Those that there are."""
        return [data for data in (self.train, self.val, self.test) if data is not None]

    @property
    def evaluated(self) -> list[ConversationSet]:
        """Those that the model is evaluated on."""
        return self.all[1:]


@dataclass(frozen=True)
class ConversationSetup:
    """A multimodal model and the conversations that it learns from; see `Setup`.

    Attributes:
        test: what the finished model is evaluated on, where that is not `val`.
        questions: of `val` and of `test`, by image, where they have options; else the loss is what is evaluated.
        trained: part of each trained parameter of the model, by name.
        frozen: fingerprint of all others.
        vfms: the targets' networks.
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
        """See `Setup`; a run goes on with the order of the rows in its checkpoint."""
        splits = load_conversations(recipe, Rows.load(checkpoint) if checkpoint is not None else None)
        set_seed(recipe.seed)
        mllm = _load_model(recipe.model)
        questions = check_conversations(recipe, mllm, splits)
        record = _sources(mllm, splits, recipe.data.max_length)
        trained = choose_trained(mllm, recipe.model)
        if recipe.optim.checkpointing:
            checkpoint_activations(mllm.model)
        settings = recipe.alignment
        width = encoder_width(mllm, splits.train) if settings.reads_encoder else 0
        residual = _add_residual(mllm, settings, width)
        vfms, targets = _targets(mllm, splits.train, recipe)
        heads = _heads(mllm, settings, targets, width, recipe.seed)
        frozen = frozen_fingerprint(mllm.model, mllm.model.state_dict())
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
            record=record | (vfm_record(vfms) if vfms else {}) | {"trained": _sizes(mllm, trained, residual, heads)},
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

    def known(self, processes: int) -> list[str]:
        left_out = self.sampler(processes).left_out()
        return [*self.train.sentences(), *self.val.sentences(), *([left_out] if left_out else [])]

    def aligned(self, batch: dict[str, Any]) -> Tensor:
        """As the Collator counted it."""
        return torch.tensor(batch["aligned"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The projector may have a learning rate of its own; vectors are not decayed."""
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
        """Answers to the questions, or the loss on each conversation."""
        was_training, batch_size = self.model.training, self.recipe.optim.batch_size
        data, questions = (
            (self.val, self.questions[0]) if self.test is None or not final else (self.test, self.questions[1])
        )
        self.model.eval()
        try:
            if questions:
                return Evaluation(answer_questions(self.model, self.mllm, questions, batch_size))
            return Evaluation(language_loss(self.model, self.mllm, data, batch_size, self.collate.max_length))
        finally:
            self.model.train(was_training)

    def watched(self) -> Watched:
        """The first validation conversations with an image.

        Raises:
            ConfigError: there is none.
            DataError: the model's visual tokens have no rows and columns.
        """
        size = self.recipe.optim.batch_size
        numbers = [n for n, c in enumerate(self.val.conversations) if c.loads][: self.recipe.monitor.cknna_images]
        if not numbers:
            raise ConfigError(f"no conversation of {self.val.data.name} has an image")
        vfms = self.vfms or load_vfms(self.recipe.alignment, str(self.mllm.device))
        collate, targets = Collator(self.mllm, self.val, self.collate.max_length), Targets(vfms)
        batches = [
            self._watched_batch(numbers[start : start + size], collate, targets)
            for start in range(0, len(numbers), size)
        ]
        return Watched(batches, vfm_record(vfms)["vfm_fingerprint"])

    def _watched_batch(self, numbers: list[int], collate: Collator, targets: Targets) -> WatchedBatch:
        inputs = collate(numbers)
        images = [self.val.conversations[n].images for n in numbers]
        groups = [
            (row, n, [p for p in inputs["visual"][row] if p.image == n])
            for row, shown in enumerate(images)
            for n in range(len(shown))
        ]
        flat = {name: [iter(row) for row in rows] for name, rows in targets(numbers, images, inputs["visual"]).items()}
        patches = {name: [[next(rows[row]) for _ in parts] for row, _, parts in groups] for name, rows in flat.items()}
        return WatchedBatch(inputs, [(row, [p.index for p in parts]) for row, _, parts in groups], patches)

    def check_frozen(self, state: Mapping[str, Tensor]) -> None:
        check_frozen(self.mllm.model, state, self.frozen, self.vfms)

    def write_extras(self, checkpoint: Path) -> None:
        """The rows that the order is of."""
        self.train.rows.save(checkpoint)


# --- data -----------------------------------------------------------------------------------------


def load_conversations(recipe: Recipe, stored: Rows | None = None) -> ConversationSplits:
    """Return training, validation and, where the recipe has it, test data.

    Args:
        stored: the training rows that the run was started with, see ConversationSet.

    Raises:
        ConfigError: see `_check_kinds`.
    """
    config = recipe.data

    def evaluated(spec: str, limit: int | None) -> ConversationSet:
        return ConversationSet(first_questions(load_data(spec, limit=limit), config.questions))

    parts = [
        first_questions(load_training(spec, config.limit_train, recipe.seed), config.questions) for spec in config.train
    ]
    weights = config.weights or (1.0,) * len(parts)
    whole = parts[0] if len(parts) == 1 and weights == (1.0,) else mixed(parts, weights, recipe.seed)
    _check_kinds(whole, config)
    test = None if config.test is None else evaluated(config.test, config.limit_test)
    return ConversationSplits(ConversationSet(whole, parts, stored), evaluated(config.val, config.limit_val), test)


def _check_kinds(data: Dataset, config: DataConfig) -> None:
    """Check that the launch file can train on conversations with and without images, where the data have both.

    Raises:
        ConfigError: for ZeRO-3; or in random order, for FSDP: a process that has an image would wait for the others to
            gather the vision encoder's weights.
    """
    strategy, kinds = distributed.strategy(), {bool(c.loads) for c in data.conversations}
    if strategy == "zero3" and len(kinds) > 1:
        raise ConfigError(
            "zero3 for conversations with and without images: expected fsdp.yaml, since DeepSpeed takes the last"
            " gradient again of what texts do not reach"
        )
    if distributed.is_sharded() and not config.group and len(kinds) > 1:
        raise ConfigError(
            f"data.group is no with {strategy} for conversations with and without images: expected yes, since processes"
            " that divide the weights must have images in the same passes"
        )


# --- the checks of model and data against one another ---------------------------------------------


def check_conversations(recipe: Recipe, mllm: MLLM, splits: ConversationSplits) -> list[list[list[Sample]]]:
    """Check that recipe, model and data fit one another, before anything is written: by all texts, and by the first
    conversations of each kind.

    Returns:
        Questions with options, by image, if there are any: of the validation split, and of the test split if there is
            one.

    Raises:
        WorkbenchError: they do not.
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
    return [_questions(mllm, data.data) for data in splits.evaluated]


def _check_model(mllm: MLLM, config: ModelConfig) -> None:
    if hasattr(mllm.config, KEY):
        raise ConfigError(
            f"model.name is {config.name}, which adds its image again: expected a model trained without a residual"
        )
    if (quantized := getattr(mllm.config, "quantization_config", None)) is not None:
        method = (
            quantized.get("quant_method")
            if isinstance(quantized, dict)
            else getattr(quantized, "quant_method", quantized)
        )
        raise ConfigError(
            f"model.name is {config.name}, quantized with {getattr(method, 'value', method)}: expected full precision,"
            " to train it"
        )


def _check_texts(mllm: MLLM, data: ConversationSet, max_length: int | None) -> None:
    """Look through all texts, and see that `max_length` leaves an answer in some of the first conversations with and
    without images."""
    if distributed.is_main():  # whose error the others hear of
        data.said = look_through(mllm, data, max_length)
    for kind in (True, False):
        few = [c for c in data.conversations if bool(c.loads) == kind][:LOOKED_AT]
        answered = [
            bool(encode_conversations(mllm, [c.images], [c.turns], max_length=max_length)[1].ne(IGNORED).any())
            for c in few
        ]
        if few and not any(answered):
            which = f"the first {len(few)} conversations {'with' if kind else 'without'} an image of {data.data.name}"
            raise ConfigError(
                f"data.max_length is {max_length}, which leaves none of the answers in {which}: expected more tokens"
            )


def _questions(mllm: MLLM, data: Dataset) -> list[list[Sample]]:
    """Questions with options, by image."""
    if lost := [sample for sample in data if sample.options and sample.answer not in sample.options]:
        raise ConfigError(
            f"question {lost[0].id} of {data.name} has its answer '{lost[0].answer}' not among its options ({len(lost)}"
            " such in all)"
        )
    if not any(sample.options for sample in data):
        return []
    scenes = questions_of(data.scenes)
    option_ids(mllm, [sample for scene in scenes for sample in scene])
    return scenes


# --- the steps of from_recipe, in their order -----------------------------------------------------


def _load_model(config: ModelConfig) -> MLLM:
    """The model in float32, on this process's device."""
    device = distributed.device()
    mllm = (
        build_from_parts(config)
        if config.name is None
        else MLLM.load(config.name, dtype="float32", device=device, revision=config.revision)
    )
    mllm.model.to(device)
    return mllm


def _sources(mllm: MLLM, splits: ConversationSplits, max_length: int | None) -> dict[str, object]:
    """What the record says of model and data."""
    record: dict[str, object] = {"model": mllm.name, "model_fingerprint": mllm.fingerprint}
    record |= {"data": splits.train.data.fingerprint, "val": splits.val.data.fingerprint}
    record |= {} if splits.test is None else {"test": splits.test.data.fingerprint}
    left_out = [sentence for data in splits.all for sentence in data.sentences()]
    record |= {"max_length": max_length, "left_out": left_out, "dropped": splits.train.dropped}
    return record | {"commit": getattr(mllm.config, "_commit_hash", None)}  # of a hub id, what its revision was


def encoder_width(mllm: MLLM, train: ConversationSet) -> int:
    """Return how many features of the vision encoder each visual token has."""
    first = next((c for c in train.conversations if c.loads), None)
    if first is None:
        raise ConfigError("alignment asks for the encoder's features, and no training conversation has an image")
    features = read(mllm, mllm.encode([first.images], ["?"]), layers=[0], encoder=True)[0].encoder_features
    assert features is not None
    return int(features.shape[-1])


def _add_residual(mllm: MLLM, settings: AlignmentConfig, width: int) -> Residual | None:
    """Add the residual where the recipe has one.

    Args:
        width: features of the projector's input.
    """
    if settings.residual == "none":
        return None
    mllm.residual = attach_residual(mllm.model, settings.residual, sorted(settings.layer), width)
    return mllm.residual


def _targets(mllm: MLLM, train: ConversationSet, recipe: Recipe) -> tuple[Sequence[VFM], Targets | None]:
    """The VFMs of the recipe's targets, and what returns their features for a batch; None where the target is the
    model's own."""
    settings, data = recipe.alignment, recipe.data
    if not settings.aligned or settings.target != "vfm":
        return (), None
    vfms = load_vfms(settings, str(mllm.device))
    if data.features == "compute":
        return vfms, Targets(vfms)
    return vfms, StoredTargets(vfms, mllm, train, settings, recipe.seed, data.max_length)


def _heads(mllm: MLLM, settings: AlignmentConfig, targets: Targets | None, width: int, seed: int) -> Alignment | None:
    """Attach the alignment heads, drawn from the seed; None for a baseline.

    Args:
        width: features of the projector's input.
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


def _sizes(
    mllm: MLLM, trained: Mapping[str, str], residual: torch.nn.Module | None, heads: torch.nn.Module | None
) -> dict[str, int]:
    """How many parameters are trained, by part."""
    sizes = dict.fromkeys(("tower", "connector", "language", "lora"), 0)
    for name, p in mllm.model.named_parameters():
        if name in trained:
            sizes[trained[name]] += p.numel()
    for part, module in (("residual", residual), ("head", heads)):
        sizes[part] = 0 if module is None else sum(p.numel() for p in module.parameters())
    return sizes
