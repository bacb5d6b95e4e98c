"""The words that visual tokens predict at each layer (logit lens), and whether they name the object under the token.

    python -m analyses.logit_lens --model runs/baseline runs/viral --data shapes:val --limit 200 --output_dir runs

The model's own final norm and output head are applied to the visual tokens of layers 0 to L (nostalgebraist 2020; for
visual tokens Neo et al. 2024, arXiv 2410.07149). At layer L this gives the model's own output at these positions, which
is checked for every model.

What the numbers are: for tokens whose patch is covered by an object by at least `cover`, the probability and the rank
of the object's color and class words. Rank 1 is the most likely token of the vocabulary. A word is represented by its
first token after a space; the run's record lists these tokens, and the words that were left out. `first` and
`candidate_rank` compare the words of one kind (all colors or all classes of the data set) with one another,
`reciprocal_rank` the whole vocabulary. Tokens whose patch no object touches (`background`) are scored by the words of a
random object of their image. The null gives each token the words of a random token of another image. Every image has
the same weight.

What they are not: what a layer knows. A token is trained to serve later tokens, not to predict a word at its own
position, so information that the lens does not find may still be there (see linear_probe). Every image is read with the
same prompt, so that no question can give the answer away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int
from torch import Tensor

from workbench import figures as fig
from workbench.analysis.chunks import Chunk, Part, joined
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, DataOptions, Result
from workbench.capture.hidden_states import check_layers, read
from workbench.data.base import Sample, class_and_color
from workbench.data.folder import QUESTION
from workbench.errors import ConfigError, DataError
from workbench.lens import Lens, first_tokens, lens_of
from workbench.mllm.base import MLLM
from workbench.mllm.family import VisualTokens
from workbench.runs import Run
from workbench.spatial.grids import BACKGROUND, canvas, object_per_token
from workbench.stats import mean_intervals, null_of, paired_differences

PAGE = "Logit lens"
WORD_KINDS = ("class", "colour")
PATCH_KINDS = ("object", "background")
MEASURES = {
    "first": "right word first of its kind",
    "candidate_rank": "1 / rank among words of its kind",
    "reciprocal_rank": "1 / rank in the vocabulary",
    "probability": "probability of the right word",
}
ROWS = 256  # tokens whose logits over the vocabulary are in memory at once
SIDE = 448  # maximum width and height of a stored image, in pixels


@dataclass(frozen=True)
class Config(DataOptions):
    """Options of the logit lens."""

    layers: tuple[int, ...] = ()
    """Layers of the model, 0 to L; all by default."""
    scores: bool = True
    """Score the words against the objects under the tokens; --no-scores takes any data and only draws maps."""
    cover: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of a token's patch that an object must cover."""
    tokens_per_image: Annotated[int, Ge(1)] = 32
    """Maximum number of tokens on objects scored per image, and as many on the background."""
    null: Annotated[int, Ge(10)] = 100
    """Random reassignments of words to images for the null."""
    maps: Annotated[int, Ge(0)] = 3
    """Images for which the words of every patch are stored and drawn."""
    top: Annotated[int, Ge(1)] = 5
    """Most likely words stored for each patch of a map."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scores and not self.maps:
            raise ConfigError("maps is 0 without scores, so nothing is measured: expected at least 1, or --scores")


@dataclass
class Words:
    """The words that are scored.

    Attributes:
        names: all words; a word's position is its column in arrays with a dimension "word".
        tokens: token id of each word.
        kinds: {"class" or "colour": columns of the words of this kind}.
        record: what the run's record says about the words.
    """

    names: list[str]
    tokens: list[int]
    kinds: dict[str, list[int]]
    record: dict[str, Any]

    def of(self, name: str) -> dict[str, int]:
        """Return the columns of the words in an object's name by kind; kinds without a scored word are absent."""
        return {
            kind: self.names.index(word)
            for kind, word in zip(WORD_KINDS, class_and_color(name), strict=True)
            if kind in self.kinds and word in self.names and self.names.index(word) in self.kinds[kind]
        }


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
    logp: list[Float[np.ndarray, "token layer word"]] = field(default_factory=list)
    rank: list[Float[np.ndarray, "token layer word"]] = field(default_factory=list)

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


def run(config: Config, context: Context) -> Result:
    """Apply the lens to the layers, score tokens on objects and background, and store word maps of a few images."""
    layers = check_layers(context.mllm, config.layers)
    images = [scene[0] for scene in context.data.scenes]
    words = _words(config, context, images)
    depends = [words.names, words.tokens, words.kinds]  # the words of all objects of the data set
    parts = context.map(
        "words of visual tokens", images, partial(_read, config, context, layers, words), depends=depends
    )
    tables = {"maps": joined(parts, "maps")}
    tensors = {name: value for part in parts for name, value in part.tensors.items() if name.startswith("image_")}
    if config.scores:
        reading, vocabulary = Reading(), max(part.record["vocabulary"] for part in parts)
        for part in parts:
            reading.take(part)
        tables["scores"], tables["per_image"] = _scores(
            config, reading, words, layers, [s.image_id for s in images], vocabulary
        )
    return Result(tables, tensors, words.record | {"layers": layers})


