"""Where an attention map looks: how spread it is, and how well it finds an object.

A map is what one query position gives to the visual tokens of one image, on their raster, renormalised to sum 1. It
says where a head reads, not what the model uses of it. A map that cannot be renormalised (no attention on the image at
all) is NaN, and so is every number about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import ndimage
from scipy.special import entr

THRESHOLD = 0.001  # of a component's cells, as in the published code
# eight neighbours within a map, none in the next one
_PLANES = np.array([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])


@dataclass(frozen=True)
class Entropies:
    """Four normalisations of what is called spatial entropy; which of them a published 0..1 scale means is often
    unstated.

    Attributes:
        component: -sum p ln p over the connected components of a map, in nats; p is a component's share of what exceeds
            twice the mean.
        per_components: the same over ln(number of components), 0 for a single one: how evenly the components share, not
            how many there are.
        per_cells: the same over ln(number of cells).
        shannon: the entropy of all cells over ln(number of cells), without components: 1 is uniform, 0 is one cell.

    The first three are NaN where nothing exceeds twice the mean, which is the most diffuse map and not the most
    focused. Their chance level is that of the same map with its cells shuffled (the components of a shuffled map are
    chance clusters); `shannon` is blind to order, and 1 where attention is uniform.
    """

    component: Float[np.ndarray, "*map"]
    per_components: Float[np.ndarray, "*map"]
    per_cells: Float[np.ndarray, "*map"]
    shannon: Float[np.ndarray, "*map"]


def renormalised(maps: Float[np.ndarray, "*map h w"]) -> Float[np.ndarray, "*map h w"]:
    """Maps divided by their sums; NaN where the sum is 0."""
    total = maps.sum(axis=(-2, -1), keepdims=True)
    return np.divide(maps, total, out=np.full_like(maps, np.nan, dtype=float), where=total > 0)


def entropies(maps: Float[np.ndarray, "*map h w"]) -> Entropies:
    """Entropies of maps that sum to 1.

    Components as in the published code for localisation heads: B = relu(S - 2 mean S), connected components of B >
    0.001 with eight neighbours, p = sum of B in a component over the sum in all of them.
    """
    *shape, height, width = maps.shape
    flat = maps.reshape(-1, height, width)
    n, cells = len(flat), height * width
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = np.nan_to_num(np.maximum(flat - 2 * flat.mean(axis=(1, 2), keepdims=True), 0))
        labels, count = ndimage.label(excess > THRESHOLD, structure=_PLANES)
        owner = np.zeros(count + 1, dtype=int)  # the map of each component; 0 is the ground
        owner[labels.reshape(n, -1)] = np.arange(n)[:, None]
        owner = owner[1:]
        sums = np.bincount(labels.ravel(), weights=excess.ravel(), minlength=count + 1)[1:]
        found = np.bincount(owner, minlength=n)
        share = sums / np.bincount(owner, weights=sums, minlength=n)[owner]
        component = np.where(found > 0, np.bincount(owner, weights=entr(share), minlength=n), np.nan)
        per_components = np.where(found == 1, 0.0, component / np.log(found))
        shannon = entr(flat).sum(axis=(1, 2)) / np.log(cells)
    each = (component, per_components, component / np.log(cells), shannon)
    return Entropies(*(values.reshape(shape) for values in each))


def pointing(
    maps: Float[np.ndarray, "*map h w"], inside: Float[np.ndarray, "*object h w"]
) -> Float[np.ndarray, "*object *map"]:
    """1 where the cell with the most attention contains a part of the object, else 0; the mean where several cells
    share the maximum.

    Args:
        inside: the share of each cell's area that the object covers.

    Chance, for a map that knows nothing: `touched(inside)`.
    """
    with np.errstate(invalid="ignore"):
        top = (maps == maps.max(axis=(-2, -1), keepdims=True)).astype(float)
        return _seen(
            np.tensordot(inside > 0, top / top.sum(axis=(-2, -1), keepdims=True), ((-2, -1), (-2, -1))), inside
        )


def touched(inside: Float[np.ndarray, "*object h w"]) -> Float[np.ndarray, "*object"]:
    """The share of cells that contain a part of the object: the chance level of `pointing`."""
    return (inside > 0).mean(axis=(-2, -1))


def mass_ratio(
    maps: Float[np.ndarray, "*map h w"], inside: Float[np.ndarray, "*object h w"]
) -> Float[np.ndarray, "*object *map"]:
    """Attention on the object over the object's share of the area: 1 is chance, the inverse of the area is the most
    there can be."""
    area = np.expand_dims(inside.mean(axis=(-2, -1)), tuple(range(inside.ndim - 2, inside.ndim + maps.ndim - 4)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return _seen(np.tensordot(inside, maps, ((-2, -1), (-2, -1))) / area, inside)


def best_iou(
    maps: Float[np.ndarray, "*map h w"], inside: Float[np.ndarray, "*object h w"]
) -> Float[np.ndarray, "*object *map"]:
    """The largest intersection over union of the object with the cells above a threshold, over all thresholds.

    The threshold is chosen with the object in sight, so chance is well above 0: see `random_iou`. A cell counts for the
    share that the object covers, so coarse cells keep it below 1.
    """
    flat = maps.reshape(-1, maps.shape[-2] * maps.shape[-1])
    order = np.argsort(-flat, axis=1, kind="stable")
    ranked = np.take_along_axis(flat, order, axis=1)
    # no threshold lies between equals
    ends = np.concatenate([ranked[:, 1:] < ranked[:, :-1], np.ones((len(flat), 1), dtype=bool)], axis=1)
    taken = np.arange(1, flat.shape[1] + 1)
    found = []
    for weights in inside.reshape(-1, flat.shape[1]):
        shared = weights[order].cumsum(axis=1)
        found.append(np.where(ends, shared / (taken + weights.sum() - shared), 0).max(axis=1))
    scores = np.where(np.isnan(flat).any(axis=1), np.nan, np.array(found))
    return _seen(scores.reshape((*inside.shape[:-2], *maps.shape[:-2])), inside)


def random_iou(inside: Float[np.ndarray, "h w"], *, n: int = 50, seed: int = 0) -> float:
    """The chance level of `best_iou`: its mean over `n` maps whose cells stand in random order."""
    return float(best_iou(np.random.default_rng(seed).random((n, *inside.shape)), inside).mean())


def _seen(scores: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """NaN for objects that are not on the raster at all, such as those that a crop leaves out."""
    visible = np.expand_dims(inside.any(axis=(-2, -1)), tuple(range(inside.ndim - 2, scores.ndim)))
    return np.where(visible, scores, np.nan)
