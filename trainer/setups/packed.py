"""From a recipe to what a training run needs before its first step: data, model, frozen features and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any, ClassVar, Literal

from torch import Tensor
from transformers import LlavaConfig, LlavaProcessor, set_seed

from trainer.aligned_model import AlignedForConditionalGeneration
from trainer.alignment import attach_alignment
from trainer.build.connector_init import input_deviation, start_connector
from trainer.build.dropout import add_dropout
from trainer.build.lora import add_lora
from trainer.build.second_encoder import JoinedFeatures, second_record, stored_second
from trainer.build.toy_llava import build_llava, build_processor, connector_inputs, load_start
from trainer.evaluation import Evaluation, answer_packed
from trainer.frozen import check_frozen, frozen_fingerprint
from trainer.recipe import AlignmentConfig, OptimConfig, Recipe
from trainer.sampling import Stream
from trainer.setups.base import Watched, WatchedBatch
from trainer.setups.packed_data import PackedDataset, Packer, Splits, collate, first_questions, load_questions
from trainer.setups.packing import Packing
from trainer.targets.feature_store import frozen_features
from trainer.targets.features import Features
from trainer.targets.image_hashes import image_hashes
from trainer.targets.vfm_targets import controlled, load_vfms, vfm_record, vfm_tokens
from workbench.data import Dataset
from workbench.data.base import content_hash
from workbench.hashing import libraries, processor_fingerprint, saved_tensors, settings_hash, without_place
from workbench.mllm.load import SECOND_ENCODER
from workbench.mllm.residual import attach_residual
from workbench.vfm import VFM, load_vfm
from workbench.weights.fetch import check_unchanged, load_weights


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs before its first step.

    Attributes:
        input_rate: factor of the learning rate of the connector's first weight.
        frozen: fingerprint of the parameters that are not trained.
        vfms: the targets' networks.
        second: the second encoder, whose features the connector receives beside the tower's.
    """

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

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Items of a data set as a batch."""
        return collate(items)

    def sampler(self, recipe: Recipe, count: int) -> Stream:
        """The order of images over the whole training in `count` processes."""
        return Stream(len(self.train), recipe.optim.steps * recipe.optim.images(count), recipe.seed)

    def known(self, recipe: Recipe, count: int) -> list[str]:
        """What should be said before the first step: nothing, here."""
        return []

    def aligned(self, batch: dict[str, Any], objective: str) -> Tensor:
        """What the alignment loss of a batch is a mean over: its visual tokens, or its images."""
        visual = batch["input_ids"].eq(self.processor.image_token_id)
        return visual.any(1).sum() if objective == "relation" else visual.sum()

    def parameter_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """For AdamW; the connector's first weight, whose input has a small deviation, takes proportionally larger steps and no decay.

        Adam's steps have the size of the learning rate whatever the gradient, so this equals training on standardised inputs.
        """
        trainable = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        return [
            {
                "params": [p for n, p in trainable if n.endswith("linear_1.weight")],
                "lr": optim.learning_rate * self.input_rate,
                "weight_decay": 0.0,
            },
            {"params": [p for n, p in trainable if p.ndim > 1 and not n.endswith("linear_1.weight")], "weight_decay": optim.weight_decay},
            {"params": [p for n, p in trainable if p.ndim == 1], "weight_decay": 0.0},
        ]

    def evaluate(self, batch_size: int, *, final: bool = False) -> Evaluation:
        """Whether each question of the validation split is answered right, or of the test split where the run has one and is `final`; see `answer_packed`."""
        return answer_packed(self.model, self.test if final and self.test is not None else self.val, batch_size)

    def watched(self, recipe: Recipe) -> Watched:
        """The first validation images; the visual tokens stand before the questions, which therefore do not change them."""
        data, tokens, size = self.val.data, self.val.inputs.shape[1], recipe.optim.batch_size
        scenes = data.scenes[: recipe.monitor.cknna_images]
        few = Dataset(data.name, [sample for scene in scenes for sample in scene], content_hash(data.fingerprint, len(scenes)), sorted(data.vocabulary))
        vfms = self.vfms or load_vfms(recipe.alignment)
        features = vfm_features(recipe, vfms, few, (isqrt(tokens), isqrt(tokens)))
        batches = []
        for start in range(0, len(scenes), size):
            rows = range(start, min(start + size, len(scenes)))
            inputs = collate([self.val[i] for i in rows])
            sequence = Packing.of(inputs["segments"]).flat(inputs["input_ids"])[0]
            visual = (sequence == self.processor.image_token_id).nonzero().view(len(rows), tokens)
            places = [(0, [positions]) for positions in visual]
            batches.append(WatchedBatch(inputs, places, {name: [[image] for image in values.rows(rows)] for name, values in features.items()}))
        return Watched(batches, vfm_record(vfms)["vfm_fingerprint"])

    def check_frozen(self, state: Mapping[str, Tensor]) -> None:
        """See that training left alone what it should.

        Args:
            state: the model's tensors, whole.

        Raises:
            WeightsError: a frozen part of the model or a VFM no longer holds the values it began with.
        """
        check_frozen(self.model.student, state, self.frozen, [*self.vfms, *([self.second] if self.second is not None else [])])


def prepare(recipe: Recipe) -> Prepared:
    """Build model, data and features. The language model's initial weights depend on the seed only, never on the alignment."""
    train, val, test = splits = load_questions(recipe.data, recipe.seed)
    processor = build_processor(recipe.model, splits.words)
    set_seed(recipe.seed)
    llava, parts = build_llava(recipe.model, processor)
    recipe.check_layer(len(llava.model.language_model.layers))
    record: dict[str, object] = {"tower": recipe.model.tower, "data": train.fingerprint, "val": val.fingerprint}
    record |= {} if test is None else {"test": test.fingerprint}
    record["left_out"] = [sentence for data in splits.all for sentence in data.left_out]
    record |= {f"{part}_fingerprint": value for part, value in (parts | {"processor": processor_fingerprint(processor)}).items()}

    llava.eval()
    seen_as = settings_hash(without_place(llava.model.vision_tower.config.to_dict()), processor.image_processor.to_dict(), libraries())
    key = (parts["tower"], seen_as, recipe.model.tower_features, recipe.model.image_size)
    inputs: list[Features] = [
        frozen_features(data, key, lambda images: connector_inputs(llava, processor, images), what=recipe.model.tower, mode=recipe.data.features)
        for data in splits.all
    ]
    side = recipe.model.image_size // processor.patch_size
    second = load_vfm(recipe.model.second_encoder) if recipe.model.second_encoder is not None else None
    if second is not None:
        inputs = _joined(recipe, second, llava.config, splits, inputs, (side, side))
        record |= second_record(second) | {"second_encoder_scale": getattr(llava.config, SECOND_ENCODER)["scale"]}
    train_inputs = inputs[0]
    sample = _sample(train_inputs)
    if recipe.start is None:
        start_connector(llava, sample, side)
    else:
        record["start_fingerprint"] = load_start(llava, processor, recipe.start)
        check_unchanged(recipe.model.tower, saved_tensors(llava.model.vision_tower), load_weights(recipe.model.tower))
    input_rate = llava.lm_head.in_features / sample.shape[-1] / input_deviation(sample)

    if recipe.model.train == "lora":
        add_lora(llava, recipe.model.lora)
        llava.model.multi_modal_projector.requires_grad_(True)
    add_dropout(llava, recipe.model.dropout)
    settings, residual = recipe.alignment, None
    if settings.residual != "none":
        residual = attach_residual(llava, settings.residual, sorted(settings.layer), train_inputs.shape[-1])
    packer = Packer(processor, train_inputs.shape[1])
    frozen = frozen_fingerprint(llava, llava.state_dict())
    vfms = load_vfms(settings) if settings.aligned and settings.target == "vfm" else []
    record |= vfm_record(vfms) if vfms else {}
    targets = _targets(recipe, vfms, splits, inputs, (side, side))
    sets = [
        PackedDataset(first_questions(data, recipe.data.questions), packer, values, aligned)
        for data, values, aligned in zip(splits.all, inputs, targets, strict=True)
    ]
    alignment = None
    if settings.aligned:
        dims = {name: values.shape[-1] for name, values in (targets[0] or {}).items()} or {"projector": llava.lm_head.in_features}
        alignment = attach_alignment(
            llava, layers=settings.layer, dims=dims, objective=_objective(settings), heads=settings.heads, where=settings.where, hidden=settings.hidden
        )
    model = AlignedForConditionalGeneration(llava, alignment, residual, to_projector=settings.aligned and settings.target == "projector")
    return Prepared(model, processor, sets[0], sets[1], sets[2] if test is not None else None, input_rate, frozen, vfms, second, record)


