"""Training of any model of workbench/mllm on conversations."""

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
from trainer.alignment import attach_alignment
from trainer.build.assembled_llava import build_from_parts
from trainer.build.partition import checkpoint_activations, choose_trained
from trainer.evaluation import Evaluation, answer_questions, language_loss
from trainer.frozen import check_frozen, frozen_fingerprint
from trainer.preflight import look_through
from trainer.recipe import OptimConfig, Recipe
from trainer.setups.base import Watched, WatchedBatch
from trainer.setups.conversation_data import Collator, ConversationSet, GroupedSampler
from trainer.setups.rows import Rows
from trainer.setups.stored_targets import StoredTargets
from trainer.targets.vfm_targets import Targets, load_vfms, vfm_record
from workbench.capture.hidden_states import read
from workbench.data import Dataset, Sample, load_data
from workbench.data.base import mixed
from workbench.errors import ConfigError
from workbench.mllm import MLLM
from workbench.mllm.conversation import IGNORED, encode_conversations
from workbench.mllm.residual import KEY, attach_residual
from workbench.scoring.questions import option_ids, questions_of
from workbench.vfm import VFM

log = logging.getLogger(__name__)
LOOKED_AT = 4  # conversations of each kind


@dataclass(frozen=True)
class PreparedStudent:
    """Everything a run needs before its first step.

    Attributes:
        test: what the finished model is evaluated on, where that is not `val`.
        questions: of `val` and of `test`, by image, where they have options; else the loss is what is evaluated.
        trained: part of each trained parameter of the model, by name.
        frozen: fingerprint of all others.
    """

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

    @property
    def processor(self) -> Any:
        """The model's own."""
        return self.mllm.processor

    def sampler(self, recipe: Recipe, count: int) -> GroupedSampler:
        """The order of conversations over the whole training in `count` processes, one optimiser step after another."""
        group = recipe.optim.images(count)
        return GroupedSampler(self.train.rows, group, group * recipe.optim.steps, recipe.seed, grouped=recipe.data.group)

    def known(self, recipe: Recipe, count: int) -> list[str]:
        """What should be said before the first step."""
        said = self.sampler(recipe, count).left_out()
        return [*self.train.sentences(), *self.val.sentences(), *([said] if said else [])]

    def parameter_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """For AdamW: the connector may have a learning rate of its own; vectors are not decayed."""
        own = [(name.removeprefix("student."), p) for name, p in self.model.named_parameters() if p.requires_grad]
        rates = {True: optim.learning_rate if optim.connector_rate is None else optim.connector_rate, False: optim.learning_rate}
        groups = []
        for connector, rate in rates.items():
            values = [p for name, p in own if (self.trained.get(name) == "connector") == connector]
            groups.append({"params": [p for p in values if p.ndim > 1], "lr": rate, "weight_decay": optim.weight_decay})
            groups.append({"params": [p for p in values if p.ndim <= 1], "lr": rate, "weight_decay": 0.0})
        return groups

    def evaluate(self, batch_size: int, *, final: bool = False) -> Evaluation:
        """Answers to the validation questions, or the loss on each validation conversation; of the test split where the run has one and is `final`."""
        was_training = self.model.training
        data, questions = (self.val, self.questions[0]) if self.test is None or not final else (self.test, self.questions[1])
        self.model.eval()
        try:
            if questions:
                return Evaluation(answer_questions(self.model, self.mllm, questions, batch_size))
            return Evaluation(language_loss(self.model, self.mllm, data, batch_size, self.collate.max_length))
        finally:
            self.model.train(was_training)

    def watched(self, recipe: Recipe) -> Watched:
        """The first validation conversations with an image.

        Raises:
            ConfigError: there is none.
            DataError: the model's visual tokens have no rows and columns.
        """
        numbers = [n for n, c in enumerate(self.val.conversations) if c.loads][: recipe.monitor.cknna_images]
        if not numbers:
            raise ConfigError(f"no conversation of {self.val.data.name} has an image")
        vfms = self.vfms or load_vfms(recipe.alignment, str(self.mllm.device))
        collate, targets = Collator(self.mllm, self.val, self.collate.max_length), Targets(vfms)
        batches = []
        for start in range(0, len(numbers), recipe.optim.batch_size):
            own = numbers[start : start + recipe.optim.batch_size]
            inputs = collate(own)
            images = [self.val.conversations[n].images for n in own]
            groups = [(row, n, [p for p in inputs["visual"][row] if p.image == n]) for row, shown in enumerate(images) for n in range(len(shown))]
            flat = {name: [iter(row) for row in rows] for name, rows in targets(own, images, inputs["visual"]).items()}
            patches = {name: [[next(rows[row]) for _ in parts] for row, _, parts in groups] for name, rows in flat.items()}
            batches.append(WatchedBatch(inputs, [(row, [p.index for p in parts]) for row, _, parts in groups], patches))
        return Watched(batches, vfm_record(vfms)["vfm_fingerprint"])

    def aligned(self, batch: dict[str, Any], objective: str) -> Tensor:
        """What the alignment loss of a batch is a mean over, as the Collator counted it: visual tokens, or images and tiles."""
        return torch.tensor(batch["aligned"])

    def check_frozen(self, state: Mapping[str, Tensor]) -> None:
        """See that training left alone what it should.

        Args:
            state: the model's tensors, whole.

        Raises:
            WeightsError: a frozen part of the model or a VFM no longer holds the values it began with.
        """
        check_frozen(self.mllm.model, state, self.frozen, self.vfms)


