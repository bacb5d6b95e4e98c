"""What the lens reads at the visual tokens of a chunk of images."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.logit_lens.words import WORD_KINDS, Config, Words, first_tokens_of
from workbench.analysis.chunks import Chunk, Part
from workbench.analysis.declaration import Context
from workbench.capture.hidden_states import read
from workbench.data.base import Sample
from workbench.data.folder import QUESTION
from workbench.lens import Lens, lens_of, readable
from workbench.mllm.base import MLLM
from workbench.mllm.family import VisualTokens
from workbench.spatial.grids import BACKGROUND, canvas, object_per_token

PATCH_KINDS = ("object", "background")
ROWS = 256  # tokens whose logits over the vocabulary are in memory at once
SIDE = 448  # maximum width and height of a stored image, in pixels


@dataclass
class Reading:
    """Measurements at the scored tokens, one row for each.

    Attributes:
        image_numbers: number of the token's image.
        patch_kinds: "object" or "background".
        labels: {kind of word: column of the right word, or -1 where the object has no word of this kind}.
        logp: log-probability of each word.
        rank: rank of each word in the vocabulary.
    """

    image_numbers: list[int] = field(default_factory=list)
    patch_kinds: list[str] = field(default_factory=list)
    labels: dict[str, list[int]] = field(default_factory=lambda: {kind: [] for kind in WORD_KINDS})
    logp: list[Float[np.ndarray, "_token layer word"]] = field(default_factory=list)
    rank: list[Float[np.ndarray, "_token layer word"]] = field(default_factory=list)

    def part(self) -> Part:
        """Return the measurements as a part to be stored."""
        arrays = {name: np.concatenate(getattr(self, name)) for name in ("logp", "rank") if self.logp}
        record = {"image": self.image_numbers, "cells": self.patch_kinds, "labels": self.labels}
        return Part(tensors={name: torch.from_numpy(array) for name, array in arrays.items()}, record=record)

    def take(self, part: Part) -> None:
        """Append the measurements of a stored part; parts come in the order of their images."""
        self.image_numbers += part.record["image"]
        self.patch_kinds += part.record["cells"]
        for kind, labels in part.record["labels"].items():
            self.labels[kind] += labels
        for name in ("logp", "rank"):
            if name in part.tensors:
                getattr(self, name).append(part.tensors[name].numpy())


def read_chunk(config: Config, context: Context, layers: list[int], words: Words, chunk: Chunk[Sample]) -> Part:
    """Score the words at sampled tokens of a chunk's images, and map the words of all tokens of the first images."""
    mllm, reading, rows, tensors, lens, vocabulary = context.mllm, Reading(), [], {}, None, 0
    for start, samples in chunk.batches():
        batch = mllm.encode([s.image for s in samples], [QUESTION] * len(samples))
        lens = lens or lens_of(mllm, batch)
        activations = read(mllm, batch, layers=layers)
        for number, (sample, hidden, parts) in enumerate(
            zip(samples, activations, mllm.visual_tokens(batch), strict=True), start=start
        ):
            if config.scores:
                vocabulary = _score_tokens(config, reading, words, lens, hidden.values, number, sample, parts)
            if number < config.maps:
                rows += _map(config, mllm, lens, hidden.values, layers, number, sample, parts)
                image = sample.image.copy()
                image.thumbnail((SIDE, SIDE))
                tensors[f"image_{number}"] = torch.from_numpy(np.array(image))
    columns = ["number", "image_id", "layer", "token", *EDGES, "rank", "word", "probability", "truth", "right_word"]
    state = reading.part()
    return Part(
        {"maps": pd.DataFrame(rows, columns=columns)},
        state.tensors | tensors,
        state.record | {"vocabulary": vocabulary},
    )


