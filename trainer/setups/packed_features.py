"""Frozen features of a toy LLaVA's training: what its projector receives, and what its layers are aligned with, of
every image of every split."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import isqrt
from typing import Literal

from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from trainer.build.connector_init import mean_channel_std
from trainer.build.second_encoder import JoinedFeatures, stored_second_encoder
from trainer.build.toy_llava import connector_inputs
from trainer.recipe import AlignmentConfig, Recipe
from trainer.setups.packed_data import Splits
from trainer.targets.feature_store import frozen_features
from trainer.targets.features import Features
from trainer.targets.image_hashes import image_hashes
from trainer.targets.vfm_targets import controlled, vfm_tokens
from workbench.data import Dataset
from workbench.hashing import libraries, settings_hash, without_place
from workbench.mllm.load import SECOND_ENCODER
from workbench.vfm import VFM

Mode = Literal["cache", "compute"]
Grid = tuple[int, int]
Targets = dict[str, Features]
"""Features by the name of the target."""


def encoder_features(
    llava: LlavaForConditionalGeneration, processor: LlavaProcessor, fingerprint: str, recipe: Recipe, splits: Splits
) -> list[Features]:
    """Return what the projector receives from the vision encoder, of each split.

    Args:
        fingerprint: of the vision encoder's weights.
    """
    model = recipe.model
    seen_as = settings_hash(
        without_place(llava.model.vision_tower.config.to_dict()), processor.image_processor.to_dict(), libraries()
    )
    key = (fingerprint, seen_as, model.vision_encoder_features, model.image_size)
    compute = partial(connector_inputs, llava, processor)
    return [
        frozen_features(data, key, compute, what=model.vision_encoder, mode=recipe.data.features) for data in splits.all
    ]


def sample_of(features: Features) -> Tensor:
    """Return a few thousand tokens (image, token, d), which determine mean and standard deviation well."""
    return features.rows(range(min(256, len(features))))


def joined_features(
    encoder: Sequence[Features], second: VFM, llava: LlavaForConditionalGeneration, recipe: Recipe, splits: Splits
) -> list[Features]:
    """Return what the projector receives from the vision encoder and, beside it, from the second encoder, of each
    split; the configuration then names both.

    The second encoder's channels are scaled by one number to vary as much as the vision encoder's: Adam's steps in the
    projector's first weight have one size for all channels, by which those of the smaller numbers would hardly be
    learned from. Pre-training (stage 1) hands its number on.

    Args:
        encoder: the vision encoder's features, of each split.
    """
    side = isqrt(encoder[0].shape[1])
    more = [_vfm_features(second, data, (side, side), recipe.data.features) for data in splits.all]
    scale = mean_channel_std(sample_of(encoder[0])) / mean_channel_std(sample_of(more[0]))
    if recipe.start is not None:
        scale = stored_second_encoder(recipe.start).get("scale", scale)  # without one the start is refused
    getattr(llava.config, SECOND_ENCODER).update(fingerprint=second.fingerprint, scale=scale)
    return [JoinedFeatures(one, other, scale) for one, other in zip(encoder, more, strict=True)]


def alignment_targets(
    inputs: Sequence[Features], vfms: Sequence[VFM], recipe: Recipe, splits: Splits
) -> list[Targets | None]:
    """Return the targets of each split by name, as the recipe changes them; None where there are none beforehand.

    The mean that is subtracted is the training set's.

    Args:
        inputs: what the projector receives, of each split.
    """
    settings, mode = recipe.alignment, recipe.data.features
    if not settings.aligned or settings.target == "projector":
        return [None for _ in inputs]
    side = isqrt(inputs[0].shape[1])
    if settings.target == "encoder":
        plain = [{"encoder": values} for values in inputs]
    else:
        plain = [vfm_features(settings, vfms, data, (side, side), mode) for data in splits.all]
    means = {name: values.mean() if settings.center else None for name, values in plain[0].items()}

    def changed(name: str, values: Features, data: Dataset) -> Features:
        return controlled(
            settings, values, means[name], image_hashes(data) if settings.images == "others" else None, recipe.seed
        )

    return [
        {name: changed(name, values, data) for name, values in targets.items()}
        for data, targets in zip(splits.all, plain, strict=True)
    ]


def vfm_features(settings: AlignmentConfig, vfms: Sequence[VFM], data: Dataset, grid: Grid, mode: Mode) -> Targets:
    """Return features (image, token, dim) of `data` by VFM."""
    return {name: _vfm_features(vfm, data, grid, mode) for name, vfm in zip(settings.vfm, vfms, strict=True)}


def _vfm_features(vfm: VFM, data: Dataset, grid: Grid, mode: Mode) -> Features:
    return frozen_features(data, (vfm.entry.identity(), grid), partial(vfm_tokens, vfm, grid), what=vfm.name, mode=mode)
