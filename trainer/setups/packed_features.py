"""Frozen features for the training of a toy LLaVA: the projector's inputs and the alignment targets of every image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import isqrt
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from trainer.alignment_config import AlignmentConfig
from trainer.build.connector_init import mean_channel_std
from trainer.build.second_encoder import JoinedFeatures, stored_second_encoder
from trainer.build.toy_llava import connector_inputs
from trainer.recipe import Recipe
from trainer.setups.packed_data import Splits
from trainer.targets.feature_store import frozen_features
from trainer.targets.features import Features
from trainer.targets.image_hashes import image_hashes
from trainer.targets.vfm_targets import apply_controls, vfm_tokens
from workbench.data import Dataset
from workbench.hashing import libraries, settings_hash, without_provenance
from workbench.mllm.load import SECOND_ENCODER
from workbench.vfm import VFM

Mode = Literal["cache", "compute"]
Grid = tuple[int, int]
Targets = dict[str, Features]
"""Features of every image of a split, by the name of the target."""


def encoder_features(
    llava: LlavaForConditionalGeneration, processor: LlavaProcessor, fingerprint: str, recipe: Recipe, splits: Splits
) -> list[Features]:
    """Return, for each split, the features that the projector receives from the vision encoder.

    Args:
        fingerprint: fingerprint of the vision encoder's weights.
    """
    model = recipe.model
    settings = settings_hash(
        without_provenance(llava.model.vision_tower.config.to_dict()), processor.image_processor.to_dict(), libraries()
    )
    key = (fingerprint, settings, model.vision_encoder_features, model.image_size)
    compute = partial(connector_inputs, llava, processor)
    return [
        frozen_features(data, key, compute, what=model.vision_encoder, mode=recipe.data.features) for data in splits.all
    ]


def sample_images(features: Features) -> Float[Tensor, "image token d"]:
    """Return the features of the first 256 images, enough to estimate the mean and standard deviation of channels."""
    return features.rows(range(min(256, len(features))))


def joined_features(
    encoder: Sequence[Features], second: VFM, llava: LlavaForConditionalGeneration, recipe: Recipe, splits: Splits
) -> list[Features]:
    """Return, for each split, the features of vision encoder and second encoder concatenated.

    One factor scales the second encoder's channels so that on average they have the same standard deviation as the
    vision encoder's. Without it, the projector would hardly learn from the encoder with the smaller values, since
    Adam's steps in the projector's first weight have one size for all channels. A run that starts from a stage 1 takes
    over its factor.
    The factor and the second encoder's fingerprint are written into the configuration of `llava`.

    Args:
        encoder: the vision encoder's features of each split.
    """
    side = isqrt(encoder[0].shape[1])
    second_features = [_vfm_features(second, data, (side, side), recipe.data.features) for data in splits.all]
    scale = mean_channel_std(sample_images(encoder[0])) / mean_channel_std(sample_images(second_features[0]))
    if recipe.start is not None:
        # a start without a second encoder is refused later
        scale = stored_second_encoder(recipe.start).get("scale", scale)
    getattr(llava.config, SECOND_ENCODER).update(fingerprint=second.fingerprint, scale=scale)
    return [JoinedFeatures(first, other, scale) for first, other in zip(encoder, second_features, strict=True)]


def alignment_targets(
    inputs: Sequence[Features], vfms: Sequence[VFM], recipe: Recipe, splits: Splits
) -> list[Targets | None]:
    """Return, for each split, the alignment targets by name, with the controls that the recipe asks for.

    Where targets are centered, the mean is that of the training split.

    Args:
        inputs: the features that the projector receives, of each split.

    Returns:
        None for each split if nothing is aligned, or if the target is computed at each step (`target: projector`).
    """
    settings, mode = recipe.alignment, recipe.data.features
    if not settings.aligned or settings.target == "projector":
        return [None for _ in inputs]
    side = isqrt(inputs[0].shape[1])
    if settings.target == "encoder":
        uncontrolled = [{"encoder": features} for features in inputs]
    else:
        uncontrolled = [vfm_features(settings, vfms, data, (side, side), mode) for data in splits.all]
    means = {name: features.mean() if settings.center else None for name, features in uncontrolled[0].items()}

    def apply_recipe(name: str, features: Features, data: Dataset) -> Features:
        hashes = image_hashes(data) if settings.images == "others" else None
        return apply_controls(settings, features, means[name], hashes, recipe.seed)

    return [
        {name: apply_recipe(name, features, data) for name, features in targets.items()}
        for data, targets in zip(splits.all, uncontrolled, strict=True)
    ]


def vfm_features(settings: AlignmentConfig, vfms: Sequence[VFM], data: Dataset, grid: Grid, mode: Mode) -> Targets:
    """Return the features (image, token, dim) of every image of `data`, by VFM."""
    return {name: _vfm_features(vfm, data, grid, mode) for name, vfm in zip(settings.vfm, vfms, strict=True)}


def _vfm_features(vfm: VFM, data: Dataset, grid: Grid, mode: Mode) -> Features:
    return frozen_features(data, (vfm.entry.identity(), grid), partial(vfm_tokens, vfm, grid), what=vfm.name, mode=mode)
