"""How the tokens of an image lie in feature space: their similarity, effective rank and norms, and views of them."""

from __future__ import annotations

import warnings
from itertools import permutations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.errors import DataError
from workbench.metrics.neighbors import unit_rows

MASSIVE = (100.0, 1000.0)  # Sun et al. 2024: an activation above both, absolute and times the median magnitude


def mean_cosine(tokens: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch"]:
    """Compute the mean cosine similarity of two different tokens: 1 if all point the same way, 0 if orthogonal.

    It is the mean over all n (n - 1) pairs, computed from the sum of the unit tokens without an n x n matrix.

    Raises:
        DataError: a single token, one that is all zeros, or a value that is not finite.
    """
    units = unit_rows(tokens, "the tokens").double()
    n = units.shape[-2]
    if n < 2:
        raise DataError("one token has no pair: expected at least 2 tokens")
    return (units.sum(-2).pow(2).sum(-1) - units.pow(2).sum((-2, -1))) / (n * (n - 1))


def effective_rank(tokens: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch"]:
    """Compute the effective rank, from 1 to min(n, d) (Roy & Vetterli 2007, "The effective rank").

    It is exp of the entropy of the singular values divided by their sum. The tokens are neither centered nor
    normalized, so a common offset, or one token with a large norm, lowers it. Singular values are the roots of the
    eigenvalues of the smaller Gram matrix in float64; those below 1e-7 of the largest drown in rounding and count as 0.

    Raises:
        DataError: all tokens are zero, or a value is not finite.
    """
    values = tokens.double()
    scale = values.abs().amax(dim=(-2, -1), keepdim=True)
    if not torch.isfinite(scale).all() or (scale == 0).any():
        raise DataError("tokens that are all zero or not finite have no rank: expected finite tokens")
    values = values / scale
    gram = values @ values.mT if values.shape[-2] <= values.shape[-1] else values.mT @ values
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    singular = torch.where(singular > 1e-7 * singular.amax(-1, keepdim=True), singular, 0.0)
    return torch.special.entr(singular / singular.sum(-1, keepdim=True)).sum(-1).exp()


def norm_ratios(tokens: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n"]:
    """Compute each token's norm divided by the median norm of the n tokens.

    Sink (high-norm) tokens stand out (Darcet et al. 2024).

    Raises:
        DataError: the median norm is 0.
    """
    norms = tokens.double().norm(dim=-1)
    median = norms.quantile(0.5, dim=-1, keepdim=True)
    if not (median > 0).all():
        raise DataError("half of the tokens are zero, so no norm is typical: expected tokens that are not zero")
    return norms / median


def massive_tokens(tokens: Float[Tensor, "*batch n d"]) -> Bool[Tensor, "*batch n"]:
    """Return which tokens have a massive activation (Sun et al. 2024).

    An activation is massive if it is above 100 and above 1000 times the median magnitude of the n tokens.
    """
    magnitude = tokens.abs().double()
    median = torch.as_tensor(np.median(magnitude.flatten(-2).numpy(), axis=-1))  # torch's quantile refuses large inputs
    return (magnitude.amax(-1) > MASSIVE[0]) & (magnitude.amax(-1) > MASSIVE[1] * median[..., None])


def similarity_to(tokens: Float[Tensor, "n d"], token: int) -> Float[Tensor, " n"]:
    """Compute the cosine similarity of every token with one of them; 1 at that token."""
    units = unit_rows(tokens, "the tokens").double()
    return units @ units[token]


def cosines(tokens: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n n"]:
    """Compute the cosine similarity of each token with each other one: a row is `similarity_to` of its token.

    Raises:
        DataError: a token that is all zeros, or a value that is not finite.
    """
    units = unit_rows(tokens, "the tokens").double()
    return units @ units.mT


def umap_map(tokens: Float[Tensor, "n d"], *, neighbors: int = 15, seed: int = 0) -> Float[np.ndarray, "n 2"]:
    """Place tokens on a plane by UMAP (McInnes et al. 2018) of their cosine distances.

    Equal tokens and seeds give equal places. The map is only for looking at: distances between clusters, and their
    sizes and densities, mean nothing. The first call compiles for about 12 s.

    Raises:
        DataError: not more tokens than `neighbors`.
    """
    if len(tokens) <= neighbors:
        raise DataError(f"{len(tokens)} tokens with {neighbors} neighbors: expected more tokens than neighbors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap warns that a seed needs one thread, and of isolated points
        from umap import UMAP

        reducer = UMAP(n_neighbors=neighbors, metric="cosine", random_state=seed, n_jobs=1)
        return np.asarray(reducer.fit_transform(unit_rows(tokens, "the tokens").float().numpy()), dtype=np.float64)


def joint_pca_rgb(maps: list[Float[Tensor, "... _token d"]]) -> list[np.ndarray]:
    """Color tokens by their first three principal components, in one basis for all maps.

    Tokens are divided by the root mean square of their own map and layer, so that no layer dominates by its scale.
    Components are centered on the median, divided by the interquartile range and squashed by tanh, over all maps
    together (as in the feature maps of arXiv 2509.07979). The sign of a component is such that the token furthest from
    0 is positive, so colors are reproducible and do not change when all maps are rotated together.

    Returns:
        For each map, (layer, token, 3) floats in 0..1; a two-dimensional map (token, d) counts as one layer.
    """
    scaled = [
        m / m.pow(2).mean(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-12)
        for m in (m.double().reshape(-1, *m.shape[-2:]) for m in maps)
    ]
    tokens = torch.cat([m.flatten(0, 1) for m in scaled])
    center = tokens.mean(0)
    basis = torch.linalg.svd(tokens - center, full_matrices=False).Vh[:3]
    projected = (tokens - center) @ basis.T
    projected = projected * projected.gather(0, projected.abs().argmax(dim=0, keepdim=True)).sign()
    colors = torch.from_numpy(squashed(projected.numpy()))
    sizes = [m.shape[0] * m.shape[1] for m in scaled]
    return [part.reshape(*m.shape[:2], -1).numpy() for part, m in zip(colors.split(sizes), scaled, strict=True)]


def pca_scores(tokens: Float[Tensor, "token d"], *, least: float = 1e-3) -> tuple[Float[np.ndarray, "token 3"], float]:
    """Project tokens onto their own first three principal components.

    Args:
        tokens: of one map.
        least: a component whose standard deviation is below this share of the first one's counts as 0, because that is
            the size of the rounding errors of tokens that were stored in float16.

    Returns:
        The scores, in the order of the components' variance, each with the sign that makes the token furthest from 0
        positive; and the three components' share of the variance, from 0 to 1.
    """
    x = tokens.double().numpy()
    left, sizes, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    scores = np.zeros((len(x), 3))
    count = int((sizes[:3] > least * max(sizes[0], 1e-300)).sum())
    scores[:, :count] = left[:, :count] * sizes[:count]
    furthest = np.take_along_axis(scores, np.abs(scores).argmax(0)[None], axis=0)[0]
    total = float((sizes**2).sum())
    return scores * np.where(furthest < 0, -1, 1), float((sizes[:3] ** 2).sum()) / total if total else 0.0


def matched_scores(
    scores: Float[np.ndarray, "token 3"], reference: Float[np.ndarray, "token 3"]
) -> Float[np.ndarray, "token 3"]:
    """Put components in the order, and give them the signs, in which they correlate most with those of `reference`.

    Order and sign of principal components are arbitrary. Of the 48 ways, the one with the largest sum of correlations
    over the tokens is taken; a component without variance correlates with nothing.
    """
    both = [values - values.mean(0) for values in (scores, reference)]
    norms = [np.linalg.norm(values, axis=0) for values in both]
    correlations = both[1].T @ both[0] / np.maximum(np.outer(norms[1], norms[0]), 1e-300)
    order = max(permutations(range(3)), key=lambda order: sum(abs(correlations[i, j]) for i, j in enumerate(order)))
    signs = [-1.0 if correlations[i, j] < 0 else 1.0 for i, j in enumerate(order)]
    return scores[:, list(order)] * signs


def squashed(scores: Float[np.ndarray, "token 3"]) -> Float[np.ndarray, "token 3"]:
    """Turn component scores into colors from 0 to 1: (1 + tanh((x - median) / IQR)) / 2, each component by itself."""
    low, median, high = np.quantile(scores, [0.25, 0.5, 0.75], axis=0)
    return (np.tanh((scores - median) / np.maximum(high - low, 1e-12)) + 1) / 2