def _score_tokens(
    config: Config,
    reading: Reading,
    words: Words,
    lens: Lens,
    values: Float[Tensor, "layer token d"],
    number: int,
    sample: Sample,
    parts: list[VisualTokens],
) -> int:
    """Add the log-probability and rank of every word at random tokens of an image to `reading`.

    Args:
        number: number of the image.
        parts: its visual tokens, one part for each tile.

    Returns:
        Size of the vocabulary; 0 if the image has no token to score.
    """
    object_of_token = object_per_token(sample.objects, parts, share=config.cover)
    rng = np.random.default_rng([config.seed, number])
    object_words = [words.of(item.name) for item in sample.objects]
    chosen: list[int] = []
    candidates = (object_of_token >= 0, object_of_token == BACKGROUND)
    for patch_kind, is_candidate in zip(PATCH_KINDS, candidates, strict=True):
        tokens = np.empty(0, dtype=int)
        if sample.objects:
            tokens = rng.permutation(is_candidate.nonzero()[0])[: config.tokens_per_image]
        on_object = patch_kind == "object"
        objects = object_of_token[tokens] if on_object else rng.integers(max(1, len(object_words)), size=len(tokens))
        chosen += tokens.tolist()
        reading.image_numbers += [number] * len(tokens)
        reading.patch_kinds += [patch_kind] * len(tokens)
        for word_kind in WORD_KINDS:
            reading.labels[word_kind] += [object_words[n].get(word_kind, -1) for n in objects]
    if not chosen:
        return 0
    logp, rank, vocabulary = _ranked(lens, values[:, chosen], words.tokens)
    reading.logp.append(logp.transpose(1, 0, 2))
    reading.rank.append(rank.transpose(1, 0, 2))
    return vocabulary


def _ranked(lens: Lens, values: Float[Tensor, "layer token d"], ids: list[int]) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the log-probability and the rank of the token ids among the whole vocabulary.

    Returns:
        Log-probability (layer, token, word); rank (layer, token, word), 1 for the most likely, the mean of their ranks
        for ties; size of the vocabulary.
    """
    logps, ranks, vocabulary = [], [], 0
    for rows in values.flatten(0, 1).split(ROWS):
        logits = lens(rows)
        vocabulary = logits.shape[1]
        word_logits = logits[:, ids].contiguous()
        ordered = logits.sort(dim=1).values
        below = torch.searchsorted(ordered, word_logits)
        up_to = torch.searchsorted(ordered, word_logits, right=True)
        ranks.append((vocabulary - up_to + (up_to - below + 1) / 2).cpu())
        logps.append((word_logits - logits.logsumexp(1, keepdim=True)).cpu())
    logp, rank = (torch.cat(blocks).unflatten(0, values.shape[:2]).numpy() for blocks in (logps, ranks))
    return logp, rank, vocabulary


EDGES = ("left", "top", "right", "bottom")


def _map(
    config: Config,
    mllm: MLLM,
    lens: Lens,
    values: Float[Tensor, "layer token d"],
    layers: list[int],
    number: int,
    sample: Sample,
    parts: list[VisualTokens],
) -> list[tuple]:
    """Return rows of the table maps: the most likely words of every token of the finest grid at every layer.

    A word is right if its token represents a word of the object under the token (its "truth").
    """
    object_of_token = object_per_token(sample.objects, parts, share=config.cover)
    canvas(parts)  # raises for tokens without a place in the image
    patches = [
        part.token_box(row, column)
        for part in parts
        for row in range(part.grid[0])  # type: ignore[index]
        for column in range(part.grid[1])  # type: ignore[index]
    ]
    areas = np.array([(right - left) * (bottom - top) for left, top, right, bottom in patches])
    finest = (areas <= areas.min() * 1.03).nonzero()[0]
    rows: list[tuple] = []
    for layer, hidden in zip(layers, values, strict=True):
        best = torch.cat(
            [lens(block).softmax(-1).topk(config.top).values.cpu() for block in hidden[finest].split(ROWS)]
        )
        ids = torch.cat([lens(block).topk(config.top).indices.cpu() for block in hidden[finest].split(ROWS)])
        for token, probabilities, likely_ids in zip(finest.tolist(), best.tolist(), ids.tolist(), strict=True):
            truth = sample.objects[object_of_token[token]].name if object_of_token[token] >= 0 else ""
            right = set(first_tokens_of(mllm, truth))
            place = (number, sample.image_id, layer, token, *patches[token])
            for rank, (word_id, p) in enumerate(zip(likely_ids, probabilities, strict=True), start=1):
                rows.append((*place, rank, readable(mllm, word_id), p, truth, word_id in right))
    return rows
