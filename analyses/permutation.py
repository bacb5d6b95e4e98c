"""What becomes of the answers when visual tokens change places (docs/paper.md, A5), at the tower and inside every
layer.

    python -m analyses.permutation --model runs/baseline runs/viral --data shapes:val --limit 200 --output_dir runs

What the number is: accuracy before minus accuracy after, on the same questions, with an interval over images; and
KL(before || after) of the answer over the question's options, in nats. The permutation is drawn anew for each image,
and again for each of the `permutations`, whose mean is taken. What it is not: a measure of how well a model knows where
things are. At the tower, features that carry their place carry it along when they are permuted, which hides the effect;
so three things are permuted apart (`part`):

    whole      features with their positions: rows of the connector's input change places, as in the paper
    features   features alone: the positional part stays where it is, what remains of each feature moves
    positions  positions alone: the positional part moves, what remains of each feature stays

The positional part of a place is the mean of the tower's features there over the images of the run, so it is estimated
on `n_images` images; what depends on place *and* content together counts as content. And a drop of 0 deep inside may
mean that order does not matter there or that nothing is read there any more: compare it with the mean token in the same
layer, where every visual token of an image is replaced by their mean.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench import figures as fig
from workbench.analysis.chunks import Chunk, Part, joined
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, DataOptions, Result
from workbench.capture.edit import Site, check_site
from workbench.capture.hidden_states import check_layers
from workbench.data.base import Sample
from workbench.errors import ConfigError, DataError, ModelError
from workbench.mllm import MLLM
from workbench.runs import Run
from workbench.scoring.questions import Grid, grids_of, questions_of, random_order, survey
from workbench.scoring.quiz import Change, Quiz
from workbench.scoring.tables import change_by_type, changes, drops
from workbench.training_folder import MEAN

log = logging.getLogger(__name__)

PARTS = ("whole", "features", "positions")
Order = Callable[[int], Tensor]
"""Number of an image -> the place that each of its tokens is taken from."""


@dataclass(frozen=True)
class Config(DataOptions):
    """What is asked, and what is moved where."""

    layers: tuple[int, ...] = ()
    """Layers inside which tokens are permuted, 0 to L; all by default. The tower is always among the places."""
    types: tuple[str, ...] = ()
    """Question types; all by default."""
    questions: int = 1
    """Questions of each type about an image, 0 for all."""
    permutations: int = 2
    """Random permutations of each image, whose results are averaged."""
    block: int = 2
    """Side of the blocks of the block-preserving shuffle, in tokens."""

    def __post_init__(self) -> None:
        for name, least in (("questions", 0), ("permutations", 1), ("block", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least {least}")


@dataclass(frozen=True)
class Condition:
    """One change at one place; `draw` numbers the random ones."""

    place: Site
    kind: str
    part: str
    draw: int
    change: Change


@dataclass(frozen=True)
class Images:
    """What the changes need to know about the images of the run: their rasters, and what the connector receives for
    them (none without the tower)."""

    config: Config
    grids: list[tuple[Grid, ...]]
    features: list[Float[Tensor, "token f"]]

    @property
    def alike(self) -> bool:
        """Whether every image has the same rasters, so that a place means the same in all of them."""
        return len(set(self.grids)) == 1

    def permuted(self, image: int, draw: int) -> Int[Tensor, " token"]:
        """A random order of all visual tokens of an image; the same in every layer and for every part."""
        count = sum(rows * columns for rows, columns in self.grids[image])
        return random_order(count, image=image, draw=draw, seed=self.config.seed)

    def shuffled_blocks(self, image: int, draw: int) -> Int[Tensor, " token"]:
        """A random order of the blocks of each raster; inside of a block nothing moves."""
        rng, b = np.random.default_rng([self.config.seed, draw, image]), self.config.block

        def order(rows: int, columns: int) -> np.ndarray:
            if rows % b or columns % b:
                raise ConfigError(f"block is {b} in a raster of {rows} x {columns} tokens: expected a divisor of both")
            blocks = (
                np.arange(rows * columns).reshape(rows // b, b, columns // b, b).transpose(0, 2, 1, 3).reshape(-1, b, b)
            )
            return rng.permutation(blocks).reshape(rows // b, columns // b, b, b).transpose(0, 2, 1, 3)

        return _joined([order(*grid) for grid in self.grids[image]])

    def transposed(self, image: int) -> Int[Tensor, " token"]:
        """Rows as columns and columns as rows, of square rasters."""
        return _joined([np.arange(rows * columns).reshape(rows, columns).T for rows, columns in self.grids[image]])


def _joined(orders: list[np.ndarray]) -> Int[Tensor, " token"]:
    """One order of the tokens of all rasters of an image, each raster keeping its own."""
    starts = np.cumsum([0, *(order.size for order in orders)])
    return torch.from_numpy(
        np.concatenate([order.reshape(-1) + start for order, start in zip(orders, starts, strict=False)])
    )


def run(config: Config, context: Context) -> Result:
    """Ask every question before and after every change."""
    mllm = context.mllm
    scenes = _asked(config, context)
    places, skipped = _places(mllm, check_layers(mllm, config.layers))
    images = _images(config, context, scenes, places, skipped)
    conditions = list(_conditions(images, places, skipped))
    for what, why in skipped.items():
        log.warning("%s: %s is left out: %s", mllm.name, what, why)
    parts = context.map(
        "permuted questions", scenes, partial(_answers, context, images, conditions), depends=context.data.fingerprint
    )
    samples = joined(parts, "samples")
    tables = {"scores": _scores(samples, config), "samples": samples}
    return Result(tables, record={"skipped": skipped, "positional_share": _positional_share(images)})


def _answers(context: Context, images: Images, conditions: Sequence[Condition], chunk: Chunk[list[Sample]]) -> Part:
    """The questions of a chunk before and after every change."""
    tables = []
    for first, scenes in chunk.batches():
        features = images.features[first : first + len(scenes)] or None
        quiz = Quiz(context.mllm, scenes, chunk.batch_size, features=features, first=first)
        before = quiz.logprobs()
        for one in conditions:
            scored = quiz.scored(before, quiz.logprobs(one.place, one.change))
            tables.append(scored.assign(site=str(one.place), kind=one.kind, part=one.part, draw=one.draw))
    return Part({"samples": pd.concat(tables, ignore_index=True)})


def _asked(config: Config, context: Context) -> list[list[Sample]]:
    scenes = questions_of(context.data.scenes, types=config.types, each=config.questions)
    if len(scenes) < 2:
        raise DataError(
            f"{len(scenes)} image with questions: expected at least 2, since tokens of another image are a control"
        )
    return scenes


def _places(mllm: MLLM, layers: list[int]) -> tuple[list[Site], dict[str, str]]:
    """The places that can be changed, and why the others cannot."""
    places: list[Site] = []
    skipped = {}
    wanted: list[Site] = ["encoder", *layers]
    for place in wanted:
        try:
            places.append(check_site(mllm, place))
        except ModelError as error:
            skipped[f"site {place}"] = str(error)
    if not places:
        raise ModelError(f"{mllm.name}: none of the places can be changed ({next(iter(skipped.values()))})")
    return places, skipped


def _images(
    config: Config, context: Context, scenes: list[list[Sample]], places: list[Site], skipped: dict[str, str]
) -> Images:
    """Rasters and tower features; the tower leaves `places` where its features cannot be told apart."""
    parts = context.map("images of the questions", scenes, partial(_surveyed, context, "encoder" in places), keep=False)
    why = next((part.record["why"] for part in parts if part.record["why"]), "")
    if why:
        places.remove("encoder")
        skipped["site encoder"] = why
    grids = [tuple((rows, columns) for rows, columns in grids) for part in parts for grids in part.record["grids"]]
    features = (
        []
        if why or "encoder" not in places
        else [own for part in parts for own in part.tensors["features"].split(part.record["tokens"])]
    )
    return Images(config, grids, features)


def _surveyed(context: Context, encoder: bool, chunk: Chunk[list[Sample]]) -> Part:
    """Grids of the images of a chunk, and if `encoder` what the connector receives for them, or why that cannot be
    read."""
    grids: list[tuple[Grid, ...]] = []
    features: list[Tensor] = []
    why = ""
    for _, scenes in chunk.batches():
        try:
            rasters, read = survey(context.mllm, scenes, chunk.batch_size, encoder=encoder and not why)
        except ModelError as error:
            if not encoder:
                raise
            why = str(error)
            rasters, read = survey(context.mllm, scenes, chunk.batch_size, encoder=False)
        grids += [grids_of(parts) for parts in rasters]
        features += read
    tensors = {"features": torch.cat(features)} if features and not why else {}
    return Part(tensors=tensors, record={"grids": grids, "tokens": [len(own) for own in features], "why": why})


def _conditions(images: Images, places: list[Site], skipped: dict[str, str]) -> Iterator[Condition]:
    """All changes; what the images' rasters do not allow is noted in `skipped`."""
    if "encoder" in places:
        yield from _controls(images, skipped)
    for place in places:
        for draw in range(images.config.permutations):
            yield Condition(
                place, "permute", "whole", draw, partial(_reordered, order=partial(images.permuted, draw=draw))
            )
        yield Condition(place, "mean token", "whole", 0, lambda v, _: v.mean(0, keepdim=True).expand_as(v))


