"""What CKNNA is measured on while a model trains: batches of the validation split, the same at every evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class WatchedBatch:
    """Some images as the model is given them.

    Attributes:
        inputs: of the model's forward.
        places: for each image its row of the batch, and the positions of the visual tokens of each of its rasters.
        patches: features of each VFM, [image][raster].
    """

    inputs: Mapping[str, Any]
    places: Sequence[tuple[int, Sequence[Int[Tensor, " token"]]]]
    patches: Mapping[str, Sequence[Sequence[Float[Tensor, "token d"]]]]


@dataclass(frozen=True)
class Watched:
    """The batches, and the fingerprints of their VFMs: one, or a list."""

    batches: Sequence[WatchedBatch]
    fingerprint: object
