"""Which words the visual tokens would say at each layer (logit lens), and whether they are the words of what lies under
them.

    python -m analyses.logit_lens --model runs/baseline runs/viral --data shapes:val --limit 200 --output_dir runs

The model's own final norm and output head are applied to the visual tokens of layers 0 to L (nostalgebraist 2020; on
visual tokens Neo et al. 2024, arXiv 2410.07149). At layer L this is the model's own output there, which is checked on
every model.

What the numbers are: for cells that an object covers by at least `cover`, the probability and the rank of the object's
colour and class words; rank 1 is the most likely token. A word counts by its first token after a space; the run's
record lists them, and the words left out. `first` and `candidate_rank` compare the words of the same kind in the data
set with one another, `reciprocal_rank` the whole vocabulary. Cells that no object touches (`background`) are scored by
the words of a random object of their image. The null gives each cell the words of a random cell of another image. Every
image weighs the same.

What they are not: what a layer knows. A token is trained to serve later tokens, not to say a word at its own place, so
a word that the lens does not find may still be there (see linear_probe). Every image is read with the same prompt, so
that no question can tell its answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
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
KINDS = ("class", "colour")
CELLS = ("object", "background")
MEASURES = {
    "first": "right word first of its kind",
    "candidate_rank": "1 / rank among words of its kind",
    "reciprocal_rank": "1 / rank in the vocabulary",
    "probability": "probability of the right word",
}
ROWS = 256  # tokens whose logits over the vocabulary exist at once
SIDE = 448  # pixels of a stored picture at most


@dataclass(frozen=True)
class Config(DataOptions):
    """What to read, and what it is compared with."""

    layers: tuple[int, ...] = ()
    """Layers of the model, 0 to L; all by default."""
    scores: bool = True
    """Compare the words with the objects under the tokens; --no-scores takes any data, for maps alone."""
    cover: float = 0.5
    """Share of a cell that an object has to cover."""
    tokens_per_image: int = 32
    """Cells of each image that are scored, at most; as many background cells again."""
    null: int = 100
    """Times that images change places for the null."""
    maps: int = 3
    """Images whose words are stored cell by cell."""
    top: int = 5
    """Words of each cell in a map."""

    def __post_init__(self) -> None:
        for name, least in (("tokens_per_image", 1), ("null", 10), ("maps", 0), ("top", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least {least}")
        if not 0 < self.cover <= 1:
            raise ConfigError(f"cover is {self.cover:g}: expected more than 0, 1 at most")
        if not self.scores and not self.maps:
            raise ConfigError("maps is 0 without scores: expected at least 1, or --scores")


@dataclass
class Words:
    """The words that are scored: `tokens` of all of them, and the columns of each kind."""

    names: list[str]
    tokens: list[int]
    kinds: dict[str, list[int]]
    record: dict[str, Any]

    def of(self, name: str) -> dict[str, int]:
        """The column of an object's word of each kind, where it has one."""
        return {
            kind: self.names.index(word)
            for kind, word in zip(KINDS, class_and_color(name), strict=True)
            if kind in self.kinds and word in self.names and self.names.index(word) in self.kinds[kind]
        }