def prepare_student(recipe: Recipe, checkpoint: Path | None = None) -> PreparedStudent:
    """Load data, model and targets. The model's initial weights depend on the seed only, never on the alignment.

    Args:
        checkpoint: from which the run goes on, with the order of its rows.
    """
    train, val, test = load_conversations(recipe, Rows.load(checkpoint) if checkpoint is not None else None)
    set_seed(recipe.seed)
    device = distributed.device()
    if recipe.model.name is not None:
        mllm = MLLM.load(recipe.model.name, dtype="float32", device=device, revision=recipe.model.revision)
    else:
        mllm = build_from_parts(recipe.model)
    mllm.model.to(device)
    questions = check_student(recipe, mllm, train, val, test)
    record: dict[str, object] = {"model": mllm.name, "model_fingerprint": mllm.fingerprint, "data": train.data.fingerprint, "val": val.data.fingerprint}
    record |= {} if test is None else {"test": test.data.fingerprint}
    left_out = [sentence for data in (train, val, test) if data is not None for sentence in data.sentences()]
    record |= {"max_length": recipe.data.max_length, "left_out": left_out, "dropped": train.dropped}
    record["commit"] = getattr(mllm.config, "_commit_hash", None)  # of a hub id, what its revision was
    trained = choose_trained(mllm, recipe)
    if recipe.optim.checkpointing:
        checkpoint_activations(mllm.model)
    settings, residual, targets = recipe.alignment, None, None
    own_width = _own_width(mllm, train) if settings.residual == "encoder" or (settings.aligned and settings.target == "encoder") else 0
    if settings.residual != "none":
        residual = mllm.residual = attach_residual(mllm.model, settings.residual, sorted(settings.layer), own_width)
    vfms: Sequence[VFM] = ()
    alignment = None
    if settings.aligned:
        assert settings.objective != "none"
        dims = {"encoder": own_width, "projector": mllm.config.get_text_config().hidden_size}
        if settings.target == "vfm":
            vfms = load_vfms(settings, str(mllm.device))
            cached = recipe.data.features == "cache"
            targets = StoredTargets(vfms, mllm, train, settings, recipe.seed, recipe.data.max_length) if cached else Targets(vfms)
            record |= vfm_record(vfms)
        dims = targets.dims if targets is not None else {settings.target: dims[settings.target]}
        torch.manual_seed(recipe.seed)
        alignment = attach_alignment(
            mllm, layers=settings.layer, dims=dims, objective=settings.objective, heads=settings.heads, where=settings.where, hidden=settings.hidden
        )
    model = AlignedMLLMForConditionalGeneration(mllm, alignment, residual, target=settings.target)
    collate = Collator(mllm, train, recipe.data.max_length, targets, count_tiles=settings.objective == "relation")
    sizes = dict.fromkeys(("tower", "connector", "language", "lora"), 0)
    for name, p in mllm.model.named_parameters():
        if name in trained:
            sizes[trained[name]] += p.numel()
    sizes["residual"] = sum(p.numel() for p in residual.parameters()) if residual is not None else 0
    sizes["head"] = sum(p.numel() for p in alignment.parameters()) if alignment is not None else 0
    record["trained"] = sizes  # parameters
    frozen = frozen_fingerprint(mllm.model, mllm.model.state_dict())
    return PreparedStudent(model, mllm, train, val, test, collate, questions, trained, frozen, vfms, record)


