"""Training of a toy LLaVA on packed questions: its model, data, frozen features and targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor, set_seed

from trainer.aligned_model import AlignedForConditionalGeneration
from trainer.alignment import Alignment, attach
from trainer.build.connector_init import init_projector, mean_channel_std
from trainer.build.dropout import add_dropout
from trainer.build.lora import add_lora
from trainer.build.second_encoder import second_encoder_record
from trainer.build.toy_llava import build_llava, build_processor, load_start
from trainer.evaluation import Evaluation, answer_packed
from trainer.frozen import check_frozen, frozen_fingerprint
from trainer.head_choice import HeadChoice, choose_heads
from trainer.masking import attach_mask
from trainer.model_config import ModelConfig
from trainer.recipe import Recipe
from trainer.sampling import Stream
from trainer.setups.base import MonitorBatch, MonitorBatches
from trainer.setups.packed_data import PackedDataset, Packer, Splits, collate, first_questions, load_questions
from trainer.setups.packed_features import (
    Targets,
    alignment_targets,
    encoder_features,
    joined_features,
    sample_images,
    vfm_features,
)
from trainer.setups.packing import Packing
from trainer.targets.vfm_targets import load_vfms, vfm_record
from workbench.data import Dataset
from workbench.data.base import content_hash
from workbench.data.folder import QUESTION
from workbench.data.images import shown
from workbench.hashing import processor_fingerprint, saved_tensors
from workbench.mllm import MLLM
from workbench.mllm.family import family_of
from workbench.mllm.load import SECOND_ENCODER
from workbench.mllm.residual import Residual, attach_residual
from workbench.vfm import VFM, load_vfm
from workbench.weights.fetch import check_unchanged, load_weights


@dataclass(frozen=True)
class PackedSetup:
    """A toy LLaVA and the packed questions that it learns from; see `Setup`.

    Attributes:
        test: what the finished model is evaluated on; None if that is `val`.
        input_rate: factor for the learning rate of the projector's first weight.
        frozen: fingerprint of the parameters that are not trained.
        vfms: the VFMs whose features are alignment targets.
        choice: the attention heads that are aligned, where single ones are.
        second: the second encoder, whose features the projector receives beside the vision encoder's, if there is one.
    """

    recipe: Recipe
    model: AlignedForConditionalGeneration
    processor: LlavaProcessor
    train: PackedDataset
    val: PackedDataset
    test: PackedDataset | None
    input_rate: float
    frozen: str
    vfms: list[VFM]
    second: VFM | None
    record: dict[str, object]
    choice: HeadChoice | None = None
    unit: ClassVar[str] = "images"

    @classmethod
    def from_recipe(cls, recipe: Recipe, checkpoint: Path | None = None) -> PackedSetup:
        """Load data, model and features; see `Setup`. A resumed run has its attention heads from the checkpoint."""
        splits = load_questions(recipe.data, recipe.seed)
        processor = build_processor(recipe.model, splits.words)
        set_seed(recipe.seed)
        llava, fingerprints = build_llava(recipe.model, processor)
        recipe.alignment.check_layers(len(llava.model.language_model.layers))
        llava.eval()
        inputs = encoder_features(llava, processor, fingerprints["tower"], recipe, splits)
        second = load_vfm(recipe.model.second_encoder) if recipe.model.second_encoder is not None else None
        if second is not None:
            inputs = joined_features(inputs, second, llava, recipe, splits)
        sample = sample_images(inputs[0])
        start_record = _init_or_load_start(llava, processor, sample, recipe)
        residual = _add_trained_parts(llava, recipe, inputs[0].shape[-1])
        frozen = frozen_fingerprint(llava, llava.state_dict())
        aligned = recipe.alignment.aligned
        vfms = load_vfms(recipe.alignment) if aligned and recipe.alignment.target == "vfm" else []
        targets = alignment_targets(inputs, vfms, recipe, splits)
        packer = Packer(processor, inputs[0].shape[1])
        sets = [
            PackedDataset(first_questions(data, recipe.data.questions), packer, split_inputs, split_targets)
            for data, split_inputs, split_targets in zip(splits.all, inputs, targets, strict=True)
        ]
        choice = _choose_heads(llava, recipe, splits, vfms, checkpoint)
        heads = _attach_heads(llava, recipe, targets[0], choice)
        model = AlignedForConditionalGeneration(
            llava,
            heads,
            residual,
            to_projector=aligned and recipe.alignment.target == "projector",
            mask=attach_mask(llava, recipe.alignment.mask) if recipe.alignment.mask else None,
        )
        return cls(
            recipe=recipe,
            model=model,
            processor=processor,
            train=sets[0],
            val=sets[1],
            test=None if splits.test is None else sets[2],
            input_rate=llava.lm_head.in_features / sample.shape[-1] / mean_channel_std(sample),
            frozen=frozen,
            vfms=vfms,
            second=second,
            choice=choice,
            record=_sources_record(recipe.model, splits, fingerprints | {"processor": processor_fingerprint(processor)})
            | _second_encoder_record(second, llava)
            | start_record
            | _targets_record(vfms)
            | (choice.record if choice is not None else {}),
        )

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return collate(items)

    def sampler(self, processes: int) -> Stream:
        optim = self.recipe.optim
        return Stream(len(self.train), optim.steps * optim.images(processes), self.recipe.seed)

    def warnings(self, processes: int) -> list[str]:
        """Return sentences about what is left out of the data; packed questions are never cut."""
        del processes
        return _left_out(data.data for data in (self.train, self.val, self.test) if data is not None)

    def count_aligned(self, batch: dict[str, Any]) -> Tensor:
        visual = batch["input_ids"].eq(self.processor.image_token_id)
        return visual.any(1).sum() if self.recipe.alignment.objective == "relation" else visual.sum()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return AdamW's parameter groups; the projector's first weight takes larger steps and no weight decay.

        Its inputs have a small standard deviation, and its learning rate is larger in proportion. Adam's steps have the
        size of the learning rate whatever the gradient, so this equals training on standardized inputs.
        """
        optim = self.recipe.optim
        trainable = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        return [
            {
                "params": [p for name, p in trainable if name.endswith("linear_1.weight")],
                "lr": optim.learning_rate * self.input_rate,
                "weight_decay": 0.0,
            },
            {
                "params": [p for name, p in trainable if p.ndim > 1 and not name.endswith("linear_1.weight")],
                "weight_decay": optim.weight_decay,
            },
            {"params": [p for _, p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def evaluate(self, *, final: bool = False) -> Evaluation:
        """Return for each question whether it is answered correctly; see `answer_packed`."""
        data = self.test if final and self.test is not None else self.val
        return answer_packed(self.model, data, self.recipe.optim.batch_size)

    def monitor_batches(self) -> MonitorBatches:
        """Return the first validation images; see `Setup`.

        Their questions do not affect CKNNA: they come after the visual tokens, which attend only to what is before.
        """
        settings, batch_size = self.recipe.alignment, self.recipe.optim.batch_size
        data, tokens = self.val.data, self.val.inputs.shape[1]
        scenes = data.scenes[: self.recipe.monitor.cknna_images]
        subset = Dataset(
            data.name,
            [sample for scene in scenes for sample in scene],
            content_hash(data.fingerprint, len(scenes)),
            sorted(data.vocabulary),
        )
        vfms = self.vfms or load_vfms(settings)
        features = vfm_features(settings, vfms, subset, (isqrt(tokens), isqrt(tokens)), self.recipe.data.features)
        batches = []
        for start in range(0, len(scenes), batch_size):
            rows = range(start, min(start + batch_size, len(scenes)))
            inputs = collate([self.val[i] for i in rows])
            # the model runs the batch as one sequence, its row 0
            sequence = Packing.of(inputs["segments"]).flat(inputs["input_ids"])[0]
            positions = (sequence == self.processor.image_token_id).nonzero().view(len(rows), tokens)
            visual = [(0, [image_positions]) for image_positions in positions]
            targets = {name: [[image] for image in values.rows(rows)] for name, values in features.items()}
            batches.append(MonitorBatch(inputs, visual, targets))
        return MonitorBatches(batches, vfm_record(vfms)["vfm_fingerprint"])

    def check_frozen(self, state: Mapping[str, Tensor]) -> None:
        vfms = self.vfms if self.second is None else [*self.vfms, self.second]
        check_frozen(self.model.base, state, self.frozen, vfms)

    def write_extras(self, checkpoint: Path) -> None:
        """Write the choice of attention heads, if there is one; the order of the images follows from the seed."""
        if self.choice is not None:
            self.choice.save(checkpoint)


# --- the steps of from_recipe, in their order -----------------------------------------------------


def _init_or_load_start(
    llava: LlavaForConditionalGeneration, processor: LlavaProcessor, sample: Tensor, recipe: Recipe
) -> dict[str, object]:
    """Initialize the projector or, if the recipe has a `start`, load the model from that folder.

    Args:
        sample: features that the projector receives for some training images.

    Returns:
        Entries of the training record about the start.
    """
    if recipe.start is None:
        init_projector(llava, sample, recipe.model.image_size // processor.patch_size)
        return {}
    fingerprint = load_start(llava, processor, recipe.start)
    check_unchanged(
        recipe.model.vision_encoder, saved_tensors(llava.model.vision_tower), load_weights(recipe.model.vision_encoder)
    )
    return {"start_fingerprint": fingerprint}


def _add_trained_parts(llava: LlavaForConditionalGeneration, recipe: Recipe, width: int) -> Residual | None:
    """Add LoRA, dropout and the residual, each if the recipe has it; return the residual.

    Args:
        width: number of features that the projector receives per visual token.
    """
    model, settings = recipe.model, recipe.alignment
    if model.train == "lora":
        add_lora(llava, model.lora)
        llava.model.multi_modal_projector.requires_grad_(True)
    add_dropout(llava, model.dropout)
    if settings.residual == "none":
        return None
    return attach_residual(llava, settings.residual, sorted(settings.layer), width)


def _choose_heads(
    llava: LlavaForConditionalGeneration,
    recipe: Recipe,
    splits: Splits,
    vfms: Sequence[VFM],
    checkpoint: Path | None,
) -> HeadChoice | None:
    """Choose the attention heads that are aligned, or read the choice of a resumed run; None for other alignments."""
    settings = recipe.alignment
    if not settings.chooses_heads:
        return None
    if checkpoint is not None:
        return HeadChoice.load(checkpoint)
    # a processor of its own, since an MLLM changes the padding of its processor
    mllm = MLLM(llava, build_processor(recipe.model, splits.words), family_of(llava.config), "the initial model")
    samples = [scene[0] for scene in splits.train.scenes[: settings.selection.images]]
    images, prompts = [sample.image for sample in samples], [sample.question or QUESTION for sample in samples]
    return choose_heads(mllm, images, prompts, vfms, settings)


def _attach_heads(
    llava: LlavaForConditionalGeneration, recipe: Recipe, targets: Targets | None, choice: HeadChoice | None
) -> Alignment | None:
    """Attach the alignment heads and return them; None for a baseline.

    Args:
        targets: targets of the training split; None if the target is the projector's output.
        choice: the attention heads that are aligned, where single ones are.
    """
    if targets is None:
        dims = {"projector": llava.lm_head.in_features}
    else:
        dims = {name: features.shape[-1] for name, features in targets.items()}
    return attach(llava, recipe.alignment, dims, None if choice is None else choice.chosen)


def _sources_record(model: ModelConfig, splits: Splits, fingerprints: Mapping[str, str]) -> dict[str, object]:
    """Return the record's entries about the data and the pretrained parts of the model."""
    record: dict[str, object] = {
        "tower": model.vision_encoder,
        "data": splits.train.fingerprint,
        "val": splits.val.fingerprint,
    }
    record |= {} if splits.test is None else {"test": splits.test.fingerprint}
    record["left_out"] = _left_out(splits.all)
    return record | {f"{part}_fingerprint": value for part, value in fingerprints.items()}


def _left_out(splits: Iterable[Dataset]) -> list[str]:
    """Return sentences about what the sources of the data contain and the data do not."""
    return [f"{shown(data.name)}: {sentence}" for data in splits for sentence in data.left_out]


def _second_encoder_record(second: VFM | None, llava: LlavaForConditionalGeneration) -> dict[str, object]:
    """Return the record's entries about the second encoder."""
    if second is None:
        return {}
    scale = getattr(llava.config, SECOND_ENCODER)["scale"]
    return {**second_encoder_record(second), "second_encoder_scale": scale}


def _targets_record(vfms: Sequence[VFM]) -> dict[str, object]:
    """Return the record's entries about the VFMs whose features are alignment targets."""
    return dict(vfm_record(vfms)) if vfms else {}