def _controls(images: Images, skipped: dict[str, str]) -> Iterator[Condition]:
    """What is changed at the tower only: controls, and features and positions apart."""
    draws = range(images.config.permutations)
    yield Condition("encoder", "identity", "whole", 0, lambda v, _: v)
    for draw in draws:
        yield Condition(
            "encoder",
            "block shuffle",
            "whole",
            draw,
            partial(_reordered, order=partial(images.shuffled_blocks, draw=draw)),
        )
    if all(rows == columns for grids in images.grids for rows, columns in grids):
        yield Condition("encoder", "transpose", "whole", 0, partial(_reordered, order=images.transposed))
    else:
        skipped["transpose"] = "a raster is not square"
    if not images.alike:
        skipped["other image"] = skipped["parts features, positions"] = (
            "images have different rasters, so a place is not the same place in all of them"
        )
        return
    others = _others(len(images.grids), images.config.seed)
    yield Condition("encoder", "other image", "whole", 0, lambda _, i: images.features[others[i]])
    mean = torch.stack(images.features).mean(0)
    for draw in draws:
        order = partial(images.permuted, draw=draw)
        yield Condition(
            "encoder", "permute", "features", draw, partial(_part_moved, mean=mean, order=order, features=True)
        )
        yield Condition(
            "encoder", "permute", "positions", draw, partial(_part_moved, mean=mean, order=order, features=False)
        )


