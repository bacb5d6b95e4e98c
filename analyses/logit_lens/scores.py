"""Scores of the words with their intervals, nulls and chance levels."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from analyses.logit_lens.reading import PATCH_KINDS, Reading
from analyses.logit_lens.words import Config, Words
from workbench.errors import DataError
from workbench.stats import mean_intervals, null_of

MEASURES = {
    "first": "right word first of its kind",
    "candidate_rank": "1 / rank among words of its kind",
    "reciprocal_rank": "1 / rank in the vocabulary",
    "probability": "probability of the right word",
}


def score_tables(
    config: Config, reading: Reading, words: Words, layers: list[int], image_ids: list[str], vocabulary: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables scores and per_image.

    Returns:
        scores: one row for each layer, kind of patch, kind of word and measure, with its interval over images and its
            null.
        per_image: the value of each image, and the mean of its null.

    Raises:
        DataError: no token can be scored, or tokens on objects in fewer than 2 images.
    """
    if not reading.logp:
        raise DataError(
            f"no patch is covered to {config.cover:g} by an object or free of objects in {len(image_ids)} images:"
            " expected some; try a smaller cover"
        )
    logp, rank = np.concatenate(reading.logp), np.concatenate(reading.rank)
    image_numbers, patch_kinds = np.array(reading.image_numbers), np.array(reading.patch_kinds)
    rows, per_image = [], []
    for patch_kind in PATCH_KINDS:
        for word_kind, columns in words.kinds.items():
            label = np.array(reading.labels[word_kind])
            scored = (patch_kinds == patch_kind) & (label >= 0)
            scored_images = np.unique(image_numbers[scored])
            if len(scored_images) < 2:
                if patch_kind == "object":
                    raise DataError(
                        f"{len(scored_images)} of {len(image_ids)} images have a patch covered to {config.cover:g} by"
                        f" an object with a {word_kind}: expected at least 2"
                    )
                continue
            right = np.array([columns.index(column) for column in label[scored]])
            # (measure, token, layer, candidate)
            values = _measured(logp[scored][..., columns], rank[scored][..., columns])
            image = np.searchsorted(scored_images, image_numbers[scored])
            observed = _by_image(values, right, image)  # (measure, layer, image)
            draws = [
                _by_image(values, right[_elsewhere(image, [config.seed, draw])], image) for draw in range(config.null)
            ]
            nulls = np.stack([draw.mean(-1) for draw in draws])  # (draw, measure, layer)
            null_by_image = np.mean(draws, axis=0)
            chance = _chance(len(columns), vocabulary)
            for m, measure in enumerate(MEASURES):
                intervals = mean_intervals(observed[m].T, kind="proportion")
                for n, (layer, interval) in enumerate(zip(layers, intervals, strict=True)):
                    null = null_of(interval.estimate, nulls[:, m, n])
                    names = {"layer": layer, "cells": patch_kind, "kind": word_kind, "measure": measure}
                    rows.append(
                        names
                        | {
                            "score": interval.estimate,
                            "low": interval.low,
                            "high": interval.high,
                            "null_mean": null.mean,
                            "null_q95": null.q95,
                            "p": null.p,
                            "uniform": chance[measure],
                            "n_images": interval.n,
                            "n": int(scored.sum()),
                            "candidates": len(columns),
                            "vocabulary": vocabulary,
                            "seed": config.seed,
                        }
                    )
                    by_image = {
                        "image_id": [image_ids[number] for number in scored_images],
                        "value": observed[m, n],
                        "null": null_by_image[m, n],
                    }
                    per_image.append(pd.DataFrame(names | by_image))
    return pd.DataFrame(rows), pd.concat(per_image, ignore_index=True)


def _measured(
    logp: Float[np.ndarray, "token layer word"], rank: Float[np.ndarray, "token layer word"]
) -> Float[np.ndarray, "measure token layer word"]:
    """Return every measure of every candidate as if it were the right word; tied candidates share their ranks."""
    greater = (logp[..., None, :] > logp[..., :, None]).sum(-1)
    equal = (logp[..., None, :] == logp[..., :, None]).sum(-1)  # itself included
    return np.stack([(greater == 0) / equal, 1 / (1 + greater + (equal - 1) / 2), 1 / rank, np.exp(logp)])


def _by_image(
    values: Float[np.ndarray, "measure token layer word"],
    right: Int[np.ndarray, " token"],
    image: Int[np.ndarray, " token"],
) -> Float[np.ndarray, "measure layer image"]:
    """Return the mean over each image's tokens of the values of their right words."""
    of_right_word = np.take_along_axis(values, right[None, :, None, None], axis=-1)[..., 0]
    sums = np.zeros((image.max() + 1, of_right_word.shape[0], of_right_word.shape[2]))
    np.add.at(sums, image, of_right_word.transpose(1, 0, 2))
    return sums.transpose(1, 2, 0) / np.bincount(image)


def _elsewhere(image: Int[np.ndarray, " token"], seed: list[int]) -> Int[np.ndarray, " token"]:
    """Return for each token a random token of another image; all tokens of an image get the same other image.

    Args:
        image: image of each token, 0 to n - 1 without gaps.
    """
    rng = np.random.default_rng(seed)
    counts = np.bincount(image)
    order = np.argsort(image, kind="stable")
    starts = np.cumsum(counts) - counts
    other = (np.arange(len(counts)) + 1 + rng.integers(len(counts) - 1, size=len(counts))) % len(counts)
    drawn = rng.integers(counts[other[image]])
    return order[starts[other[image]] + drawn]


def _chance(candidates: int, vocabulary: int) -> dict[str, float]:
    """Return the expected value of each measure if all orders of the words are equally likely."""
    return {
        "first": 1 / candidates,
        "candidate_rank": float((1 / np.arange(1, candidates + 1)).mean()),
        "reciprocal_rank": float((1 / np.arange(1, vocabulary + 1)).mean()),
        "probability": 1 / vocabulary,
    }
