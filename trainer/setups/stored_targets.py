"""Targets of conversations from the feature cache."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from itertools import chain

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from trainer.recipe import AlignmentConfig
from trainer.setups.conversation_data import ConversationSet, encoded
from trainer.targets.feature_store import frozen_features
from trainer.targets.features import Features
from trainer.targets.image_hashes import image_hashes
from trainer.targets.vfm_targets import Pictures, Places, Targets, controlled, vfm_tokens
from workbench.data import Dataset, Sample
from workbench.data.base import Conversation, content_hash, rows_hash
from workbench.data.images import image_hash, shown
from workbench.errors import ConfigError, RunError
from workbench.mllm import MLLM, VisualTokens
from workbench.spatial.vfm_patches import covered_pixels
from workbench.vfm import VFM


class StoredTargets(Targets):
    """The same from the feature cache, which one pass over the data fills: a store for each size of patch grid.

    The pass looks at the pixels of every image, by which the stored features are known; each image that comes later
    must have them still.

    Raises:
        ConfigError: the control `images: others` where most images of a patch grid are one image.
    """

    def __init__(
        self,
        vfms: Sequence[VFM],
        mllm: MLLM,
        data: ConversationSet,
        settings: AlignmentConfig,
        seed: int,
        max_length: int | None,
    ) -> None:
        super().__init__(vfms)
        self._data = data
        self._pixels: list[list[bytes]] = []  # of each conversation: hashes of its images
        # of each conversation: patch grid, number within its store
        self._tiles: list[list[tuple[tuple[int, int], int]]] = []
        samples: dict[tuple[int, int], list[Sample]] = {}
        pictures: dict[tuple[int, int], list[tuple[int, int]]] = {}  # whose tile each sample is: conversation, image
        boxes = []
        for number, own in enumerate(
            tqdm(data.conversations, desc=f"tiles of {data.data.name}", file=sys.stderr, mininterval=2, delay=2)
        ):
            places: list[tuple[tuple[int, int], int]] = []
            self._pixels.append([])
            if own.loads:
                batch, _ = encoded(mllm, data, [number], max_length, device="cpu")
                self._pixels[-1] = [image_hash(image) for image in batch.images[0]]
                for n, part in enumerate(mllm.visual_tokens(batch)[0]):
                    if part.grid is None:
                        raise ConfigError(
                            f"{mllm.name} gives visual tokens without rows and columns: expected data.features compute,"
                            " or another model"
                        )
                    same = samples.setdefault(part.grid, [])
                    places.append((part.grid, len(same)))
                    boxes.append((part.grid, part.image, part.box, part.fill))
                    pictures.setdefault(part.grid, []).append((number, part.image))
                    same.append(Sample(f"{number}:{n}", f"{number}:{n}", partial(_covered, own, part)))
            self._tiles.append(places)
        fingerprint = rows_hash(chain(self._pixels, boxes))
        sets = {grid: Dataset(data.data.name, own, content_hash(fingerprint, grid)) for grid, own in samples.items()}
        known = _known(pictures, sets) if settings.images == "others" else {}
        self._features: dict[str, dict[tuple[int, int], Features]] = {}
        for vfm in vfms:
            stores = {
                grid: frozen_features(own, (vfm.entry.identity(), grid), partial(vfm_tokens, vfm, grid), what=vfm.name)
                for grid, own in sets.items()
            }
            self._features[vfm.name] = _controlled(stores, known, settings, seed)

    def __call__(self, numbers: Sequence[int], images: Pictures, visual: Places) -> dict[str, list[list[Tensor]]]:
        """Read from the store.

        Raises:
            RunError: an image has other pixels than those whose features are stored.
        """
        for number, own in zip(numbers, images, strict=True):
            for n, (image, pixels) in enumerate(zip(own, self._pixels[number], strict=True)):
                if image_hash(image) != pixels:
                    raise RunError(
                        f"image {n + 1} of conversation {self._data.conversations[number].id} of"
                        f" {shown(self._data.data.name)} has been replaced since the training began: expected the"
                        " pixels that its targets were computed of; put it back, or start again"
                    )
        return {
            name: [[stores[grid][row] for grid, row in self._tiles[number]] for number in numbers]
            for name, stores in self._features.items()
        }


def _covered(conversation: Conversation, part: VisualTokens) -> Image.Image:
    return covered_pixels(conversation.loads[part.image](), part)


def _controlled(
    stores: dict[tuple[int, int], Features],
    pictures: Mapping[tuple[int, int], Sequence[Hashable]],
    settings: AlignmentConfig,
    seed: int,
) -> dict[tuple[int, int], Features]:
    """Targets with the controls that the recipe asks for; the mean is that of all tokens, another image one with the
    same patch grid."""
    mean: Tensor | None = None
    if settings.center:
        counts = {grid: own.shape[0] * own.shape[1] for grid, own in stores.items()}
        for grid, own in stores.items():
            part = own.mean() * (counts[grid] / sum(counts.values()))
            mean = part if mean is None else mean + part
    return {grid: controlled(settings, own, mean, pictures.get(grid), seed) for grid, own in stores.items()}


def _known(
    pictures: Mapping[tuple[int, int], Sequence[tuple[int, int]]], sets: Mapping[tuple[int, int], Dataset]
) -> dict[tuple[int, int], list[tuple[bytes, ...]]]:
    """The picture of each tile by what it shows, which is all its tiles, instead of by conversation and number: it may
    occur elsewhere."""
    tiles: dict[tuple[int, int], list[bytes]] = {}
    for grid, data in sets.items():
        for picture, tile in zip(pictures[grid], image_hashes(data), strict=True):
            tiles.setdefault(picture, []).append(tile)
    return {grid: [tuple(tiles[picture]) for picture in own] for grid, own in pictures.items()}
