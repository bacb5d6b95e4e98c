"""A VFM as the second vision encoder of a toy LLaVA.

The projector receives the VFM's frozen features concatenated with the vision encoder's, channel by channel on the same
patches (as in Eagle, arXiv 2408.15998). This is a rival to VIRAL: the model *sees* the VFM's features, where VIRAL's is
only aligned to them.
The VFM is not saved with the model, so only this trainer can run such a model. The key `SECOND_ENCODER` in its
config.json says so, and `workbench.mllm.load` refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from trainer.targets.features import Features
from workbench.mllm.load import SECOND_ENCODER
from workbench.vfm import VFM, find_vfm
from workbench.weights.model_files import read_json


class LlavaForConditionalGeneration(transformers.LlavaForConditionalGeneration):
    """A transformers LLaVA whose projector takes the concatenated features of two vision encoders.

    transformers does not apply its renaming of tensors to classes from outside, so a folder of this model has other
    tensor names than a LLaVA of the hub.
    """

    def __init__(self, config: transformers.LlavaConfig) -> None:
        super().__init__(config)
        old, second = self.model.multi_modal_projector.linear_1, getattr(config, SECOND_ENCODER)
        self.model.multi_modal_projector.linear_1 = nn.Linear(old.in_features + second["features"], old.out_features)


def llava_class(config: transformers.PretrainedConfig) -> type[transformers.LlavaForConditionalGeneration]:
    """Return the LLaVA class for `config`: the one above if it names a second encoder, else transformers' own."""
    if getattr(config, SECOND_ENCODER, None):
        return LlavaForConditionalGeneration
    return transformers.LlavaForConditionalGeneration


class JoinedFeatures(Features):
    """Features of two encoders for the same images and tokens, concatenated channel by channel.

    Args:
        encoder: features of the vision encoder.
        second: features of the second encoder.
        scale: factor that the second encoder's features are multiplied by.
    """

    def __init__(self, encoder: Features, second: Features, scale: float) -> None:
        self.encoder, self.second, self.scale = encoder, second, scale
        self.shape = (*encoder.shape[:2], encoder.shape[2] + second.shape[2])

    def rows(self, indices: Sequence[int]) -> Float[Tensor, "image token d"]:
        return torch.cat([self.encoder.rows(indices), self.scale * self.second.rows(indices)], dim=-1)


def second_encoder_config(name: str) -> dict[str, Any]:
    """Return the entry of config.json for the second encoder `name`; of a local folder only its last part is kept."""
    return {"vfm": Path(name).name if Path(name).is_dir() else name, "features": find_vfm(name).dim}


def stored_second_encoder(folder: Path) -> dict[str, Any]:
    """Return the second encoder's entry of the config.json in `folder`; {} if there is none."""
    entry: dict[str, Any] = read_json(folder / "config.json").get(SECOND_ENCODER) or {}
    return entry


def second_encoder_record(vfm: VFM) -> dict[str, str]:
    """Return the second encoder's entries of the training record."""
    return {key.replace("vfm", "second_encoder"): value for key, value in vfm.record().items() if key.startswith("vfm")}


def pad_for_second_encoder(
    projector: Any, features: Float[Tensor, "image token d"]
) -> Float[Tensor, "image token wide"]:
    """Pad the vision encoder's features with zeros in the channels of the second encoder, if there is one.

    With them the projector can be run when only the vision encoder's features are wanted.
    """
    return nn.functional.pad(features, (0, projector.linear_1.in_features - features.shape[-1]))
