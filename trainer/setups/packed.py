"""Training of a toy LLaVA on packed questions: its model, data, frozen features and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor, set_seed

from trainer.aligned_model import AlignedForConditionalGeneration
from trainer.alignment import Alignment, attach_alignment
from trainer.build.connector_init import init_projector, mean_channel_std
from trainer.build.dropout import add_dropout
from trainer.build.lora import add_lora
from trainer.build.second_encoder import second_encoder_record
from trainer.build.toy_llava import build_llava, build_processor, load_start
from trainer.evaluation import Evaluation, answer_packed
from trainer.frozen import check_frozen, frozen_fingerprint
from trainer.recipe import ModelConfig, Recipe
from trainer.sampling import Stream
from trainer.setups.base import Watched, WatchedBatch
from trainer.setups.packed_data import PackedDataset, Packer, Splits, collate, first_questions, load_questions
from trainer.setups.packed_features import (
    Targets,
    alignment_targets,
    encoder_features,
    joined_features,
    sample_of,
    vfm_features,
)
from trainer.setups.packing import Packing
from trainer.targets.vfm_targets import load_vfms, vfm_record
from workbench.data import Dataset
from workbench.data.base import content_hash
from workbench.hashing import processor_fingerprint, saved_tensors
from workbench.mllm.load import SECOND_ENCODER
from workbench.mllm.residual import Residual, attach_residual
from workbench.vfm import VFM, load_vfm
from workbench.weights.fetch import check_unchanged, load_weights


@dataclass(frozen=True)
class PackedSetup:
    """A toy LLaVA and the packed questions that it learns from; see `Setup`.

    Attributes:
        test: what the finished model is evaluated on, where that is not `val`.
        input_rate: factor of the learning rate of the projector's first weight.
        frozen: fingerprint of the parameters that are not trained.
        vfms: the targets' networks.
        second: the second encoder, whose features the projector receives beside the vision encoder's.
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
    unit: ClassVar[str] = "images"

    @classmethod
    def from_recipe(cls, recipe: Recipe, checkpoint: Path | None = None) -> PackedSetup:
        """See `Setup`; the order of images follows from the seed alone, so `checkpoint` has nothing to say."""
        del checkpoint
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
        sample = sample_of(inputs[0])
        start = _start(llava, processor, sample, recipe)
        residual = _add_trained_parts(llava, recipe, inputs[0].shape[-1])
        frozen = frozen_fingerprint(llava, llava.state_dict())
        aligned = recipe.alignment.aligned
        vfms = load_vfms(recipe.alignment) if aligned and recipe.alignment.target == "vfm" else []
        targets = alignment_targets(inputs, vfms, recipe, splits)
        packer = Packer(processor, inputs[0].shape[1])
        sets = [
            PackedDataset(first_questions(data, recipe.data.questions), packer, values, own)
            for data, values, own in zip(splits.all, inputs, targets, strict=True)
        ]
        heads = _heads(llava, recipe, targets[0])
        model = AlignedForConditionalGeneration(
            llava, heads, residual, to_projector=aligned and recipe.alignment.target == "projector"
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
            record=_record(recipe.model, splits, fingerprints | {"processor": processor_fingerprint(processor)})
            | _second(second, llava)
            | start
            | _vfms(vfms),
        )

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return collate(items)

    def sampler(self, processes: int) -> Stream:
        optim = self.recipe.optim
        return Stream(len(self.train), optim.steps * optim.images(processes), self.recipe.seed)

    def known(self, processes: int) -> list[str]:
        del processes
        return []

    def aligned(self, batch: dict[str, Any]) -> Tensor:
        visual = batch["input_ids"].eq(self.processor.image_token_id)
        return visual.any(1).sum() if self.recipe.alignment.objective == "relation" else visual.sum()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The projector's first weight, whose input has a small standard deviation, takes proportionally larger steps
        and no decay.

        Adam's steps have the size of the learning rate whatever the gradient, so this equals training on standardized
        inputs.
        """
        optim = self.recipe.optim
        trainable = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        return [
            {
                "params": [p for n, p in trainable if n.endswith("linear_1.weight")],
                "lr": optim.learning_rate * self.input_rate,
                "weight_decay": 0.0,
            },
            {
                "params": [p for n, p in trainable if p.ndim > 1 and not n.endswith("linear_1.weight")],
                "weight_decay": optim.weight_decay,
            },
            {"params": [p for n, p in trainable if p.ndim == 1], "weight_decay": 0.0},
        ]

    def evaluate(self, *, final: bool = False) -> Evaluation:
        """Whether each question is answered right; see `answer_packed`."""
        return answer_packed(
            self.model, self.test if final and self.test is not None else self.val, self.recipe.optim.batch_size
        )

    def watched(self) -> Watched:
        """The first validation images; the visual tokens stand before the questions, which therefore do not change
        them."""
        settings, size = self.recipe.alignment, self.recipe.optim.batch_size
        data, tokens = self.val.data, self.val.inputs.shape[1]
        scenes = data.scenes[: self.recipe.monitor.cknna_images]
        few = Dataset(
            data.name,
            [sample for scene in scenes for sample in scene],
            content_hash(data.fingerprint, len(scenes)),
            sorted(data.vocabulary),
        )
        vfms = self.vfms or load_vfms(settings)
        features = vfm_features(settings, vfms, few, (isqrt(tokens), isqrt(tokens)), self.recipe.data.features)
        batches = []
        for start in range(0, len(scenes), size):
            rows = range(start, min(start + size, len(scenes)))
            inputs = collate([self.val[i] for i in rows])
            sequence = Packing.of(inputs["segments"]).flat(inputs["input_ids"])[0]
            visual = (sequence == self.processor.image_token_id).nonzero().view(len(rows), tokens)
            places = [(0, [positions]) for positions in visual]
            batches.append(
                WatchedBatch(
                    inputs,
                    places,
                    {name: [[image] for image in values.rows(rows)] for name, values in features.items()},
                )
            )
        return Watched(batches, vfm_record(vfms)["vfm_fingerprint"])

    def check_frozen(self, state: Mapping[str, Tensor]) -> None:
        check_frozen(
            self.model.base, state, self.frozen, [*self.vfms, *([self.second] if self.second is not None else [])]
        )

    def write_extras(self, checkpoint: Path) -> None:
        """Nothing: the order follows from the seed."""


# --- the steps of from_recipe, in their order -----------------------------------------------------


def _start(
    llava: LlavaForConditionalGeneration, processor: LlavaProcessor, sample: Tensor, recipe: Recipe
) -> dict[str, object]:
    """Give the projector its first values or, where the run starts from a folder, the model the values there; return
    what the record says of them."""
    if recipe.start is None:
        init_projector(llava, sample, recipe.model.image_size // processor.patch_size)
        return {}
    fingerprint = load_start(llava, processor, recipe.start)
    check_unchanged(
        recipe.model.vision_encoder, saved_tensors(llava.model.vision_tower), load_weights(recipe.model.vision_encoder)
    )
    return {"start_fingerprint": fingerprint}


def _add_trained_parts(llava: LlavaForConditionalGeneration, recipe: Recipe, width: int) -> Residual | None:
    """Add LoRA, dropout and the residual where the recipe has them.

    Args:
        width: features of the projector's input.
    """
    model, settings = recipe.model, recipe.alignment
    if model.train == "lora":
        add_lora(llava, model.lora)
        llava.model.multi_modal_projector.requires_grad_(True)
    add_dropout(llava, model.dropout)
    return (
        None
        if settings.residual == "none"
        else attach_residual(llava, settings.residual, sorted(settings.layer), width)
    )


def _heads(llava: LlavaForConditionalGeneration, recipe: Recipe, targets: Targets | None) -> Alignment | None:
    """Attach the alignment heads, None for a baseline.

    Args:
        targets: of the training split; None where the target is what the projector gives.
    """
    settings = recipe.alignment
    if settings.objective == "none":
        return None
    dims = (
        {"projector": llava.lm_head.in_features}
        if targets is None
        else {name: values.shape[-1] for name, values in targets.items()}
    )
    return attach_alignment(
        llava,
        layers=settings.layer,
        dims=dims,
        objective=settings.objective,
        heads=settings.heads,
        where=settings.where,
        hidden=settings.hidden,
    )


def _record(model: ModelConfig, splits: Splits, fingerprints: Mapping[str, str]) -> dict[str, object]:
    """What the record says of the data and of the pretrained parts."""
    record: dict[str, object] = {
        "tower": model.vision_encoder,
        "data": splits.train.fingerprint,
        "val": splits.val.fingerprint,
    }
    record |= {} if splits.test is None else {"test": splits.test.fingerprint}
    record["left_out"] = [sentence for data in splits.all for sentence in data.left_out]
    return record | {f"{part}_fingerprint": value for part, value in fingerprints.items()}


def _second(second: VFM | None, llava: LlavaForConditionalGeneration) -> dict[str, object]:
    """What the record says of the second encoder."""
    return (
        {}
        if second is None
        else {**second_encoder_record(second), "second_encoder_scale": getattr(llava.config, SECOND_ENCODER)["scale"]}
    )


def _vfms(vfms: Sequence[VFM]) -> dict[str, object]:
    """What the record says of the targets' networks."""
    return dict(vfm_record(vfms)) if vfms else {}
