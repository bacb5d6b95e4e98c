"""VFM features as alignment targets: those of the pixels under each visual token, with a recipe's controls."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from trainer.alignment_config import AlignmentConfig
from trainer.targets.features import DerivedFeatures, Features, shuffle_images
from workbench.mllm import VisualTokens
from workbench.spatial.vfm_patches import patches_under
from workbench.vfm import VFM, load_vfm

BatchVisualTokens = Sequence[Sequence[VisualTokens]]  # [conversation][image or tile]
BatchImages = Sequence[Sequence[Image.Image]]  # [conversation][image]


class Targets:
    """Computes the features of some VFMs for the pixels under each visual token.

    Attributes:
        dims: number of features of each VFM, by its name.
    """

    def __init__(self, vfms: Sequence[VFM]) -> None:
        self.vfms = vfms
        self.dims = {vfm.name: vfm.dim for vfm in vfms}

    def __call__(
        self, numbers: Sequence[int], images: BatchImages, visual: BatchVisualTokens
    ) -> dict[str, list[list[Tensor]]]:
        """Return the targets of a batch by VFM: [conversation][image or tile] (token, dim), on the CPU.

        All images of the batch go through a VFM together.

        Args:
            numbers: numbers of the conversations in their data set.
        """
        images_and_tiles = [
            (image, [tile for tile in visual[row] if tile.image == n])
            for row, row_images in enumerate(images)
            for n, image in enumerate(row_images)
        ]
        batch_images = [image for image, _ in images_and_tiles]
        batch_tiles = [tiles for _, tiles in images_and_tiles]
        targets = {}
        for vfm in self.vfms:
            by_image = iter(patches_under(vfm, batch_images, batch_tiles) if batch_images else ())
            # cloned, since autograd refuses tensors that were made in inference mode
            targets[vfm.name] = [
                [tile.cpu().clone() for _ in row_images for tile in next(by_image)] for row_images in images
            ]
        return targets


def load_vfms(settings: AlignmentConfig, device: str = "cpu") -> list[VFM]:
    """Load the VFMs that the recipe names."""
    return [load_vfm(name, device=device, teacher_norm=settings.teacher_norm) for name in settings.vfm]


def vfm_record(vfms: Sequence[VFM]) -> dict[str, Any]:
    """Return the record's entries about the VFMs: single values for one VFM, lists for several."""
    records = [vfm.record() for vfm in vfms]
    return dict(records[0]) if len(records) == 1 else {key: [record[key] for record in records] for key in records[0]}


def vfm_tokens(vfm: VFM, grid: tuple[int, int], images: list[Image.Image]) -> Tensor:
    """Return the VFM's features (image, token, dim) of whole images, resampled to a patch grid (height, width)."""
    return vfm(images, grid=grid).tokens()


def apply_controls(
    settings: AlignmentConfig, targets: Features, mean: Tensor | None, images: Sequence[Hashable] | None, seed: int
) -> Features:
    """Return `targets` with the controls that the recipe asks for.

    Args:
        mean: what is subtracted from every token; needed for `center`.
        images: what identifies the image that each target is of; needed for shuffled targets (`images: others`).
        seed: draws the order of shuffled targets.
    """
    if settings.center:
        assert mean is not None
        targets = DerivedFeatures(targets, minus=mean)
    if settings.images == "others":
        assert images is not None
        targets = DerivedFeatures(targets, order=shuffle_images(images, seed))
    return targets