def load_conversations(recipe: Recipe, stored: Rows | None = None) -> tuple[ConversationSet, ConversationSet, ConversationSet | None]:
    """Training, validation and, where the recipe has it, test data.

    Args:
        stored: the training rows that the run was started with, see ConversationSet.

    Raises:
        ConfigError: conversations with and without images, for ZeRO-3; or in random order, for FSDP: a process that has an image would wait for the others
            to gather the tower's weights.
    """
    from trainer.setups.packed_data import first_questions, load_training

    config = recipe.data

    def evaluated(spec: str, limit: int | None) -> ConversationSet:
        return ConversationSet(first_questions(load_data(spec, limit=limit), config.questions))

    parts = [first_questions(load_training(spec, config.limit_train, recipe.seed), config.questions) for spec in config.train]
    weights = config.weights or (1.0,) * len(parts)
    whole = parts[0] if len(parts) == 1 and weights == (1.0,) else mixed(parts, weights, recipe.seed)
    strategy, kinds = distributed.strategy(), {bool(c.loads) for c in whole.conversations}
    if strategy == "zero3" and len(kinds) > 1:
        raise ConfigError(
            "zero3 for conversations with and without images: expected fsdp.yaml, since DeepSpeed takes the last gradient again of what texts do not reach"
        )
    if distributed.divided() and not config.group and len(kinds) > 1:
        raise ConfigError(
            f"data.group is no with {strategy} for conversations with and without images: expected yes, since processes that divide the weights "
            "must have images in the same passes"
        )
    test = None if config.test is None else evaluated(config.test, config.limit_test)
    return ConversationSet(whole, parts, stored), evaluated(config.val, config.limit_val), test


def check_student(recipe: Recipe, mllm: MLLM, train: ConversationSet, val: ConversationSet, test: ConversationSet | None = None) -> list[list[list[Sample]]]:
    """See that recipe, model and data fit one another, before anything is written: by all texts, and by the first conversations of each kind.

    Returns:
        Questions with options, by image, if there are any: of the validation split, and of the test split if there is one.

    Raises:
        WorkbenchError: they do not.
    """
    if hasattr(mllm.config, KEY):
        raise ConfigError(f"model.name is {recipe.model.name}, which adds its image again: expected a model trained without a residual")
    if (quantized := getattr(mllm.config, "quantization_config", None)) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", quantized)
        raise ConfigError(f"model.name is {recipe.model.name}, quantized with {getattr(method, 'value', method)}: expected full precision, to train it")
    recipe.check_layer(mllm.n_layers)
    mllm.words = recipe.data.control_tokens == "words"
    for data in filter(None, (train, val, test)):
        if distributed.is_main():  # whose error the others hear of
            data.said = look_through(mllm, data, recipe.data.max_length)
        for kind in (True, False):
            few = [c for c in data.conversations if bool(c.loads) == kind][:LOOKED_AT]
            left = [bool(encode_conversations(mllm, [c.images], [c.turns], max_length=recipe.data.max_length)[1].ne(IGNORED).any()) for c in few]
            if few and not any(left):
                which = f"the first {len(few)} conversations {'with' if kind else 'without'} an image of {data.data.name}"
                raise ConfigError(f"data.max_length is {recipe.data.max_length}, which leaves none of the answers in {which}: expected more tokens")
    if (recipe.alignment.aligned or recipe.alignment.residual != "none") and not any(c.loads for c in train.conversations):
        raise ConfigError(f"none of the {len(train)} conversations of {train.data.name} has an image: expected some, or alignment.objective none")
    return [_questions(mllm, data.data) for data in (val, test) if data is not None]


def _questions(mllm: MLLM, data: Dataset) -> list[list[Sample]]:
    """Questions with options, by image."""
    if lost := [sample for sample in data if sample.options and sample.answer not in sample.options]:
        raise ConfigError(f"question {lost[0].id} of {data.name} has its answer '{lost[0].answer}' not among its options ({len(lost)} such in all)")
    if not any(sample.options for sample in data):
        return []
    scenes = questions_of(data.scenes)
    option_ids(mllm, [sample for scene in scenes for sample in scene])
    return scenes


def _own_width(mllm: MLLM, train: ConversationSet) -> int:
    """Features of the tower for each visual token."""
    first = next((c for c in train.conversations if c.loads), None)
    if first is None:
        raise ConfigError("alignment asks for the encoder's features, and no training conversation has an image")
    tower = read(mllm, mllm.encode([first.images], ["?"]), layers=[0], tower=True)[0].tower
    assert tower is not None
    return int(tower.shape[-1])
