"""The feature cache: features of a frozen network for every image, computed once and kept on disk.

Such features are what the projector receives from the vision encoder, and a VFM's features of an image.

A store is a folder `$VIRAL_CACHE/features/<key>`. The key is a hash of all that determines the features besides the
image: the fingerprint of the network, its block, the geometry, the dtype. The store holds shards `<hash>.safetensors`
of up to 256 images, each with `features` (image, token, d) in float32, `image` (image, 16), the hash of each image's
pixels, and `crc` (image), the CRC-32 of this hash and the features. An image that occurs twice, or in two data sets,
is thus computed once.

Features are read only when they are asked for: a record is a slice of a memory-mapped shard, so the data may be larger
than the memory. Two checks protect them:

- Every record is compared with its CRC whenever it is read (0.2 to 0.4 ms for 64 x 768 values).
- Whenever a store is opened, two of its images are computed again and compared. This finds what no checksum can:
  features of other pixels or of another network than the key says.

A shard is written under a temporary name and then renamed, by one process that holds its lock. A run that was killed
therefore continues after its last complete shard, and processes that run at the same time share the work.

Features keep the bits that they had in the batch in which they were first computed. In another batch they would agree
up to float32 rounding.
"""

from __future__ import annotations

import random
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

from trainer.targets.features import BATCH, Features
from trainer.targets.image_hashes import damaged, hash_file, hash_rows, image_hashes, reading
from workbench.data import Dataset
from workbench.data.base import content_hash
from workbench.data.images import image_hash, shown
from workbench.errors import RunError
from workbench.files import atomic_file, cache_folder, locked, make_folder, remove_partial
from workbench.progress import Bar, progress_bar

Compute = Callable[[list[Image.Image]], Tensor]
FORMAT = "shards-1"  # part of every key
SHARD = 256  # images per shard
TOLERANCE = 0.01  # relative; differences between kernels (such as TF32) stay below it, other pixels or weights do not


class ComputedFeatures(Features):
    """Features that are computed whenever they are asked for; for data whose features do not fit on the disk."""

    def __init__(self, data: Dataset, compute: Compute) -> None:
        self._samples = [scene[0] for scene in data.scenes]
        self._compute = compute
        self.shape = (len(self._samples), *self.rows([0]).shape[1:])

    def rows(self, indices: Sequence[int]) -> Float[Tensor, "image token d"]:
        images = [self._samples[i].image for i in indices]
        return torch.cat([self._compute(images[start : start + BATCH]).cpu() for start in range(0, len(images), BATCH)])


