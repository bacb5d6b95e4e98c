"""Frozen features: what the connector receives and what a VFM says of every image, computed once and kept on disk, or
anew at every step.

A store is a folder `$VIRAL_CACHE/features/<key>`; the key hashes all that determines the features besides the image:
fingerprint of the network, block, geometry, dtype. It holds shards `<hash>.safetensors` of up to 256 images: `features`
(image, token, d) float32, `image` (image, 16), the hash of each image's pixels, and `crc` (image), the CRC-32 of hash
and features. So an image that occurs twice, or in two data sets, is computed once.

Nothing is read before it is asked for: a record is one slice of a memory-mapped shard, so the data may be larger than
the memory. Every record is checked against its CRC whenever it is read (0.2 to 0.4 ms for 64 x 768 values), and
whenever a store is opened two of its images are computed again and compared, which finds what no checksum can: features
of other pixels or of another network than the key says. Shards are written under a temporary name and renamed, each by
one process that holds its lock; a run that was killed goes on from the whole shards, and processes side by side share
the work.

Features keep the bits they had in the batch in which they were first computed; in another batch they agree within
float32 noise.
"""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from trainer.targets.features import BATCH, Features
from trainer.targets.image_hashes import damaged, hash_file, hash_rows, image_hashes, reading
from workbench.data import Dataset
from workbench.data.base import content_hash
from workbench.data.images import image_hash, shown
from workbench.errors import RunError
from workbench.files import atomic_file, cache_folder, locked, make_folder, remove_partial

Compute = Callable[[list[Image.Image]], Tensor]
FORMAT = "shards-1"  # part of every key
SHARD = 256  # images
TOLERANCE = 0.01  # relative; TF32 and other kernels stay below it, other pixels or weights do not


class ComputedFeatures(Features):
    """Features that are computed whenever they are asked for, for data too large for the disk."""

    def __init__(self, data: Dataset, compute: Compute) -> None:
        self._samples = [scene[0] for scene in data.scenes]
        self._compute = compute
        self.shape = (len(self._samples), *self.rows([0]).shape[1:])

    def rows(self, indices: Sequence[int]) -> Float[Tensor, "image token d"]:
        images = [self._samples[i].image for i in indices]
        return torch.cat([self._compute(images[start : start + BATCH]).cpu() for start in range(0, len(images), BATCH)])


class StoredFeatures(Features):
    """Features in the shards of a store.

    Args:
        shards: the files, open.
        images: hash of every image of the data set.
        records: for every image its shard, row and CRC.
        shape: token, d.
    """

    def __init__(
        self,
        shards: dict[Path, safe_open],
        images: list[bytes],
        records: list[tuple[Path, int, int]],
        shape: tuple[int, int],
    ) -> None:
        self._shards, self._images, self._records, self.shape = shards, images, records, (len(images), *shape)

    def rows(self, indices: Sequence[int]) -> Float[Tensor, "image token d"]:
        return torch.stack([self._record(index) for index in indices])

    def _record(self, index: int) -> Float[Tensor, "token d"]:
        path, row, crc = self._records[index]
        with reading(path):
            values = self._shards[path].get_slice("features")[row]
        if _crc(self._images[index], values) != crc:
            raise damaged(path, f"record {row} does not match its checksum")
        return values


def frozen_features(
    data: Dataset, key: tuple[object, ...], compute: Compute, *, what: str, mode: Literal["cache", "compute"] = "cache"
) -> Features:
    """Return the features of every image of `data`: what is stored, and computed and stored where missing; `compute`
    stores nothing.

    Args:
        key: all that determines the features besides the images: fingerprint, block, geometry.
        compute: images -> (image, token, d); must be deterministic.
        what: the network, in messages and beside the progress bar.

    Raises:
        RunError: a store that is damaged, that does not hold what `compute` returns now, or that cannot be written.
    """
    if mode == "compute":
        return ComputedFeatures(data, compute)
    store = Store(cache_folder("features") / content_hash(FORMAT, "float32", *key), what)
    images = image_hashes(data)
    store.check(data, images, compute)
    store.fill(data, images, compute)
    return store.features(images)


