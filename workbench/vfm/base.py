"""Vision foundation models (VFMs): images in, a grid of patch features out.

Resizing and normalization are part of a VFM, because preprocessing belongs to the weights: images that were normalized
for another model silently give wrong features, and this class rules that out. The only exception must be asked for:
`teacher_norm="student"` normalizes for CLIP, as the official code does for every VFM (docs/paper.md, traps). Weights
are fingerprinted when they are loaded, and again after the network is built.

Geometry: an image is stretched so that feature (i, j) covers the same fraction of the image as visual token (i, j) of
the MLLM. Networks that interpolate their position embeddings run on an image of grid x stride pixels. The others take
one fixed size. Either the image is stretched to that size and the feature map resampled to the grid, or (`padded`, as
the paper feeds SAM) the image has grid x stride pixels, zeros around it fill the fixed size, and the features of the
zeros are cut off again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from workbench.data.images import upright_rgb
from workbench.errors import ConfigError, DataError
from workbench.hashing import libraries, settings_hash, without_provenance
from workbench.plugins import identity
from workbench.registry import Registry
from workbench.weights.catalogue import CATALOGUE as WEIGHTS
from workbench.weights.fetch import source, weights_config

TeacherNorm = Literal["own", "student"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Network:
    """A built network.

    Attributes:
        module: has the weights.
        features: maps normalized pixels (image, 3, height, width) to features (image, d, gh, gw).
        fingerprint: of the weights as they are in `module`.
        blocks: maps pixels and layer numbers to one feature map (image, d, gh, gw) per layer, from one forward pass.
        depth: number of layers.
    """

    module: nn.Module
    features: Callable[[Tensor], Tensor]
    fingerprint: str
    blocks: Callable[[Tensor, Sequence[int]], list[Tensor]]
    depth: int


@dataclass(frozen=True)
class VFMEntry:
    """One catalogue entry.

    Attributes:
        weights: name in `workbench.weights.catalogue.CATALOGUE`.
        build: makes the network from the weights of that name. With None it makes the same architecture with random
            weights, and keyword arguments replace sizes; only tests do that, through `VFM.untrained`.
        stride: pixels of the resized image per feature, on each side.
        dim: feature width d.
        mean, std: its own normalization of RGB values in 0..1.
        default_grid: rows and columns of features if no grid is asked for.
        note: what to know before reading a number made with it.
        architecture: the network in a few words.
        checked: what was checked here, and whether with real weights.
        fixed: side in pixels of the only image size that the network takes; None if it takes any multiple of the
            stride.
        teacher_norm: whose normalization the pixels get, the VFM's own or the student's (CLIP's).
        padded: with `fixed`, pad the normalized image with zeros instead of stretching it (`VFM.__call__`).
    """

    name: str
    weights: str
    build: Callable[..., Network]
    stride: int
    dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    default_grid: tuple[int, int]
    note: str
    architecture: str
    checked: str
    fixed: int | None = None
    teacher_norm: TeacherNorm = "own"
    padded: bool = False

    @property
    def normalization(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Return the mean and standard deviation that are used."""
        return (self.mean, self.std) if self.teacher_norm == "own" else CLIP

    def identity(self) -> str:
        """Return a hash of everything but the image that decides its features: weights, settings and libraries."""
        return settings_hash(source(self.weights)["fingerprint"], self.settings(), libraries())

    def settings(self) -> str:
        """Return a hash of everything but image, weights and libraries that decides its features.

        That is: config.json, block or stage, normalization, stride, and the code of a plugin.
        """
        # the name of a catalogue entry decides the block; a folder may have any name
        catalogue_name = self.name if self.name in CATALOGUE else ""
        code = [plugin] if (plugin := identity("vfms", self.name)) else []
        padding = ["padded"] if self.padded else []  # only then, so that the hash of all other VFMs is what it was
        parts = (catalogue_name, self.stride, self.dim, self.fixed, *self.normalization, self.teacher_norm)
        return settings_hash(without_provenance(weights_config(self.weights)), *parts, *padding, *code)


CATALOGUE: Registry[VFMEntry] = Registry("VFM", "vfms", VFMEntry)


@dataclass(frozen=True)
class PatchFeatures:
    """Patch features of a batch of images.

    Attributes:
        values: (image, gh, gw, d), row by row from the top left.
    """

    values: Float[Tensor, "image gh gw d"]

    @property
    def grid(self) -> tuple[int, int]:
        """Return rows and columns."""
        return self.values.shape[1], self.values.shape[2]

    def tokens(self) -> Float[Tensor, "image token d"]:
        """Return the features as a sequence, row by row."""
        return self.values.flatten(1, 2)


class VFM:
    """A frozen vision foundation model; make one with `load_vfm`."""

    def __init__(self, entry: VFMEntry, device: str = "cpu", *, network: Network | None = None) -> None:
        self.entry, self.name, self.dim, self.device = entry, entry.name, entry.dim, device
        built = network or entry.build(entry.weights)
        self.network, self._features, self.fingerprint = built.module, built.features, built.fingerprint
        self._blocks, self.depth = built.blocks, built.depth
        self.network.eval().requires_grad_(False).to(device)

    @classmethod
    def untrained(cls, entry: VFMEntry, **sizes: Any) -> VFM:
        """Return the architecture of `entry` with random weights, for tests without real ones.

        No command can do this.
        """
        return cls(entry, network=entry.build(None, **sizes))

    def record(self) -> dict[str, str]:
        """Return what the record of a result made with it must say.

        That is: name, fingerprints of the network and of its settings, source, license, and whose normalization.
        """
        return {
            "vfm": self.name,
            "vfm_fingerprint": self.fingerprint,
            "vfm_settings_fingerprint": self.entry.settings(),
            "vfm_source": source(self.entry.weights)["source"],
            "vfm_licence": WEIGHTS.get(self.entry.weights).licence,
            "teacher_norm": self.entry.teacher_norm,
        }

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], *, grid: tuple[int, int] | None = None) -> PatchFeatures:
        """Return patch features on `grid` (rows, columns), by default the entry's `default_grid`.

        Each image is stretched to `grid` times the stride (or to the fixed size, and the features are resampled), so
        that feature (i, j) covers the same fraction of the image as visual token (i, j) of an MLLM with that grid. If
        the MLLM sees only a part of the image, crop to `VisualTokens.box` first.

        A padded VFM (SAM) gets the stretched, normalized image in the center of zeros, a multiple of the stride from
        the border, as in the paper: with a 24 x 24 grid, 384 of SAM's 1024 pixels, whose central 24 x 24 features are
        returned. A grid that is larger than the whole feature map is reached by resampling.

        Raises:
            DataError: no images, or a grid without rows or columns.
        """
        rows, columns = self._grid(images, grid)
        features = self._features(self._batch(images, rows, columns))
        if self.entry.padded:
            features = self._without_padding(features, rows, columns)
        if self.entry.fixed:
            features = _resampled(features, rows, columns)
        if features.shape[-2:] != (rows, columns):
            raise DataError(f"{self.name} returned a {tuple(features.shape[-2:])} grid: expected {(rows, columns)}")
        return PatchFeatures(features.permute(0, 2, 3, 1).contiguous())

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise a ConfigError unless the network has these layers."""
        for layer in layers:
            if not 1 <= layer <= self.depth:
                raise ConfigError(f"layer {layer} does not exist in {self.name}: expected 1 to {self.depth}")

    @torch.inference_mode()
    def layers(
        self, images: list[Image.Image], layers: Sequence[int], *, grid: tuple[int, int] | None = None
    ) -> list[PatchFeatures]:
        """Return the patch features of several layers from one forward pass, on the same grid as `__call__`.

        Layer l is the output of block l, before any norm that follows it, as in a language model. In a network of
        stages (convolutional or pyramidal) it is stage l, whose feature map is resampled if it is finer or coarser than
        the grid.

        Raises:
            ConfigError: a layer that does not exist.
            DataError: no images, or a grid without rows or columns.
        """
        self.check_layers(layers)
        rows, columns = self._grid(images, grid)
        maps = self._blocks(self._batch(images, rows, columns), layers)
        if self.entry.padded:
            maps = [self._without_padding(m, rows, columns) for m in maps]
        on_grid = (_resampled(m, rows, columns) for m in maps)
        return [PatchFeatures(m.permute(0, 2, 3, 1).contiguous()) for m in on_grid]

    def _grid(self, images: list[Image.Image], grid: tuple[int, int] | None) -> tuple[int, int]:
        if not images:
            raise DataError(f"{self.name} was given no images: expected at least one")
        rows, columns = grid or self.entry.default_grid
        if rows < 1 or columns < 1:
            raise DataError(f"grid is {rows} x {columns}: expected at least 1 x 1")
        return rows, columns

    def _batch(self, images: list[Image.Image], rows: int, columns: int) -> Tensor:
        fixed, stride = self.entry.fixed, self.entry.stride
        if not self.entry.padded:
            size = (fixed, fixed) if fixed else (columns * stride, rows * stride)
            return torch.stack([self._pixels(image, size) for image in images]).to(self.device)
        top, left, height, width = (stride * patches for patches in self._window(rows, columns))
        assert fixed is not None
        batch = torch.zeros(len(images), 3, fixed, fixed)
        for padded, image in zip(batch, images, strict=True):
            padded[:, top : top + height, left : left + width] = self._pixels(image, (width, height))
        return batch.to(self.device)

    def _window(self, rows: int, columns: int) -> tuple[int, int, int, int]:
        """Return top, left, height and width, in patches, of an image within the padded input."""
        assert self.entry.fixed is not None
        side = self.entry.fixed // self.entry.stride
        height, width = min(rows, side), min(columns, side)
        return (side - height) // 2, (side - width) // 2, height, width

    def _without_padding(
        self, features: Float[Tensor, "image d h w"], rows: int, columns: int
    ) -> Float[Tensor, "image d window_h window_w"]:
        top, left, height, width = self._window(rows, columns)
        return features[..., top : top + height, left : left + width]

    def _pixels(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        resized = upright_rgb(image).resize(size, Image.Resampling.BICUBIC)
        scaled = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)
        mean, std = self.entry.normalization
        return ((scaled - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)


def _resampled(
    features: Float[Tensor, "image d h w"], rows: int, columns: int
) -> Float[Tensor, "image d rows columns"]:
    if features.shape[-2:] == (rows, columns):
        return features
    return functional.interpolate(features, size=(rows, columns), mode="bilinear", align_corners=False, antialias=True)