def _sample(features: Features) -> Tensor:
    """A few thousand tokens, which fix mean and deviation well."""
    return features.rows(range(min(256, len(features))))


def _joined(recipe: Recipe, vfm: VFM, config: LlavaConfig, splits: Splits, inputs: Sequence[Features], grid: tuple[int, int]) -> list[Features]:
    """What the connector receives from the tower and, beside it, from the second encoder, of each split; `config` then says which that is.

    The second encoder's channels are scaled by one number to vary as much as the tower's: Adam's steps in the connector's first weight have one size for all
    channels, by which those of the smaller numbers would hardly be learnt from. A first stage hands its number on.

    Args:
        inputs: the tower's features.
    """
    more = [_features(vfm, data, grid, recipe) for data in splits.all]
    scale = input_deviation(_sample(inputs[0])) / input_deviation(_sample(more[0]))
    if recipe.start is not None:
        scale = stored_second(recipe.start).get("scale", scale)  # without one the start is refused
    getattr(config, SECOND_ENCODER).update(fingerprint=vfm.fingerprint, scale=scale)
    return [JoinedFeatures(own, other, scale) for own, other in zip(inputs, more, strict=True)]


def _targets(recipe: Recipe, vfms: Sequence[VFM], splits: Splits, inputs: Sequence[Features], grid: tuple[int, int]) -> list[dict[str, Features] | None]:
    """Targets by name of each split, as the recipe changes them; None where there are none beforehand. The mean that is subtracted is the training set's.

    Args:
        inputs: what the connector receives, of each split.
    """
    settings = recipe.alignment
    if not settings.aligned or settings.target == "projector":
        return [None for _ in inputs]
    encoder = settings.target == "encoder"
    each = [{"encoder": values} if encoder else vfm_features(recipe, vfms, data, grid) for data, values in zip(splits.all, inputs, strict=True)]
    means = {name: values.mean() if settings.center else None for name, values in each[0].items()}
    return [
        {
            name: controlled(settings, values, means[name], image_hashes(data) if settings.images == "others" else None, recipe.seed)
            for name, values in own.items()
        }
        for data, own in zip(splits.all, each, strict=True)
    ]


def _objective(settings: AlignmentConfig) -> Literal["cosine", "relation"]:
    assert settings.objective != "none"
    return settings.objective


def vfm_features(recipe: Recipe, vfms: Sequence[VFM], data: Dataset, grid: tuple[int, int]) -> dict[str, Features]:
    """Features (image, token, dim) of `data` by VFM."""
    return {name: _features(vfm, data, grid, recipe) for name, vfm in zip(recipe.alignment.vfm, vfms, strict=True)}


def _features(vfm: VFM, data: Dataset, grid: tuple[int, int], recipe: Recipe) -> Features:
    return frozen_features(data, (vfm.entry.identity(), grid), partial(vfm_tokens, vfm, grid), what=vfm.name, mode=recipe.data.features)
