"""Training of a pretrained or an assembled model on conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import set_seed

from trainer import distributed
from trainer.aligned_model import AlignedMLLMForConditionalGeneration
from trainer.alignment import Alignment, attach
from trainer.alignment_config import AlignmentConfig
from trainer.build.assembled_llava import build_from_parts
from trainer.build.frozen_precision import half_autocast, halve_frozen
from trainer.build.partition import checkpoint_activations, choose_trained
from trainer.evaluation import Evaluation, answer_questions, language_loss
from trainer.frozen import check_frozen, frozen_fingerprint
from trainer.head_choice import HeadChoice, choose_heads
from trainer.masking import attach_mask
from trainer.recipe import Recipe
from trainer.setups.base import MonitorBatch, MonitorBatches
from trainer.setups.conversation_checks import check_conversations
from trainer.setups.conversation_data import Collator, ConversationSet, GroupedSampler
from trainer.setups.conversation_splits import ConversationSplits, load_conversations
from trainer.setups.rows import Rows
from trainer.setups.stored_targets import StoredTargets
from trainer.targets.vfm_targets import Targets, load_vfms, vfm_record
from workbench.capture.hidden_states import read
from workbench.data import Sample
from workbench.data.base import Conversation
from workbench.data.folder import QUESTION
from workbench.errors import ConfigError
from workbench.mllm import MLLM
from workbench.mllm.residual import Residual, attach_residual
from workbench.vfm import VFM


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
        choice: the attention heads that are aligned, where single ones are.
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
    choice: HeadChoice | None = None
    unit: ClassVar[str] = "conversations"

    @classmethod
    def from_recipe(cls, recipe: Recipe, checkpoint: Path | None = None) -> ConversationSetup:
        """Load data, model and features; see `Setup`. A checkpoint holds order and attention heads."""
        splits = load_conversations(recipe, Rows.load(checkpoint) if checkpoint is not None else None)
        set_seed(recipe.seed)
        mllm = _load_model(recipe)
        questions = check_conversations(recipe, mllm, splits)
        record = _sources_record(mllm, splits, recipe.data.max_length)
        trained = choose_trained(mllm, recipe.model)
        if recipe.optim.frozen_precision == "bfloat16":
            halve_frozen(mllm.model)
            mllm.model.to(distributed.device())
        if recipe.optim.checkpointing:
            checkpoint_activations(mllm.model)
        settings = recipe.alignment
        with half_autocast(mllm.model):
            width = encoder_width(mllm, splits.train) if settings.reads_encoder else 0
        residual = _add_residual(mllm, settings, width)
        vfms, targets = _load_targets(mllm, splits.train, recipe)
        choice = _choose_heads(mllm, settings, splits.train, vfms, checkpoint)
        heads = _attach_heads(mllm, settings, targets, width, recipe.seed, choice)
        frozen = frozen_fingerprint(mllm.model, mllm.model.state_dict())
        sizes = _parameter_counts(mllm, trained, residual, heads)
        return cls(
            recipe=recipe,
            model=AlignedMLLMForConditionalGeneration(
                mllm,
                heads,
                residual,
                target=settings.target,
                mask=attach_mask(mllm.model, settings.mask) if settings.mask else None,
            ),
            mllm=mllm,
            train=splits.train,
            val=splits.val,
            test=splits.test,
            collate=Collator(
                mllm,
                splits.train,
                recipe.data.max_length,
                targets,
                count_tiles=settings.objective == "relation",
                mask=settings.mask,
                encoder=settings.aligned and settings.target == "encoder",
            ),
            questions=questions,
            trained=trained,
            frozen=frozen,
            vfms=vfms,
            choice=choice,
            record=record
            | (vfm_record(vfms) if vfms else {})
            | {"trained": sizes}
            | (choice.record if choice is not None else {}),
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
        splits = [data for data in (self.train, self.val, self.test) if data is not None]
        return [sentence for data in splits for sentence in data.warnings()] + ([rare_kind] if rare_kind else [])

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
            with half_autocast(self.model):
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
        """Write the rows that the order of the training depends on, and the choice of attention heads."""
        self.train.rows.save(checkpoint)
        if self.choice is not None:
            self.choice.save(checkpoint)


def _load_model(recipe: Recipe) -> MLLM:
    """Load the model in float32 onto the device of this rank.

    A model whose frozen matrices will be stored in bfloat16 stays on the CPU until they are: the device may not have
    room for all of it in float32.
    """
    config = recipe.model
    device = distributed.device() if recipe.optim.frozen_precision == "float32" else "cpu"
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


def _choose_heads(
    mllm: MLLM, settings: AlignmentConfig, train: ConversationSet, vfms: Sequence[VFM], checkpoint: Path | None
) -> HeadChoice | None:
    """Choose the attention heads that are aligned, or read the choice of a resumed run; None for other alignments."""
    if not settings.chooses_heads:
        return None
    if checkpoint is not None:
        return HeadChoice.load(checkpoint)
    of_image: dict[str, Conversation] = {}
    for conversation in train.conversations:
        if conversation.loads:
            of_image.setdefault(conversation.image_ids[0], conversation)
    images = [conversation.images[0] for conversation in islice(of_image.values(), settings.selection.images)]
    return choose_heads(mllm, images, [QUESTION] * len(images), vfms, settings)


def _attach_heads(
    mllm: MLLM,
    settings: AlignmentConfig,
    targets: Targets | None,
    width: int,
    seed: int,
    choice: HeadChoice | None,
) -> Alignment | None:
    """Attach the alignment heads, drawn from the seed, and return them; None for a baseline.

    Args:
        width: number of features that the projector receives per visual token.
        choice: the attention heads that are aligned, where single ones are.
    """
    if not settings.aligned:
        return None
    torch.manual_seed(seed)
    widths: dict[str, int] = {"encoder": width, "projector": mllm.config.get_text_config().hidden_size}
    dims: dict[str, int] = targets.dims if targets is not None else {settings.target: widths[settings.target]}
    return attach(mllm, settings, dims, None if choice is None else choice.chosen)


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
