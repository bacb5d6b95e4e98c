"""Features of VFMs as targets: of the pixels under each visual token, with the controls that a recipe asks for."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from trainer.recipe import AlignmentConfig
from trainer.targets.features import DerivedFeatures, Features, other_images
from workbench.mllm import VisualTokens
from workbench.spatial.vfm_patches import patches_under
from workbench.vfm import VFM, load_vfm

Places = Sequence[Sequence[VisualTokens]]
Pictures = Sequence[Sequence[Image.Image]]


class Targets:
    """Features of some VFMs of the pixels under each visual token, by VFM: [conversation][image or tile] (token,
    dim)."""

    def __init__(self, vfms: Sequence[VFM]) -> None:
        self.vfms = vfms
        self.dims = {vfm.name: vfm.dim for vfm in vfms}

    def __call__(self, numbers: Sequence[int], images: Pictures, visual: Places) -> dict[str, list[list[Tensor]]]:
        """Computed now: images of a batch go through a VFM together."""
        shown = [
            (image, [part for part in visual[row] if part.image == n])
            for row, own in enumerate(images)
            for n, image in enumerate(own)
        ]
        found = {}
        for vfm in self.vfms:
            by_image = (
                iter(patches_under(vfm, [image for image, _ in shown], [parts for _, parts in shown]))
                if shown
                else iter(())
            )
            # a clone takes part in autograd
            found[vfm.name] = [[tile.cpu().clone() for _ in own for tile in next(by_image)] for own in images]
        return found


def load_vfms(settings: AlignmentConfig, device: str = "cpu") -> list[VFM]:
    """The VFMs that a recipe names."""
    return [load_vfm(name, device=device, teacher_norm=settings.teacher_norm) for name in settings.vfm]


def vfm_record(vfms: Sequence[VFM]) -> dict[str, Any]:
    """What the VFMs say of themselves: plain values for one, lists for several."""
    records = [vfm.record() for vfm in vfms]
    return dict(records[0]) if len(records) == 1 else {key: [record[key] for record in records] for key in records[0]}


def vfm_tokens(vfm: VFM, grid: tuple[int, int], images: list[Image.Image]) -> Tensor:
    """Features (image, token, dim) of whole images on a grid."""
    return vfm(images, grid=grid).tokens()


def controlled(
    settings: AlignmentConfig, targets: Features, mean: Tensor | None, images: Sequence[Hashable] | None, seed: int
) -> Features:
    """Targets with the controls that the recipe asks for: less `mean`, and those of another of `images`, which say of
    each target what image it is of."""
    if settings.center:
        assert mean is not None
        targets = DerivedFeatures(targets, minus=mean)
    if settings.images == "others":
        assert images is not None
        targets = DerivedFeatures(targets, order=other_images(images, seed))
    return targets