class StoredFeatures(Features):
    """Features that are read from the shards of a store.

    Args:
        shards: the open shards.
        images: hash of every image of the data set.
        records: for every image, its shard, its row in that shard and its CRC.
        shape: number of tokens and of features.
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
    """Return the features of every image of `data`; those that are not in the cache are computed and stored first.

    Args:
        key: all that determines the features besides the images: fingerprint, block, geometry.
        compute: returns the features (image, token, d) of some images; must be deterministic.
        what: name of the network, for messages and the progress bar.
        mode: `compute` uses no cache: features are computed whenever they are asked for.

    Raises:
        RunError: the store is damaged, cannot be written, or holds other features than `compute` returns now.
    """
    if mode == "compute":
        return ComputedFeatures(data, compute)
    store = Store(cache_folder("features") / content_hash(FORMAT, "float32", *key), what)
    images = image_hashes(data)
    store.check(data, images, compute)
    store.fill(data, images, compute)
    return store.features(images)


class Store:
    """A folder of shards with the features of one network at one geometry.

    Args:
        what: name of the network, for messages.
    """

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = make_folder(folder), what
        self._shards: dict[Path, safe_open] = {}  # memory-mapped, so open shards need no file descriptors
        self._records: dict[bytes, tuple[Path, int, int]] = {}  # hash of an image -> its shard, row and CRC
        self._shape: tuple[int, int] | None = None
        self._scan()

    def features(self, images: list[bytes]) -> StoredFeatures:
        """Return the features of the images with these hashes, all of which must be in the store."""
        assert self._shape is not None
        return StoredFeatures(self._shards, images, [self._records[image] for image in images], self._shape)

    def check(self, data: Dataset, images: list[bytes], compute: Compute, *, number: int = 2) -> None:
        """Compute the features of a few stored images, different ones each time, and compare them with the stored ones.

        Args:
            images: hash of every image of `data`.
            number: how many images are compared.

        Raises:
            RunError: they differ by more than rounding, or an image has other pixels than when it was hashed.
        """
        stored_indices = [index for index, image in enumerate(images) if image in self._records]
        picked = random.Random().sample(stored_indices, min(number, len(stored_indices)))
        if not picked:
            return
        stored = self.features([images[index] for index in picked])
        computed = compute([_load_image(data, index, images[index]) for index in picked]).cpu()
        if computed.shape[1:] != stored.shape[1:]:
            raise self._stale(
                f"they are {stored.shape[1]} x {stored.shape[2]} and should be"
                f" {computed.shape[1]} x {computed.shape[2]}"
            )
        for row, index in enumerate(picked):
            difference = float((computed[row] - stored[row]).norm() / computed[row].norm().clamp_min(1e-12))
            if not difference <= TOLERANCE:
                raise self._stale(
                    f"those of image {data.scenes[index][0].image_id} differ by {difference:.2g} of their length"
                )

    def _stale(self, why: str) -> RunError:
        return RunError(
            f"the features in {self.folder} are not what {self.what} computes now ({why}): delete that folder, and they"
            " are computed again"
        )

    def fill(self, data: Dataset, images: list[bytes], compute: Compute) -> None:
        """Compute and store the features that are missing, shard by shard.

        Shards that other processes are computing are skipped at first, and waited for at the end.

        Args:
            images: hash of every image of `data`.
        """
        first_index = {image: index for index, image in reversed(list(enumerate(images)))}
        unique = sorted(first_index.values())  # of identical images only the first
        chunks = [unique[start : start + SHARD] for start in range(0, len(unique), SHARD)]
        missing = sum(images[index] not in self._records for index in unique)
        with progress_bar(f"{self.what}, {data.name}", total=missing, unit="image", disable=not missing) as bar:
            for wait in (False, True):
                for chunk in chunks:
                    if all(images[index] in self._records for index in chunk):
                        continue
                    lock = self.folder / f".{content_hash(*(images[index] for index in chunk))}.lock"
                    if wait:
                        bar.set_postfix_str("waiting for another process")
                    with locked(lock, wait=wait) as holds_lock:
                        if holds_lock:
                            self._scan()  # another process may have written the shard meanwhile
                            still_missing = [index for index in chunk if images[index] not in self._records]
                            self._compute(still_missing, data, images, compute, bar)

    def _compute(self, indices: list[int], data: Dataset, images: list[bytes], compute: Compute, bar: Bar) -> None:
        """Compute the features of the images at `indices`, and write them as a shard."""
        if not indices:
            return
        parts = []
        for start in range(0, len(indices), BATCH):
            batch = indices[start : start + BATCH]
            parts.append(compute([_load_image(data, index, images[index]) for index in batch]).cpu())
            bar.update(len(batch))
        features, hashes = torch.cat(parts).float().contiguous(), [images[index] for index in indices]
        if not features.isfinite().all():
            raise RunError(
                f"{self.what} returned features that are not finite for images of {data.name}: expected finite values;"
                " this shard is not stored"
            )
        crc = torch.tensor([_crc(image, values) for image, values in zip(hashes, features, strict=True)])
        path = self.folder / f"{content_hash(*hashes)}.safetensors"
        remove_partial(self.folder, path.name)
        with atomic_file(path) as partial:
            save_file(
                {"image": hash_rows(hashes), "crc": crc, "features": features}, partial, metadata={"network": self.what}
            )
        self._scan()

    def _scan(self) -> None:
        """Open the shards that are new in the folder, and register their records.

        Raises:
            RunError: a shard is damaged.
        """
        for path in sorted(set(self.folder.glob("*.safetensors")) - set(self._shards)):
            with reading(path):
                shard = safe_open(path, framework="pt")
                keys, crcs, slices = shard.get_tensor("image"), shard.get_tensor("crc"), shard.get_slice("features")
                shape, dtype = tuple(slices.get_shape()), slices.get_dtype()
            self._shape = self._shape or shape[1:]
            shapes_fit = shape == (len(keys), *self._shape) and keys.shape[1:] == (16,) and crcs.shape == (len(keys),)
            if dtype != "F32" or not shapes_fit:
                raise damaged(path, f"it holds {dtype} {shape} for {len(keys)} images")
            for row, (key, crc) in enumerate(zip(keys.numpy(), crcs.tolist(), strict=True)):
                self._records.setdefault(key.tobytes(), (path, row, crc))
            self._shards[path] = shard


def _load_image(data: Dataset, index: int, expected_hash: bytes) -> Image.Image:
    """Load an image, and check that its pixels are still those that were hashed."""
    image = data.scenes[index][0].image
    if image_hash(image) != expected_hash:
        image_id = data.scenes[index][0].image_id
        raise RunError(
            f"image {shown(image_id)} of {shown(data.name)} is not the one that was hashed in {hash_file(data)}: delete"
            " that file, and all images are hashed again"
        )
    return image


def _crc(image: bytes, values: Tensor) -> int:
    return zlib.crc32(values.numpy().data, zlib.crc32(image))
