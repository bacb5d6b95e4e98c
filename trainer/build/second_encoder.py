"""A VFM as second vision encoder of a toy LLaVA: its frozen features beside the vision encoder's, channel by channel,
are what the connector receives.

That is the baseline that *sees* what VIRAL is only aligned to (channel concatenation, as in Eagle, arXiv 2408.15998).
The VFM is no part of the saved folder, which therefore runs in this trainer alone: its config.json says so
(`SECOND_ENCODER`), and `workbench.mllm.load` refuses it.
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
    """transformers' LLaVA, whose connector is as wide as both encoders; its folders have another layout than the
    hub's."""

    def __init__(self, config: transformers.LlavaConfig) -> None:
        super().__init__(config)
        narrow, second = self.model.multi_modal_projector.linear_1, getattr(config, SECOND_ENCODER)
        self.model.multi_modal_projector.linear_1 = nn.Linear(
            narrow.in_features + second["features"], narrow.out_features
        )


def llava_class(config: transformers.PretrainedConfig) -> type[transformers.LlavaForConditionalGeneration]:
    """The class of a LLaVA's configuration: transformers' own, or the one above where it names a second encoder."""
    return (
        LlavaForConditionalGeneration
        if getattr(config, SECOND_ENCODER, None)
        else transformers.LlavaForConditionalGeneration
    )


class JoinedFeatures(Features):
    """Features of the same images and tokens side by side, channel by channel, those of the second encoder `scale`
    times as large."""

    def __init__(self, encoder: Features, second: Features, scale: float) -> None:
        self.encoder, self.second, self.scale = encoder, second, scale
        self.shape = (*encoder.shape[:2], encoder.shape[2] + second.shape[2])

    def rows(self, indices: Sequence[int]) -> Float[Tensor, "image token d"]:
        return torch.cat([self.encoder.rows(indices), self.scale * self.second.rows(indices)], dim=-1)


def second_config(name: str) -> dict[str, Any]:
    """What config.json says of the second encoder called `name`: no path of this machine."""
    return {"vfm": Path(name).name if Path(name).is_dir() else name, "features": find_vfm(name).dim}


def stored_second(folder: Path) -> dict[str, Any]:
    """What the config.json in `folder` says of a second encoder; {} where there is none."""
    found: dict[str, Any] = read_json(folder / "config.json").get(SECOND_ENCODER) or {}
    return found


def second_record(vfm: VFM) -> dict[str, str]:
    """What the record says of the second encoder."""
    return {key.replace("vfm", "second_encoder"): value for key, value in vfm.record().items() if key.startswith("vfm")}


def encoder_alone(connector: Any, features: Float[Tensor, "image token d"]) -> Float[Tensor, "image token wide"]:
    """Return the vision encoder's features as the projector takes them, with zeros for those of a second encoder if
    there is one; to read it by itself."""
    return nn.functional.pad(features, (0, connector.linear_1.in_features - features.shape[-1]))