def _words(config: Config, context: Context, images: Sequence[Sample]) -> Words:
    """Return the class and color words of all objects of the data set, each with the token that represents it."""
    if not config.scores:
        return Words([], [], {}, {})
    if not any(sample.objects for sample in images):
        raise DataError(
            f"data set '{context.data.name}' has no objects: expected one with objects, such as shapes:val, or"
            " --no-scores for maps alone"
        )
    names = dict.fromkeys(item.name for sample in images for item in sample.objects)
    split_names = [class_and_color(name) for name in names]
    by_kind = {kind: sorted({split[n] for split in split_names} - {""}) for n, kind in enumerate(WORD_KINDS)}
    tokens, left_out = first_tokens(context.mllm, [word for kind_words in by_kind.values() for word in kind_words])
    kinds = {
        kind: [list(tokens).index(word) for word in kind_words if word in tokens]
        for kind, kind_words in by_kind.items()
    }
    kinds = {kind: columns for kind, columns in kinds.items() if len(columns) > 1}
    if not kinds:
        raise DataError(
            f"the objects of '{context.data.name}' have {len(tokens)} words with a token of their own: expected at"
            " least 2 classes or 2 colors to compare"
        )
    tokenizer = context.mllm.processor.tokenizer
    shown = {word: tokenizer.convert_ids_to_tokens(token) for word, token in tokens.items()}
    return Words(list(tokens), list(tokens.values()), kinds, {"words": shown, "words_left_out": left_out})


# --- reading --------------------------------------------------------------------------------------


def _read(config: Config, context: Context, layers: list[int], words: Words, chunk: Chunk[Sample]) -> Part:
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
                rows.append((*place, rank, _readable(mllm, word_id), p, truth, word_id in right))
    return rows


def first_tokens_of(mllm: MLLM, name: str) -> list[int]:
    """Return the token ids that represent the words of an object's name; none if no word has one."""
    try:
        return list(first_tokens(mllm, [word for word in class_and_color(name) if word])[0].values()) if name else []
    except DataError:
        return []


def _readable(mllm: MLLM, token: int) -> str:
    """Return a token as text, or as the tokenizer writes it if it is only a space."""
    tokenizer = mllm.processor.tokenizer
    return tokenizer.decode([token]).strip() or str(tokenizer.convert_ids_to_tokens(token))


# --- scores ---------------------------------------------------------------------------------------


def _scores(
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


# --- tables and figures ---------------------------------------------------------------------------


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return one row for each model, layer, kind of word and measure, for tokens on objects.

    If a run has no scores: for each model and layer, the three words that are the most likely one of most patches.
    """
    if any("scores" not in run.tables for run in runs.values()):
        maps = pd.concat([run.tables["maps"].assign(model=label) for label, run in runs.items()])
        likeliest = maps[maps["rank"] == 1].groupby(["model", "layer"], sort=False)["word"]
        return likeliest.value_counts().groupby(level=[0, 1], sort=False).head(3).rename("cells").reset_index()
    table = pd.concat([run.tables["scores"].assign(model=label) for label, run in runs.items()])
    columns = [
        "model",
        "layer",
        "kind",
        "measure",
        "score",
        "low",
        "high",
        "null_mean",
        "null_q95",
        "p",
        "n_images",
        "n",
        "candidates",
    ]
    return table[table["cells"] == "object"][columns]


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return every model minus the first one, paired over images and Holm-corrected over layers.

    Returns:
        One row for each model, kind of patch, kind of word, measure and layer.
    """
    tables = {label: run.tables["per_image"] for label, run in runs.items()}
    seed = int(next(iter(runs.values())).record["seed"])
    return paired_differences(
        tables, by=("cells", "kind", "measure", "layer"), within=("cells", "kind", "measure"), seed=seed
    )


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw the words over each stored image, every score by layer over its null, and its difference between models."""
    drawn: dict[str, go.Figure] = {}
    for number in sorted({n for run in runs.values() for n in run.tables["maps"]["number"]}):
        word_maps = [
            _word_map(label, run, number)
            for label, run in runs.items()
            if (run.tables["maps"]["number"] == number).any()
        ]
        drawn[f"Words over image {number}"] = fig.word_maps(word_maps)
    scored = {label: run for label, run in runs.items() if "scores" in run.tables}
    if not scored:
        return drawn
    table = pd.concat([run.tables["scores"].assign(model=label) for label, run in scored.items()])
    changes = differences(scored)
    for kind in dict.fromkeys(table["kind"]):
        for measure, title in MEASURES.items():
            rows = table[(table["kind"] == kind) & (table["measure"] == measure)]
            drawn[f"{kind}: {title}"] = fig.layer_curves(rows, y=title, kind="cells")
            change = changes[
                (changes["kind"] == kind) & (changes["measure"] == measure) & (changes["cells"] == "object")
            ]
            if len(change):
                drawn[f"{kind}: {title}, difference on objects"] = fig.difference_curves(
                    change, y=f"{title}, minus {change['against'].iloc[0]}"
                )
    return drawn


def _word_map(label: str, run: Run, number: int) -> fig.WordMap:
    table = run.tables["maps"]
    return fig.WordMap(label, run.tensors[f"image_{number}"].numpy(), table[table["number"] == number])


# version 2: intervals that reach their nominal coverage
ANALYSIS = Analysis(
    "logit_lens",
    "Which words the visual tokens predict at each layer (logit lens)",
    Config,
    run,
    figures,
    summary,
    PAGE,
    version=2,
)

if __name__ == "__main__":
    main(ANALYSIS)
