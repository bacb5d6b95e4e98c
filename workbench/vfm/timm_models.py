"""VFMs whose network comes from timm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from torch import Tensor, nn

from workbench.vfm.base import CATALOGUE, HALF, VFMEntry
from workbench.weights import check_unchanged, load_weights


def _convolutional(weights: str, architecture: str, stage: int) -> tuple[nn.Module, Callable[[Tensor], Tensor], str]:
    """The feature map of one stage of a convolutional network."""
    network: Any = timm.create_model(architecture, pretrained=False)
    expected = load_weights(weights)
    network.load_state_dict(expected)
    fingerprint = check_unchanged(weights, network.state_dict(), expected)

    def features(pixels: Tensor) -> Tensor:
        return network.forward_intermediates(pixels, indices=[stage], intermediates_only=True)[0]

    return network, features, fingerprint


CATALOGUE.add(
    "efficientnet-lite0",
    VFMEntry(
        "efficientnet-lite0",
        "efficientnet-lite0",
        partial(_convolutional, "efficientnet-lite0", "tf_efficientnet_lite0", 3),
        16,
        112,
        *HALF,
        (14, 14),
        "Stage with stride 16 of an ImageNet classifier; convolutional, so its features carry no position.",
    ),
)
