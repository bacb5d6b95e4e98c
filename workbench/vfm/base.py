"""Vision foundation models: images in, a grid of patch features out.

A VFM owns its resize and its normalisation, because preprocessing belongs to the weights: images normalised for another model are
the silent defect this class exists to rule out. Its weights are fingerprinted when they are loaded and again after the model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from workbench.data.base import content_hash
from workbench.errors import DataError
from workbench.registry import Registry
from workbench.weights import source

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class VFMEntry:
    """One catalogue entry.

    Attributes:
        weights: name in `workbench.weights.CATALOGUE`.
        build: returns the network and the function that maps normalised pixels (image, 3, height, width) to
            features (image, d, gh, gw), and the fingerprint of the weights as they sit in the network.
        stride: pixels of the resized image per feature, on each side.
        dim: feature width d.
        mean, std: normalisation of RGB in 0..1.
        default_grid: features per side when no grid is asked for.
        note: what one should know before reading a number made with it.
    """

    name: str
    weights: str
    build: Callable[[], tuple[nn.Module, Callable[[Tensor], Tensor], str]]
    stride: int
    dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    default_grid: tuple[int, int]
    note: str

    def identity(self) -> str:
        """Hash of all that its features depend on besides the image: weights, block or stage, normalisation, stride."""
        return content_hash(source(self.weights)["fingerprint"], self.name, self.stride, self.dim, self.mean, self.std)


CATALOGUE: Registry[VFMEntry] = Registry("VFM")


@dataclass(frozen=True)
class PatchFeatures:
    """Patch features of a batch of images; `values` is (image, gh, gw, d), row by row from the top left."""

    values: Float[Tensor, "image gh gw d"]

    @property
    def grid(self) -> tuple[int, int]:
        return self.values.shape[1], self.values.shape[2]

    def tokens(self) -> Float[Tensor, "image token d"]:
        """The grid in raster order."""
        return self.values.flatten(1, 2)


class VFM:
    """A frozen vision foundation model; make one with `load_vfm`."""

    def __init__(self, entry: VFMEntry, device: str = "cpu") -> None:
        self.entry, self.name, self.dim, self.device = entry, entry.name, entry.dim, device
        self.network, self._features, self.fingerprint = entry.build()
        self.network.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], *, grid: tuple[int, int] | None = None) -> PatchFeatures:
        """Return patch features on `grid` (rows, columns).

        Each image is stretched to `grid` times the stride, so that feature (i, j) covers the same fraction of the picture as cell (i, j) of
        an MLLM with that grid; crop to `VisualTokens.box` first where the MLLM sees a part only.

        Raises:
            DataError: no images, or a grid without cells.
        """
        if not images:
            raise DataError(f"{self.name} was given no images")
        rows, columns = grid or self.entry.default_grid
        if rows < 1 or columns < 1:
            raise DataError(f"grid is {rows} x {columns}: expected at least 1 x 1")
        size = (columns * self.entry.stride, rows * self.entry.stride)
        pixels = torch.stack([self._pixels(image, size) for image in images]).to(self.device)
        features = self._features(pixels)
        if features.shape[-2:] != (rows, columns):
            raise DataError(f"{self.name} returned a {tuple(features.shape[-2:])} grid, expected {(rows, columns)}")
        return PatchFeatures(features.permute(0, 2, 3, 1).contiguous())

    def _pixels(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        scaled = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)
        return ((scaled - torch.tensor(self.entry.mean)) / torch.tensor(self.entry.std)).permute(2, 0, 1)


def load_vfm(name: str, *, device: str = "cpu") -> VFM:
    """Load the VFM called `name` with real weights, checked against their fingerprint.

    Raises:
        UnknownNameError: not in the catalogue.
        WeightsError: the weights cannot be had or are not the pinned ones.
    """
    return VFM(CATALOGUE.get(name), device)
