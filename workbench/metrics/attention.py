"""Where an attention map looks: how spread out it is, and how well it finds an object.

A map is the attention of one query position to the visual tokens of one image, on their patch grid, renormalized to sum
1. It shows where a head reads, not what the model uses of that. A map that cannot be renormalized (no attention to the
image at all) is NaN, and so is every number about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import ndimage
from scipy.special import entr

THRESHOLD = 0.001  # patches above it form components, as in the published code
# a patch has eight neighbors in its own map, and none in the maps before and after it
_ADJACENT = np.array([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])


@dataclass(frozen=True)
class Entropies:
    """Four normalizations of spatial entropy; publications with a 0..1 scale often do not say which one they use.

    Attributes:
        component: -sum p ln p over the connected components of a map, in nats; p is a component's share of the
            attention above twice the mean.
        per_components: `component` / ln(number of components), 0 for a single component: how evenly the components
            share, not how many there are.
        per_cells: `component` / ln(number of patches).
        shannon: entropy over all patches / ln(number of patches), without components: 1 is uniform, 0 is one patch.

    The first three are NaN where nothing exceeds twice the mean; such a map is the most diffuse, not the most focused.
    Their chance level is the value of the same map with its patches shuffled, whose components are random clusters.
    `shannon` ignores the positions of patches, and is 1 where attention is uniform.
    """

    component: Float[np.ndarray, "*map"]
    per_components: Float[np.ndarray, "*map"]
    per_cells: Float[np.ndarray, "*map"]
    shannon: Float[np.ndarray, "*map"]


def renormalized(maps: Float[np.ndarray, "*map h w"]) -> Float[np.ndarray, "*map h w"]:
    """Return the maps divided by their sums; NaN where the sum is 0."""
    total = maps.sum(axis=(-2, -1), keepdims=True)
    return np.divide(maps, total, out=np.full_like(maps, np.nan, dtype=float), where=total > 0)


def entropies(maps: Float[np.ndarray, "*map h w"]) -> Entropies:
    """Compute the entropies of maps that sum to 1.

    Components are as in the published code for localization heads: B = relu(S - 2 mean S); the connected components of
    B > 0.001 with eight neighbors; p = sum of B in a component / sum of B in all components.
    """
    *shape, height, width = maps.shape
    flat = maps.reshape(-1, height, width)
    n, patches = len(flat), height * width
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = np.nan_to_num(np.maximum(flat - 2 * flat.mean(axis=(1, 2), keepdims=True), 0))
        labels, count = ndimage.label(excess > THRESHOLD, structure=_ADJACENT)
        map_of = np.zeros(count + 1, dtype=int)  # the map of each component; label 0 is the background
        map_of[labels.reshape(n, -1)] = np.arange(n)[:, None]
        map_of = map_of[1:]
        sums = np.bincount(labels.ravel(), weights=excess.ravel(), minlength=count + 1)[1:]
        components = np.bincount(map_of, minlength=n)
        share = sums / np.bincount(map_of, weights=sums, minlength=n)[map_of]
        component = np.where(components > 0, np.bincount(map_of, weights=entr(share), minlength=n), np.nan)
        per_components = np.where(components == 1, 0.0, component / np.log(components))
        shannon = entr(flat).sum(axis=(1, 2)) / np.log(patches)
    each = (component, per_components, component / np.log(patches), shannon)
    return Entropies(*(values.reshape(shape) for values in each))


def pointing(
    maps: Float[np.ndarray, "*map h w"], inside: Float[np.ndarray, "*object h w"]
) -> Float[np.ndarray, "*object *map"]:
    """Return 1 where the patch with the most attention contains a part of the object, else 0.

    Where several patches share the maximum, it is the mean over them. The chance level is `touched(inside)`.

    Args:
        maps: attention maps.
        inside: the share of each patch's area that the object covers.
    """
    with np.errstate(invalid="ignore"):
        top = (maps == maps.max(axis=(-2, -1), keepdims=True)).astype(float)
        top = top / top.sum(axis=(-2, -1), keepdims=True)
        return _nan_if_absent(np.tensordot(inside > 0, top, ((-2, -1), (-2, -1))), inside)


def touched(inside: Float[np.ndarray, "*object h w"]) -> Float[np.ndarray, "*object"]:
    """Return the share of patches that contain a part of the object: the chance level of `pointing`.

    It is NaN, as `pointing` is, for an object that is not on the patch grid at all.
    """
    return _nan_if_absent(np.asarray((inside > 0).mean(axis=(-2, -1))), inside)


def mass_ratio(
    maps: Float[np.ndarray, "*map h w"], inside: Float[np.ndarray, "*object h w"]
) -> Float[np.ndarray, "*object *map"]:
    """Return the attention on the object divided by the object's share of the area.

    1 is chance; the largest possible value is 1 / the object's share of the area.
    """
    area = np.expand_dims(inside.mean(axis=(-2, -1)), tuple(range(inside.ndim - 2, inside.ndim + maps.ndim - 4)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return _nan_if_absent(np.tensordot(inside, maps, ((-2, -1), (-2, -1))) / area, inside)


def best_iou(
    maps: Float[np.ndarray, "*map h w"], inside: Float[np.ndarray, "*object h w"]
) -> Float[np.ndarray, "*object *map"]:
    """Return the largest intersection over union, over all thresholds, of the object with the patches above it.

    The threshold is chosen knowing the object, so chance is well above 0: see `random_iou`. A patch counts with the
    share that the object covers, so the value stays below 1 on coarse patch grids.
    """
    flat = maps.reshape(-1, maps.shape[-2] * maps.shape[-1])
    order = np.argsort(-flat, axis=1, kind="stable")
    ranked = np.take_along_axis(flat, order, axis=1)
    # a threshold cannot separate equal values
    ends = np.concatenate([ranked[:, 1:] < ranked[:, :-1], np.ones((len(flat), 1), dtype=bool)], axis=1)
    selected = np.arange(1, flat.shape[1] + 1)
    best = []
    for weights in inside.reshape(-1, flat.shape[1]):
        shared = weights[order].cumsum(axis=1)
        best.append(np.where(ends, shared / (selected + weights.sum() - shared), 0).max(axis=1))
    scores = np.where(np.isnan(flat).any(axis=1), np.nan, np.array(best))
    return _nan_if_absent(scores.reshape((*inside.shape[:-2], *maps.shape[:-2])), inside)


def random_iou(inside: Float[np.ndarray, "h w"], *, n: int = 50, seed: int = 0) -> float:
    """Return the chance level of `best_iou`: its mean over `n` maps whose patches are in random order."""
    return float(best_iou(np.random.default_rng(seed).random((n, *inside.shape)), inside).mean())


def _nan_if_absent(scores: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the scores, NaN for objects that are not on the patch grid at all (a crop can leave them out)."""
    visible = np.expand_dims(inside.any(axis=(-2, -1)), tuple(range(inside.ndim - 2, scores.ndim)))
    return np.where(visible, scores, np.nan)
