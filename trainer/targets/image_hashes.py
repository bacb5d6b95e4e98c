"""Hashes of a data set's images, computed once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from workbench.data import Dataset
from workbench.data.images import image_hash
from workbench.errors import RunError
from workbench.files import atomic_file, cache_folder, locked, remove_partial


def image_hashes(data: Dataset) -> list[bytes]:
    """Hash of the pixels of every image of `data`, 16 bytes each; kept on disk by the data set's fingerprint, so that
    images are decoded for it once."""
    path = hash_file(data)
    if not path.exists():
        with locked(path.with_suffix(".lock"), wait=True):
            if not path.exists():  # another process may have written it meanwhile
                scenes = tqdm(
                    data.scenes, desc=f"images of {data.name}", unit="image", file=sys.stderr, mininterval=2, delay=2
                )
                hashes = [image_hash(scene[0].image) for scene in scenes]
                remove_partial(path.parent, path.name)
                with atomic_file(path) as partial:
                    save_file({"image": hash_rows(hashes)}, partial)
    with reading(path), safe_open(path, framework="pt") as file:
        hashes = [row.tobytes() for row in file.get_tensor("image").numpy()]
    if len(hashes) != len(data.scenes):
        raise damaged(path, f"it holds {len(hashes)} images of {len(data.scenes)}")
    return hashes


def hash_file(data: Dataset) -> Path:
    """Where the hashes of a data set's images are stored."""
    return cache_folder("features") / "images" / f"{data.fingerprint}.safetensors"


def hash_rows(hashes: list[bytes]) -> Tensor:
    """Hashes as a tensor (image, 16) of bytes."""
    return torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.uint8).view(-1, 16)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of a file that cannot be read that it is damaged."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise damaged(path, " ".join(str(error).split())[:120]) from error


def damaged(path: Path, why: str) -> RunError:
    """The error for a file of the feature cache that does not hold what it should."""
    return RunError(f"feature cache {path} is damaged ({why}): delete that file, and what it held is computed anew")