@dataclass
class Reading:
    """What was read of the scored cells, one row for each; a label of -1 is an object without a word of that kind."""

    image: list[int] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)
    labels: dict[str, list[int]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    logp: list[Float[np.ndarray, "cell layer word"]] = field(default_factory=list)
    rank: list[Float[np.ndarray, "cell layer word"]] = field(default_factory=list)

    def part(self) -> Part:
        """Its state, to be stored."""
        arrays = {name: np.concatenate(getattr(self, name)) for name in ("logp", "rank") if self.logp}
        record = {"image": self.image, "cells": self.cells, "labels": self.labels}
        return Part(tensors={name: torch.from_numpy(array) for name, array in arrays.items()}, record=record)

    def take(self, part: Part) -> None:
        """Add the state of another reading, of the images that follow."""
        self.image += part.record["image"]
        self.cells += part.record["cells"]
        for kind, labels in part.record["labels"].items():
            self.labels[kind] += labels
        for name in ("logp", "rank"):
            if name in part.tensors:
                getattr(self, name).append(part.tensors[name].numpy())


def run(config: Config, context: Context) -> Result:
    """Read the layers, score the cells of objects, and keep the words of a few images."""
    layers = check_layers(context.mllm, config.layers)
    images = [scene[0] for scene in context.data.scenes]
    words = _words(config, context, images)
    depends = [words.names, words.tokens, words.kinds]  # the words of all objects of the data set
    parts = context.map(
        "words of visual tokens", images, partial(_read, config, context, layers, words), depends=depends
    )
    tables, tensors = (
        {"maps": joined(parts, "maps")},
        {name: value for part in parts for name, value in part.tensors.items() if name.startswith("image_")},
    )
    if config.scores:
        reading, vocabulary = Reading(), max(part.record["vocabulary"] for part in parts)
        for part in parts:
            reading.take(part)
        tables["scores"], tables["per_image"] = _scores(
            config, reading, words, layers, [s.image_id for s in images], vocabulary
        )
    return Result(tables, tensors, words.record | {"layers": layers})


def _words(config: Config, context: Context, images: Sequence[Sample]) -> Words:
    """The class and colour words of all objects of the data set, each with a token that stands for it."""
    if not config.scores:
        return Words([], [], {}, {})
    if not any(sample.objects for sample in images):
        raise DataError(
            f"data set '{context.data.name}' knows no objects: expected one that does, such as shapes:val, or"
            " --no-scores for maps alone"
        )
    parts = [
        class_and_color(name) for name in dict.fromkeys(thing.name for sample in images for thing in sample.objects)
    ]
    by_kind = {kind: sorted({own[number] for own in parts} - {""}) for number, kind in enumerate(KINDS)}
    tokens, left_out = first_tokens(context.mllm, [word for own in by_kind.values() for word in own])
    kinds = {kind: [list(tokens).index(word) for word in own if word in tokens] for kind, own in by_kind.items()}
    kinds = {kind: own for kind, own in kinds.items() if len(own) > 1}
    if not kinds:
        raise DataError(
            f"the objects of '{context.data.name}' have {len(tokens)} words with a token of their own: expected at"
            " least 2 of a kind to compare"
        )
    tokenizer = context.mllm.processor.tokenizer
    shown = {word: tokenizer.convert_ids_to_tokens(token) for word, token in tokens.items()}
    return Words(list(tokens), list(tokens.values()), kinds, {"words": shown, "words_left_out": left_out})


# --- reading --------------------------------------------------------------------------------------


def _read(config: Config, context: Context, layers: list[int], words: Words, chunk: Chunk[Sample]) -> Part:
    """The scored words at the scored cells of a chunk, and of the first images the most likely words of every cell."""
    mllm, reading, rows, tensors, lens, vocabulary = context.mllm, Reading(), [], {}, None, 0
    for start, part in chunk.batches():
        batch = mllm.encode([s.image for s in part], [QUESTION] * len(part))
        lens = lens or lens_of(mllm, batch)
        found = read(mllm, batch, layers=layers)
        for number, (sample, own, parts) in enumerate(
            zip(part, found, mllm.visual_tokens(batch), strict=True), start=start
        ):
            if config.scores:
                vocabulary = _score_cells(config, reading, words, lens, own.values, number, sample, parts)
            if number < config.maps:
                rows += _map(config, mllm, lens, own.values, layers, number, sample, parts)
                picture = sample.image.copy()
                picture.thumbnail((SIDE, SIDE))
                tensors[f"image_{number}"] = torch.from_numpy(np.array(picture))
    columns = ["number", "image_id", "layer", "token", *EDGES, "rank", "word", "probability", "truth", "right_word"]
    state = reading.part()
    return Part(
        {"maps": pd.DataFrame(rows, columns=columns)},
        state.tensors | tensors,
        state.record | {"vocabulary": vocabulary},
    )


def _score_cells(
    config: Config,
    reading: Reading,
    words: Words,
    lens: Lens,
    values: Float[Tensor, "layer token d"],
    number: int,
    sample: Sample,
    parts: list[VisualTokens],
) -> int:
    """Log-probability and rank of every word at some of an image's cells; returns the size of the vocabulary."""
    own = object_per_token(sample.objects, parts, share=config.cover)
    rng = np.random.default_rng([config.seed, number])
    known = [words.of(thing.name) for thing in sample.objects]
    chosen: list[int] = []
    for kind, there in zip(CELLS, (own >= 0, own == BACKGROUND), strict=True):
        cells = (
            rng.permutation(there.nonzero()[0])[: config.tokens_per_image] if sample.objects else np.empty(0, dtype=int)
        )
        things = own[cells] if kind == "object" else rng.integers(max(1, len(known)), size=len(cells))
        chosen += cells.tolist()
        reading.image += [number] * len(cells)
        reading.cells += [kind] * len(cells)
        for name in KINDS:
            reading.labels[name] += [known[thing].get(name, -1) for thing in things]
    if not chosen:
        return 0
    logp, rank, vocabulary = _ranked(lens, values[:, chosen], words.tokens)
    reading.logp.append(logp.transpose(1, 0, 2))
    reading.rank.append(rank.transpose(1, 0, 2))
    return vocabulary


def _ranked(lens: Lens, values: Float[Tensor, "layer cell d"], tokens: list[int]) -> tuple[np.ndarray, np.ndarray, int]:
    """Log-probability over the vocabulary and rank in it (1 is the most likely, ties share their mean) of `tokens`,
    (layer, cell, word)."""
    logps, ranks, vocabulary = [], [], 0
    for part in values.flatten(0, 1).split(ROWS):
        logits = lens(part)
        vocabulary = logits.shape[1]
        wanted = logits[:, tokens].contiguous()
        ordered = logits.sort(dim=1).values
        below = torch.searchsorted(ordered, wanted)
        upto = torch.searchsorted(ordered, wanted, right=True)
        ranks.append((vocabulary - upto + (upto - below + 1) / 2).cpu())
        logps.append((wanted - logits.logsumexp(1, keepdim=True)).cpu())
    logp, rank = (torch.cat(own).unflatten(0, values.shape[:2]).numpy() for own in (logps, ranks))
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
    """The most likely words of every cell of the finest raster, and whether the first is a word of the object under
    it."""
    own = object_per_token(sample.objects, parts, share=config.cover)
    canvas(parts)  # refuses tokens without a place
    cells = [
        part.token_box(row, column)
        for part in parts
        for row in range(part.grid[0])  # type: ignore[index]
        for column in range(part.grid[1])  # type: ignore[index]
    ]
    areas = np.array([(right - left) * (bottom - top) for left, top, right, bottom in cells])
    finest = (areas <= areas.min() * 1.03).nonzero()[0]
    rows = []
    for layer, hidden in zip(layers, values, strict=True):
        best = torch.cat([lens(part).softmax(-1).topk(config.top).values.cpu() for part in hidden[finest].split(ROWS)])
        ids = torch.cat([lens(part).topk(config.top).indices.cpu() for part in hidden[finest].split(ROWS)])
        for cell, likely, tokens in zip(finest.tolist(), best.tolist(), ids.tolist(), strict=True):
            truth = sample.objects[own[cell]].name if own[cell] >= 0 else ""
            right = set(first_tokens_of(mllm, truth))
            rows += [
                (
                    number,
                    sample.image_id,
                    layer,
                    cell,
                    *cells[cell],
                    rank,
                    _readable(mllm, token),
                    p,
                    truth,
                    token in right,
                )
                for rank, (token, p) in enumerate(zip(tokens, likely, strict=True), start=1)
            ]
    return rows


def first_tokens_of(mllm: MLLM, name: str) -> list[int]:
    """The tokens that stand for the words of an object's name, where it has any."""
    try:
        return list(first_tokens(mllm, [word for word in class_and_color(name) if word])[0].values()) if name else []
    except DataError:
        return []


def _readable(mllm: MLLM, token: int) -> str:
    tokenizer = mllm.processor.tokenizer
    return tokenizer.decode([token]).strip() or str(tokenizer.convert_ids_to_tokens(token))


# --- scores ---------------------------------------------------------------------------------------


def _scores(
    config: Config, reading: Reading, words: Words, layers: list[int], image_ids: list[str], vocabulary: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row for each layer, kind of cell, kind of word and measure; and the values of the images, with their own
    null."""
    if not reading.logp:
        raise DataError(
            f"no cell is covered by an object to {config.cover:g} or free of objects in {len(image_ids)} images:"
            " expected some, or a smaller cover"
        )
    logp, rank, image, where = (
        np.concatenate(reading.logp),
        np.concatenate(reading.rank),
        np.array(reading.image),
        np.array(reading.cells),
    )
    rows, each = [], []
    for cells in CELLS:
        for kind, columns in words.kinds.items():
            label = np.array(reading.labels[kind])
            there = (where == cells) & (label >= 0)
            units = np.unique(image[there])
            if len(units) < 2:
                if cells == "object":
                    raise DataError(
                        f"{len(units)} of {len(image_ids)} images have a cell covered to {config.cover:g} by an object"
                        f" with a {kind}: expected at least 2"
                    )
                continue
            right = np.array([columns.index(own) for own in label[there]])
            # (measure, cell, layer, candidate)
            values = _measured(logp[there][..., columns], rank[there][..., columns])
            owner = np.searchsorted(units, image[there])
            own = _by_image(values, right, owner)  # (measure, layer, image)
            draws = [
                _by_image(values, right[_elsewhere(owner, [config.seed, draw])], owner) for draw in range(config.null)
            ]
            nulls = np.stack([draw.mean(-1) for draw in draws])  # (draw, measure, layer)
            by_image = np.mean(draws, axis=0)
            chance = _chance(len(columns), vocabulary)
            for m, measure in enumerate(MEASURES):
                for at, (layer, interval) in enumerate(
                    zip(layers, mean_intervals(own[m].T, kind="proportion"), strict=True)
                ):
                    null = null_of(interval.estimate, nulls[:, m, at])
                    named = {"layer": layer, "cells": cells, "kind": kind, "measure": measure}
                    rows.append(
                        named
                        | {
                            "score": interval.estimate,
                            "low": interval.low,
                            "high": interval.high,
                            "null_mean": null.mean,
                            "null_q95": null.q95,
                            "p": null.p,
                        }
                        | {
                            "uniform": chance[measure],
                            "n_images": interval.n,
                            "n": int(there.sum()),
                            "candidates": len(columns),
                            "vocabulary": vocabulary,
                        }
                        | {"seed": config.seed}
                    )
                    each.append(
                        pd.DataFrame(
                            named
                            | {
                                "image_id": [image_ids[u] for u in units],
                                "value": own[m, at],
                                "null": by_image[m, at],
                            }
                        )
                    )
    return pd.DataFrame(rows), pd.concat(each, ignore_index=True)


def _measured(
    logp: Float[np.ndarray, "cell layer word"], rank: Float[np.ndarray, "cell layer word"]
) -> Float[np.ndarray, "measure cell layer word"]:
    """Every measure of every candidate, as if it were the right word; equal candidates share their places."""
    greater = (logp[..., None, :] > logp[..., :, None]).sum(-1)
    equal = (logp[..., None, :] == logp[..., :, None]).sum(-1)  # itself included
    return np.stack([(greater == 0) / equal, 1 / (1 + greater + (equal - 1) / 2), 1 / rank, np.exp(logp)])


def _by_image(values: np.ndarray, right: np.ndarray, owner: np.ndarray) -> Float[np.ndarray, "measure layer image"]:
    """The mean over each image's cells of the values of their words."""
    own = np.take_along_axis(values, right[None, :, None, None], axis=-1)[..., 0]
    sums = np.zeros((owner.max() + 1, own.shape[0], own.shape[2]))
    np.add.at(sums, owner, own.transpose(1, 0, 2))
    return sums.transpose(1, 2, 0) / np.bincount(owner)


def _elsewhere(owner: np.ndarray, seed: list[int]) -> np.ndarray:
    """For each cell, a random cell of another image, one other image for all cells of an image."""
    rng = np.random.default_rng(seed)
    counts = np.bincount(owner)
    order = np.argsort(owner, kind="stable")
    starts = np.cumsum(counts) - counts
    other = (np.arange(len(counts)) + 1 + rng.integers(len(counts) - 1, size=len(counts))) % len(counts)
    drawn = rng.integers(counts[other[owner]])
    return order[starts[other[owner]] + drawn]


def _chance(candidates: int, vocabulary: int) -> dict[str, float]:
    """Each measure where all orders of the words are equally likely."""
    return {
        "first": 1 / candidates,
        "candidate_rank": float((1 / np.arange(1, candidates + 1)).mean()),
        "reciprocal_rank": float((1 / np.arange(1, vocabulary + 1)).mean()),
        "probability": 1 / vocabulary,
    }


# --- tables and figures ---------------------------------------------------------------------------


def summary(found: Mapping[str, Run]) -> pd.DataFrame:
    """One row per model, layer, kind of word and measure, for the cells of objects; without scores, the words that lead
    most cells of the maps."""
    if any("scores" not in run.tables for run in found.values()):
        first = pd.concat([run.tables["maps"].assign(model=label) for label, run in found.items()])
        first = first[first["rank"] == 1].groupby(["model", "layer"], sort=False)["word"]
        return first.value_counts().groupby(level=[0, 1], sort=False).head(3).rename("cells").reset_index()
    table = pd.concat([run.tables["scores"].assign(model=label) for label, run in found.items()])
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


def differences(found: Mapping[str, Run]) -> pd.DataFrame:
    """Every model minus the first, paired over images, Holm-corrected over layers: one row for each kind of cell, kind
    of word, measure and layer."""
    tables = {label: run.tables["per_image"] for label, run in found.items()}
    seed = int(next(iter(found.values())).record["seed"])
    return paired_differences(
        tables, by=("cells", "kind", "measure", "layer"), within=("cells", "kind", "measure"), seed=seed
    )


def figures(found: Mapping[str, Run]) -> dict[str, go.Figure]:
    """The words over each stored image, then every score by layer over its null, and its difference between models."""
    drawn: dict[str, go.Figure] = {}
    for number in sorted({n for run in found.values() for n in run.tables["maps"]["number"]}):
        shown = [
            _word_map(label, run, number)
            for label, run in found.items()
            if (run.tables["maps"]["number"] == number).any()
        ]
        drawn[f"Words over image {number}"] = fig.word_maps(shown)
    scored = {label: run for label, run in found.items() if "scores" in run.tables}
    if not scored:
        return drawn
    table = pd.concat([run.tables["scores"].assign(model=label) for label, run in scored.items()])
    changes = differences(scored)
    for kind in dict.fromkeys(table["kind"]):
        for measure, title in MEASURES.items():
            own = table[(table["kind"] == kind) & (table["measure"] == measure)]
            drawn[f"{kind}: {title}"] = fig.layer_curves(own, y=title, kind="cells")
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


# 2: intervals that cover what they say
ANALYSIS = Analysis(
    "logit_lens",
    "Which words the visual tokens would say at each layer (logit lens)",
    Config,
    run,
    figures,
    summary,
    PAGE,
    version=2,
)

if __name__ == "__main__":
    main(ANALYSIS)
