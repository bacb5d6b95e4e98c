"""Alignment targets of conversations, read from the feature cache."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from itertools import chain

from PIL import Image
from torch import Tensor

from trainer.alignment_config import AlignmentConfig
from trainer.setups.conversation_data import ConversationSet, encode_rows
from trainer.targets.feature_store import frozen_features
from trainer.targets.features import Features
from trainer.targets.image_hashes import image_hashes
from trainer.targets.vfm_targets import BatchImages, BatchVisualTokens, Targets, apply_controls, vfm_tokens
from workbench.data import Dataset, Sample
from workbench.data.base import Conversation, content_hash, rows_hash
from workbench.data.images import image_hash, shown
from workbench.errors import ConfigError, RunError
from workbench.mllm import MLLM, VisualTokens
from workbench.progress import progress_bar
from workbench.spatial.vfm_patches import covered_pixels
from workbench.vfm import VFM

Grid = tuple[int, int]  # height and width of a patch grid


class StoredTargets(Targets):
    """Targets as `Targets` computes them, but from the feature cache: one store per VFM and size of patch grid.

    Creating it reads all images once, computes the features that the cache lacks, and hashes the pixels of every image.
    An image that is read later must still have the same pixels.

    Raises:
        ConfigError: the model's visual tokens have no rows and columns; or the recipe asks for shuffled targets
            (`images: others`), and more than half of the tiles of a patch grid are of one image.
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
        self._image_hashes: list[list[bytes]] = []  # [conversation][image]
        self._tiles: list[list[tuple[Grid, int]]] = []  # [conversation][tile]: patch grid, and row of its store
        samples: dict[Grid, list[Sample]] = {}  # the tiles of each store
        sources: dict[Grid, list[tuple[int, int]]] = {}  # the conversation and image that each tile is of
        boxes = []
        for number, conversation in enumerate(progress_bar(f"tiles of {data.data.name}", data.conversations)):
            store_rows: list[tuple[Grid, int]] = []
            self._image_hashes.append([])
            if conversation.loads:
                batch, _ = encode_rows(mllm, data, [number], max_length, device="cpu")
                self._image_hashes[-1] = [image_hash(image) for image in batch.images[0]]
                for n, tile in enumerate(mllm.visual_tokens(batch)[0]):
                    if tile.grid is None:
                        raise ConfigError(
                            f"the visual tokens of {mllm.name} have no rows and columns: expected data.features"
                            " compute, or another model"
                        )
                    same_grid = samples.setdefault(tile.grid, [])
                    store_rows.append((tile.grid, len(same_grid)))
                    boxes.append((tile.grid, tile.image, tile.box, tile.fill))
                    sources.setdefault(tile.grid, []).append((number, tile.image))
                    tile_id = f"{number}:{n}"
                    same_grid.append(Sample(tile_id, tile_id, partial(_tile_pixels, conversation, tile)))
            self._tiles.append(store_rows)
        fingerprint = rows_hash(chain(self._image_hashes, boxes))
        tile_sets = {
            grid: Dataset(data.data.name, tiles, content_hash(fingerprint, grid)) for grid, tiles in samples.items()
        }
        identities = _image_identities(sources, tile_sets) if settings.images == "others" else {}
        self._features: dict[str, dict[Grid, Features]] = {}
        for vfm in vfms:
            stores = {
                grid: frozen_features(
                    tiles, (vfm.entry.identity(), grid), partial(vfm_tokens, vfm, grid), what=vfm.name
                )
                for grid, tiles in tile_sets.items()
            }
            self._features[vfm.name] = _apply_controls(stores, identities, settings, seed)

    def __call__(
        self, numbers: Sequence[int], images: BatchImages, visual: BatchVisualTokens
    ) -> dict[str, list[list[Tensor]]]:
        """Read the targets of a batch from the store.

        Raises:
            RunError: an image has other pixels than those whose features are stored.
        """
        for number, row_images in zip(numbers, images, strict=True):
            for n, (image, stored_hash) in enumerate(zip(row_images, self._image_hashes[number], strict=True)):
                if image_hash(image) != stored_hash:
                    raise RunError(
                        f"image {n + 1} of conversation {self._data.conversations[number].id} of"
                        f" {shown(self._data.data.name)} has been replaced since the training began: expected the"
                        " pixels that its targets were computed from; put the image back, or start again"
                    )
        return {
            name: [[stores[grid][row] for grid, row in self._tiles[number]] for number in numbers]
            for name, stores in self._features.items()
        }


def _tile_pixels(conversation: Conversation, tile: VisualTokens) -> Image.Image:
    return covered_pixels(conversation.loads[tile.image](), tile)


def _apply_controls(
    stores: dict[Grid, Features],
    identities: Mapping[Grid, Sequence[Hashable]],
    settings: AlignmentConfig,
    seed: int,
) -> dict[Grid, Features]:
    """Return the targets with the controls that the recipe asks for.

    Centering subtracts the mean over the tokens of all stores; shuffling stays within a store, since targets must have
    the patch grid of the tokens.

    Args:
        identities: for each tile of a store, what identifies the image that it is of; see `_image_identities`.
    """
    mean: Tensor | None = None
    if settings.center:
        counts = {grid: features.shape[0] * features.shape[1] for grid, features in stores.items()}
        for grid, features in stores.items():
            weighted = features.mean() * (counts[grid] / sum(counts.values()))
            mean = weighted if mean is None else mean + weighted
    return {
        grid: apply_controls(settings, features, mean, identities.get(grid), seed) for grid, features in stores.items()
    }


def _image_identities(
    sources: Mapping[Grid, Sequence[tuple[int, int]]], tile_sets: Mapping[Grid, Dataset]
) -> dict[Grid, list[tuple[bytes, ...]]]:
    """Return for each tile what identifies the image that it is of: the hashes of all tiles of that image.

    Unlike the conversation and number of an image, they recognize an image that occurs in several conversations.
    """
    hashes_by_source: dict[tuple[int, int], list[bytes]] = {}
    for grid, data in tile_sets.items():
        for source, tile_hash in zip(sources[grid], image_hashes(data), strict=True):
            hashes_by_source.setdefault(source, []).append(tile_hash)
    return {
        grid: [tuple(hashes_by_source[source]) for source in grid_sources] for grid, grid_sources in sources.items()
    }
