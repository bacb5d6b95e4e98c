"""From a recipe to what a training run needs before its first step: data, model, frozen features and targets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor, set_seed

from trainer.alignment import attach_alignment
from trainer.config import AlignmentConfig, Recipe
from trainer.data import PackedDataset, Packer, first_questions
from trainer.features import DerivedFeatures, Features, frozen_features
from trainer.lora import add_lora
from trainer.model import (
    AlignedForConditionalGeneration,
    build_llava,
    build_processor,
    connector_inputs,
    input_deviation,
    load_start,
    start_connector,
)
from workbench.data import Dataset, load_data
from workbench.mllm.residual import attach_residual
from workbench.vfm import VFM, load_vfm
from workbench.weights import check_unchanged, load_weights


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs before its first step."""

    model: AlignedForConditionalGeneration
    processor: LlavaProcessor
    train: PackedDataset
    val: PackedDataset
    input_rate: float
    record: dict[str, object]


def prepare(recipe: Recipe) -> Prepared:
    """Build model, data and features. The language model's initial weights depend on the seed only, never on the alignment."""
    train, val = load_data(recipe.data.train, limit=recipe.data.limit_train), load_data(recipe.data.val, limit=recipe.data.limit_val)
    processor = build_processor(recipe.model, sorted(train.vocabulary | val.vocabulary))
    set_seed(recipe.seed)
    llava, parts = build_llava(recipe.model, processor)
    recipe.check_layer(len(llava.model.language_model.layers))
    record: dict[str, object] = {"tower": recipe.model.tower, "data": train.fingerprint, "val": val.fingerprint}
    record |= {f"{part}_fingerprint": value for part, value in parts.items()}

    llava.eval()
    key = (parts["tower"], recipe.model.tower_features, recipe.model.image_size)
    train_inputs, val_inputs = (
        frozen_features(data, key, lambda images: connector_inputs(llava, processor, images), what=recipe.model.tower, mode=recipe.data.features)
        for data in (train, val)
    )
    side = recipe.model.image_size // processor.patch_size
    sample = train_inputs.rows(range(min(256, len(train_inputs))))  # a few thousand tokens fix mean and deviation well
    if recipe.start is None:
        start_connector(llava, sample, side)
    else:
        record["start_fingerprint"] = load_start(llava, processor, recipe.start)
        check_unchanged(recipe.model.tower, llava.model.vision_tower.state_dict(), load_weights(recipe.model.tower))
    input_rate = llava.lm_head.in_features / sample.shape[-1] / input_deviation(sample)

    if recipe.model.train == "lora":
        add_lora(llava, recipe.model.lora)
        llava.model.multi_modal_projector.requires_grad_(True)
    settings, residual = recipe.alignment, None
    if settings.residual != "none":
        residual = attach_residual(llava, settings.residual, sorted(settings.layer), train_inputs.shape[-1])
    packer = Packer(processor, train_inputs.shape[1])
    few_train, few_val = (first_questions(data, recipe.data.questions) for data in (train, val))
    val_set = PackedDataset(few_val, packer, val_inputs)
    if not settings.aligned:
        model = AlignedForConditionalGeneration(llava, None, residual)
        return Prepared(model, processor, PackedDataset(few_train, packer, train_inputs), val_set, input_rate, record)
    targets: dict[str, Features] | None = None
    if settings.target == "projector":
        dims = {"projector": llava.lm_head.in_features}
    else:
        if settings.target == "vfm":
            targets, vfm_record = vfm_features(recipe, train, (side, side))
            record |= vfm_record
        else:
            targets = {"encoder": train_inputs}
        targets = {name: _controlled(settings, values, recipe.seed) for name, values in targets.items()}
        dims = {name: values.shape[-1] for name, values in targets.items()}
    alignment = attach_alignment(
        llava, layers=settings.layer, dims=dims, objective=_objective(settings), heads=settings.heads, where=settings.where, hidden=settings.hidden
    )
    model = AlignedForConditionalGeneration(llava, alignment, residual, to_projector=settings.target == "projector")
    return Prepared(model, processor, PackedDataset(few_train, packer, train_inputs, targets), val_set, input_rate, record)


def _objective(settings: AlignmentConfig) -> Literal["cosine", "relation"]:
    assert settings.objective != "none"
    return settings.objective


def vfm_features(recipe: Recipe, data: Dataset, grid: tuple[int, int]) -> tuple[dict[str, Features], dict[str, object]]:
    """Features (image, token, dim) of `data` by VFM, and the VFMs' record: plain values for one, lists for several."""
    features, records = {}, []
    for name in recipe.alignment.vfm:
        vfm = load_vfm(name, teacher_norm=recipe.alignment.teacher_norm)
        key = (vfm.entry.identity(), grid)
        features[name] = frozen_features(data, key, partial(_tokens, vfm, grid), what=vfm.name, mode=recipe.data.features)
        records.append(vfm.record())
    return features, dict(records[0]) if len(records) == 1 else {key: [record[key] for record in records] for key in records[0]}


def _tokens(vfm: VFM, grid: tuple[int, int], images: list[Image.Image]) -> Tensor:
    return vfm(images, grid=grid).tokens()


def _controlled(settings: AlignmentConfig, targets: Features, seed: int) -> Features:
    """Targets with the controls that the recipe asks for."""
    if settings.centre:
        targets = DerivedFeatures(targets, minus=targets.mean())
    if settings.images == "others":
        order = _cyclic(torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)))
        targets = DerivedFeatures(targets, order=order.tolist())
    return targets


def _cyclic(order: Tensor) -> Tensor:
    """A permutation without fixed points: each element goes to the next one in `order`."""
    result = torch.empty_like(order)
    result[order] = order.roll(1)
    return result