def _reordered(values: Float[Tensor, "token d"], image: int, *, order: Order) -> Float[Tensor, "token d"]:
    return values[order(image)]


def _part_moved(
    values: Float[Tensor, "token f"], image: int, *, mean: Float[Tensor, "token f"], order: Order, features: bool
) -> Float[Tensor, "token f"]:
    return _moved(values, mean, order(image), features=features)


def _moved(
    values: Float[Tensor, "token f"], mean: Float[Tensor, "token f"], order: Int[Tensor, " token"], *, features: bool
) -> Float[Tensor, "token f"]:
    """Permute what remains of the features without their positional part, or that part alone."""
    mean = mean.to(values.device)
    rest = values.float() - mean
    return mean + rest[order] if features else mean[order] + rest


def _others(count: int, seed: int) -> list[int]:
    """Another image for each image: the next one on a random circle through all of them."""
    circle = np.random.default_rng([seed, count]).permutation(count)
    others = np.empty(count, dtype=int)
    others[circle] = np.roll(circle, 1)
    return [int(other) for other in others]


def _positional_share(images: Images) -> float | None:
    """Share of the variance of the tower's features that their mean at each place holds; with n images 1/n of the rest
    is in it by chance."""
    if not images.features or not images.alike:
        return None
    features = torch.stack(images.features).double()
    centre = features.mean((0, 1))
    return float(((features.mean(0) - centre) ** 2).sum(-1).mean() / ((features - centre) ** 2).sum(-1).mean())


def _scores(samples: pd.DataFrame, config: Config) -> pd.DataFrame:
    """One row for each place, kind, part and question type, random draws averaged question by question."""
    rows = []
    for (place, kind, part), own in samples.groupby(["site", "kind", "part"], sort=False):
        named: dict[str, Any] = {"site": place, "kind": kind, "part": part, "draws": own["draw"].nunique()}
        rows += [named | row for row in change_by_type(own, seed=config.seed)]
    return pd.DataFrame(rows)


def summary(found: Mapping[str, Run]) -> pd.DataFrame:
    """One row per model, place and change for the mean of types, and one per type for the permutation at the tower."""
    table = changes(found)
    at_tower = (table["site"] == "encoder") & (table["kind"] == "permute")
    return table[(table["category"] == MEAN) | at_tower].drop(columns=["seed", "draws"])


def figures(found: Mapping[str, Run]) -> dict[str, go.Figure]:
    """The drop by layer, by question type at the tower for each part, and for every change at the tower."""
    table = drops(changes(found))
    mean, drop = table[table["category"] == MEAN], "drop in accuracy"
    curves = mean[mean["kind"].isin(["permute", "mean token"]) & (mean["part"] == "whole")]
    curves = curves.assign(layer=curves["site"].replace("encoder", "-1").astype(int))
    made = {"Drop by layer, mean of types": fig.layer_curves(curves, y=drop, kind="kind")}
    tower = table[table["site"] == "encoder"]
    for part in PARTS:
        own = tower[(tower["kind"] == "permute") & (tower["part"] == part)]
        if len(own):
            made[f"Drop by question type, permuted at the tower: {part}"] = fig.bars(own, x="category", y=drop)
    controls = tower[tower["category"] == MEAN]
    if len(controls):
        change = np.where(controls["part"] == "whole", controls["kind"], controls["kind"] + ", " + controls["part"])
        made["Drop at the tower by what is changed, mean of types"] = fig.bars(
            controls.assign(change=change), x="change", y=drop
        )
    return made


# 2: intervals that cover what they say
ANALYSIS = Analysis(
    "permutation",
    "What changes when visual tokens change places (permutation)",
    Config,
    run,
    figures,
    summary,
    version=3,
)

if __name__ == "__main__":
    main(ANALYSIS)
