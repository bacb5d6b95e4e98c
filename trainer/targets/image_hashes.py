"""Hashes of the pixels of a data set's images, computed once and kept in the feature cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench.data import Dataset
from workbench.data.images import image_hash
from workbench.errors import RunError
from workbench.files import atomic_file, cache_folder, locked, remove_partial
from workbench.progress import progress_bar


def image_hashes(data: Dataset) -> list[bytes]:
    """Return the hash of each image's pixels, 16 bytes each, in the order of `data.scenes`.

    They are stored by the data set's fingerprint, so that all images are decoded only once.

    Raises:
        RunError: the stored file is damaged.
    """
    path = hash_file(data)
    if not path.exists():
        with locked(path.with_suffix(".lock"), wait=True):
            if not path.exists():  # another process may have written it meanwhile
                scenes = progress_bar(f"images of {data.name}", data.scenes, unit="image")
                hashes = [image_hash(scene[0].image) for scene in scenes]
                remove_partial(path.parent, path.name)
                with atomic_file(path) as partial:
                    save_file({"image": hash_rows(hashes)}, partial)
    with reading(path), safe_open(path, framework="pt") as file:
        hashes = [row.tobytes() for row in file.get_tensor("image").numpy()]
    if len(hashes) != len(data.scenes):
        raise damaged(path, f"it holds the hashes of {len(hashes)} images, not of {len(data.scenes)}")
    return hashes


def hash_file(data: Dataset) -> Path:
    """Return the file in which the hashes of a data set's images are stored."""
    return cache_folder("features") / "images" / f"{data.fingerprint}.safetensors"


def hash_rows(hashes: list[bytes]) -> Tensor:
    """Return `hashes` as a tensor of bytes (image, 16)."""
    return torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.uint8).view(-1, 16)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file of the feature cache into the one error that says it is damaged."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise damaged(path, " ".join(str(error).split())[:120]) from error


def damaged(path: Path, why: str) -> RunError:
    """Return the error for a file of the feature cache that does not hold what it should."""
    return RunError(f"feature cache {path} is damaged ({why}): delete that file, and its content is computed again")
