"""The on-disk cache of frozen features: what the connector receives and what the VFM says, computed once per image."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from workbench.data import Dataset
from workbench.data.base import content_hash
from workbench.files import atomic_file, cache_folder

log = logging.getLogger(__name__)


def cached_features(data: Dataset, key: tuple[object, ...], compute: Callable[[list[Image.Image]], Tensor], *, what: str, batch: int = 32) -> Tensor:
    """Return features (image, token, d) of every image of `data`, memory-mapped from disk.

    Args:
        key: all that determines the features besides the images: fingerprint, block, geometry.
        compute: images -> (image, token, d).
        what: shown beside the progress bar.
    """
    path: Path = cache_folder("features") / f"{content_hash(data.fingerprint, *key)}.safetensors"
    if not path.exists():
        images = [scene[0] for scene in data.scenes]
        chunks = []
        for start in tqdm(range(0, len(images), batch), desc=f"{what}, {data.name}", unit="batch", file=sys.stderr, mininterval=2):
            chunks.append(compute([sample.image for sample in images[start : start + batch]]).cpu())
        with atomic_file(path) as partial:
            save_file({"features": torch.cat(chunks).contiguous()}, partial)
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("features")