class Store:
    """One folder of shards, made by one network at one geometry.

    Args:
        what: the network, in messages.
    """

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = make_folder(folder), what
        self._shards: dict[Path, safe_open] = {}  # memory-mapped; an open one holds no file descriptor
        self._records: dict[bytes, tuple[Path, int, int]] = {}  # image -> shard, row, CRC
        self._shape: tuple[int, int] | None = None
        self._scan()

    def features(self, images: list[bytes]) -> StoredFeatures:
        """The features of `images`, all of which must be there."""
        assert self._shape is not None
        return StoredFeatures(self._shards, images, [self._records[image] for image in images], self._shape)

    def check(self, data: Dataset, images: list[bytes], compute: Compute, *, number: int = 2) -> None:
        """Compute a few of the stored images again, other ones each time, and compare."""
        known = [index for index, image in enumerate(images) if image in self._records]
        picked = random.Random().sample(known, min(number, len(known)))
        if not picked:
            return
        stored = self.features([images[index] for index in picked])
        again = compute([_image(data, index, images[index]) for index in picked]).cpu()
        if again.shape[1:] != stored.shape[1:]:
            raise self._stale(
                f"they are {stored.shape[1]} x {stored.shape[2]} and should be {again.shape[1]} x {again.shape[2]}"
            )
        for row, index in enumerate(picked):
            away = float((again[row] - stored[row]).norm() / again[row].norm().clamp_min(1e-12))
            if not away <= TOLERANCE:
                raise self._stale(
                    f"those of image {data.scenes[index][0].image_id} differ by {away:.2g} of their length"
                )

    def _stale(self, why: str) -> RunError:
        return RunError(
            f"the features in {self.folder} are not what {self.what} says now ({why}): delete that folder, and they are"
            " computed anew"
        )

    def fill(self, data: Dataset, images: list[bytes], compute: Compute) -> None:
        """Compute what is missing, a shard at a time; shards that other processes work on are left to them, and waited
        for in the end."""
        first = {image: index for index, image in reversed(list(enumerate(images)))}  # identical images once
        unique = sorted(first.values())
        chunks = [unique[start : start + SHARD] for start in range(0, len(unique), SHARD)]
        missing = sum(images[index] not in self._records for index in unique)
        with tqdm(
            total=missing,
            desc=f"{self.what}, {data.name}",
            unit="image",
            file=sys.stderr,
            mininterval=2,
            disable=not missing,
        ) as bar:
            for wait in (False, True):
                for chunk in chunks:
                    if all(images[index] in self._records for index in chunk):
                        continue
                    lock = self.folder / f".{content_hash(*(images[index] for index in chunk))}.lock"
                    if wait:
                        bar.set_postfix_str("waiting for another process")
                    with locked(lock, wait=wait) as ours:
                        if ours:
                            self._scan()  # another process may have written it meanwhile
                            self._compute(
                                [i for i in chunk if images[i] not in self._records], data, images, compute, bar
                            )

    def _compute(self, indices: list[int], data: Dataset, images: list[bytes], compute: Compute, bar: tqdm) -> None:
        """Write the shard that holds the images at `indices`."""
        if not indices:
            return
        parts = []
        for start in range(0, len(indices), BATCH):
            batch = indices[start : start + BATCH]
            parts.append(compute([_image(data, index, images[index]) for index in batch]).cpu())
            bar.update(len(batch))
        features, own = torch.cat(parts).float().contiguous(), [images[index] for index in indices]
        if not features.isfinite().all():
            raise RunError(
                f"{self.what} returned features that are not finite for images of {data.name}; nothing is stored"
            )
        crc = torch.tensor([_crc(image, values) for image, values in zip(own, features, strict=True)])
        path = self.folder / f"{content_hash(*own)}.safetensors"
        remove_partial(self.folder, path.name)
        with atomic_file(path) as partial:
            save_file(
                {"image": hash_rows(own), "crc": crc, "features": features}, partial, metadata={"network": self.what}
            )
        self._scan()

    def _scan(self) -> None:
        """Take in the shards that were not there before."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - set(self._shards)):
            with reading(path):
                shard = safe_open(path, framework="pt")
                keys, crcs, slices = shard.get_tensor("image"), shard.get_tensor("crc"), shard.get_slice("features")
                shape, dtype = tuple(slices.get_shape()), slices.get_dtype()
            self._shape = self._shape or shape[1:]
            if (
                dtype != "F32"
                or shape != (len(keys), *self._shape)
                or keys.shape[1:] != (16,)
                or crcs.shape != (len(keys),)
            ):
                raise damaged(path, f"it holds {dtype} {shape} for {len(keys)} images")
            for row, (key, crc) in enumerate(zip(keys.numpy(), crcs.tolist(), strict=True)):
                self._records.setdefault(key.tobytes(), (path, row, crc))
            self._shards[path] = shard


def _image(data: Dataset, index: int, expected: bytes) -> Image.Image:
    """The image, once its pixels are seen to be those that its hash was taken of."""
    image = data.scenes[index][0].image
    if image_hash(image) != expected:
        place = data.scenes[index][0].image_id
        raise RunError(
            f"image {shown(place)} of {shown(data.name)} is not the one that was hashed in {hash_file(data)}: delete"
            " that file"
        )
    return image


def _crc(image: bytes, values: Tensor) -> int:
    return zlib.crc32(values.numpy().data, zlib.crc32(image))
