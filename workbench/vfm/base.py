"""Vision foundation models: images in, a grid of patch features out.

A VFM owns its resize and its normalization, because preprocessing belongs to the weights: images normalised for another
model are the silent defect this class exists to rule out. Its weights are fingerprinted when they are loaded and again
after the model is built. The one exception is asked for by name: `teacher_norm="student"` normalises for CLIP, as the
official code does to every VFM (docs/paper.md, traps).

Geometry: an image is stretched so that feature (i, j) covers the same fraction of the picture as cell (i, j) of the
MLLM. Networks that interpolate their position embeddings run at grid x stride; the others run at their own fixed size
and the feature map is resampled.
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
from workbench.hashing import libraries, settings_hash, without_place
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
        module: holds the weights.
        features: maps normalised pixels (image, 3, height, width) to features (image, d, gh, gw).
        fingerprint: of the weights as they sit in `module`.
        blocks: maps pixels and layer numbers to one (image, d, gh, gw) for each, from one forward pass.
        depth: its last layer.
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
        weights: name in `workbench.weights.CATALOGUE`.
        build: makes the network from the weights of that name. Given None it makes the same architecture with random
            weights, where keyword arguments replace sizes; only tests do that, through `VFM.untrained`.
        stride: pixels of the resized image per feature, on each side.
        dim: feature width d.
        mean, std: its own normalisation of RGB in 0..1.
        default_grid: features per side when no grid is asked for.
        note: what one should know before reading a number made with it.
        architecture: the network in a few words.
        checked: what was checked here, and whether with real weights.
        fixed: side in pixels of the only image that the network takes; None where it takes any multiple of the stride.
        teacher_norm: whose normalisation the pixels get, its own or the student's (CLIP's).
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

    @property
    def normalization(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation that are used."""
        return (self.mean, self.std) if self.teacher_norm == "own" else CLIP

    def identity(self) -> str:
        """Hash of all that its features depend on besides the image: weights by name, settings, and the libraries that
        compute them."""
        return settings_hash(source(self.weights)["fingerprint"], self.settings(), libraries())

    def settings(self) -> str:
        """Hash of all that its features depend on besides image, weights and libraries: config.json, block or stage,
        normalization, stride, a plugin's code."""
        # an entry of the catalogue says which block; a folder may have any name
        named = self.name if self.name in CATALOGUE else ""
        code = [plugin] if (plugin := identity("vfms", self.name)) else []
        parts = (named, self.stride, self.dim, self.fixed, *self.normalization, self.teacher_norm, *code)
        return settings_hash(without_place(weights_config(self.weights)), *parts)


CATALOGUE: Registry[VFMEntry] = Registry("VFM", "vfms", VFMEntry)


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

    def __init__(self, entry: VFMEntry, device: str = "cpu", *, network: Network | None = None) -> None:
        self.entry, self.name, self.dim, self.device = entry, entry.name, entry.dim, device
        built = network or entry.build(entry.weights)
        self.network, self._features, self.fingerprint = built.module, built.features, built.fingerprint
        self._blocks, self.depth = built.blocks, built.depth
        self.network.eval().requires_grad_(False).to(device)

    @classmethod
    def untrained(cls, entry: VFMEntry, **sizes: Any) -> VFM:
        """The architecture of `entry` with random weights, for tests where real ones cannot be had; no name and no
        option of a command leads here."""
        return cls(entry, network=entry.build(None, **sizes))

    def record(self) -> dict[str, str]:
        """What a result that used it must say: name, fingerprints of the network and its settings, source, licence and
        whose normalisation."""
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
        """Return patch features on `grid` (rows, columns).

        Each image is stretched to `grid` times the stride (or to the fixed size, and the features resampled), so that
        feature (i, j) covers the same fraction of the picture as cell (i, j) of an MLLM with that grid; crop to
        `VisualTokens.box` first where the MLLM sees a part only.

        Raises:
            DataError: no images, or a grid without cells.
        """
        rows, columns = self._grid(images, grid)
        features = self._features(self._batch(images, rows, columns))
        if self.entry.fixed:
            features = _resampled(features, rows, columns)
        if features.shape[-2:] != (rows, columns):
            raise DataError(f"{self.name} returned a {tuple(features.shape[-2:])} grid, expected {(rows, columns)}")
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

        Layer l is the output of block l, before any norm that follows it, as in a language model; in a network of
        stages (convolutional, or a pyramid) it is stage l, whose map is resampled to the grid where it is finer or
        coarser.

        Raises:
            ConfigError: a layer that does not exist.
            DataError: no images, or a grid without cells.
        """
        self.check_layers(layers)
        rows, columns = self._grid(images, grid)
        maps = self._blocks(self._batch(images, rows, columns), layers)
        return [
            PatchFeatures(
                (m if m.shape[-2:] == (rows, columns) else _resampled(m, rows, columns))
                .permute(0, 2, 3, 1)
                .contiguous()
            )
            for m in maps
        ]

    def _grid(self, images: list[Image.Image], grid: tuple[int, int] | None) -> tuple[int, int]:
        if not images:
            raise DataError(f"{self.name} was given no images")
        rows, columns = grid or self.entry.default_grid
        if rows < 1 or columns < 1:
            raise DataError(f"grid is {rows} x {columns}: expected at least 1 x 1")
        return rows, columns

    def _batch(self, images: list[Image.Image], rows: int, columns: int) -> Tensor:
        fixed = self.entry.fixed
        size = (fixed, fixed) if fixed else (columns * self.entry.stride, rows * self.entry.stride)
        return torch.stack([self._pixels(image, size) for image in images]).to(self.device)

    def _pixels(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        resized = upright_rgb(image).resize(size, Image.Resampling.BICUBIC)
        scaled = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)
        mean, std = self.entry.normalization
        return ((scaled - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)


def _resampled(
    features: Float[Tensor, "image d h w"], rows: int, columns: int
) -> Float[Tensor, "image d rows columns"]:
    return functional.interpolate(features, size=(rows, columns), mode="bilinear", align_corners=False, antialias=True)
