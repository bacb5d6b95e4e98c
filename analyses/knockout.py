"""Where the text reads the image: attention knockout in sliding windows of blocks, and ablation of the asked object.

    python -m analyses.knockout --model runs/baseline runs/viral --data shapes:val --limit 200 --output_dir runs

What the numbers are: accuracy before minus accuracy after, on the same questions, with an interval over images, and
KL(before || after) of the answer over the question's options, in nats.

    knockout  in the blocks of a window no text looks at the visual tokens, which still look at one another. A window
              that changes nothing is not one that reads nothing: what it reads can also be read elsewhere. In all
              blocks at once the image has no influence left.
    object    the tower's features of the tokens that cover the objects a question names are replaced by their mean over
              the images of the run at the same place; `random` does so with as many other tokens of the image. `object
              - random` compares both question by question: there, accuracy before is without the random tokens,
              accuracy after without the object. Neighbouring tokens of a transformer's tower know of the object too, so
              a small drop does not mean that the object was not needed.

A question names an object by all words of its name, or, where none is named so, by some of them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
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
from workbench.capture.edit import check_site
from workbench.capture.hidden_states import check_layers
from workbench.data.base import Object, Sample
from workbench.errors import ConfigError, DataError, ModelError
from workbench.mllm.family import Box, VisualTokens
from workbench.runs import Run
from workbench.scoring.questions import grids_of, questions_of, survey
from workbench.scoring.quiz import Quiz
from workbench.scoring.tables import change_by_type, changes, drops
from workbench.training_folder import MEAN

log = logging.getLogger(__name__)

OBJECT, RANDOM, AGAINST = "object", "random", "object - random"


@dataclass(frozen=True)
class Config(DataOptions):
    """What is asked, and what is taken away."""

    layers: tuple[int, ...] = ()
    """First blocks of the windows, 1 to L; all by default."""
    width: tuple[int, ...] = (1, 3)
    """Blocks in a window; all blocks at once are always tried."""
    objects: bool = True
    """Also take away the objects that a question names; needs a data set that knows them."""
    draws: int = 2
    """Random choices of as many other tokens, whose results are averaged."""
    types: tuple[str, ...] = ()
    """Question types; all by default."""
    questions: int = 1
    """Questions of each type about an image, 0 for all."""

    def __post_init__(self) -> None:
        for name, least in (("questions", 0), ("draws", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least {least}")


@dataclass(frozen=True)
class Asked:
    """Questions about one image that name the same objects.

    Attributes:
        image: number of the image.
        tokens: its visual tokens that cover the objects.
        others: for each draw, as many of its other tokens.
    """

    image: int
    questions: list[Sample]
    tokens: Int[Tensor, " token"]
    others: list[Int[Tensor, " token"]]


def run(config: Config, context: Context) -> Result:
    """Ask every question with and without what is taken away."""
    scenes = questions_of(context.data.scenes, types=config.types, each=config.questions)
    windows = _windows(config, context)
    asked, mean, features, record = _objects(config, context, scenes)
    parts = context.map("knockout", scenes, partial(_knocked_out, context, windows, features))
    parts += context.map(
        "object ablation",
        range(len(asked)),
        partial(_ablated, config, context, asked, mean, features),
        depends=context.data.fingerprint,
    )
    samples = joined(parts, "samples")
    return Result({"scores": _scores(samples, config), "samples": samples}, record=record)


def _knocked_out(
    context: Context, windows: Sequence[tuple[int, int]], features: Sequence[Tensor], chunk: Chunk[list[Sample]]
) -> Part:
    """The questions of a chunk before and after the knockout of each window of blocks."""
    tables = []
    for start, scenes in chunk.batches():
        quiz = Quiz(context.mllm, scenes, chunk.batch_size, features=features[start : start + len(scenes)] or None)
        before = quiz.logprobs()
        for first, last in windows:
            named = {"site": f"blocks {first}-{last}", "kind": "knockout", "first": first, "last": last, "draw": 0}
            tables.append(quiz.scored(before, quiz.knocked_out(range(first, last + 1))).assign(**named))
    return Part({"samples": pd.concat(tables, ignore_index=True)})


def _windows(config: Config, context: Context) -> list[tuple[int, int]]:
    """First and last block of each window, all blocks at the end."""
    count = context.mllm.n_layers
    for width in config.width:
        if not 1 <= width <= count:
            raise ConfigError(f"width is {width}: expected 1 to {count}, the blocks of {context.mllm.name}")
    firsts = check_layers(context.mllm, config.layers, first=1)
    windows = [(first, first + width - 1) for width in config.width for first in firsts if first + width - 1 <= count]
    return list(dict.fromkeys([*windows, (1, count)]))


# --- objects --------------------------------------------------------------------------------------


def _objects(
    config: Config, context: Context, scenes: list[list[Sample]]
) -> tuple[list[Asked], Float[Tensor, "token f"], list[Float[Tensor, "token f"]], dict[str, Any]]:
    """What is taken away for which questions, what replaces it, the tower's features, and what was left out and why."""
    mllm = context.mllm
    if not config.objects:
        return [], torch.empty(0, 0), [], {"skipped": {}}
    named = [{s.id: asked_objects(s) for s in scene} for scene in scenes]
    if not any(objects for own in named for objects in own.values()):
        raise DataError(
            f"no question of {context.data.name} names an object that the data set knows: expected objects, or"
            " --no-objects"
        )
    try:
        check_site(mllm, "encoder")
        surveyed = context.map("images of the questions", scenes, partial(_surveyed, context), keep=False)
        if why := next((part.record["why"] for part in surveyed if part.record["why"]), ""):
            raise ModelError(why)
        if len({str(grids) for part in surveyed for grids in part.record["grids"]}) > 1:
            raise ModelError("images have different rasters, so a place is not the same place in all of them")
    except ModelError as error:
        log.warning("%s: objects are left out: %s", mllm.name, error)
        return [], torch.empty(0, 0), [], {"skipped": {"objects": str(error)}}
    features = [own for part in surveyed for own in part.tensors["features"].split(part.record["tokens"])]
    covered = [tokens for part in surveyed for tokens in part.record["covered"]]
    found, left_out = [], 0
    for image, scene in enumerate(scenes):
        groups: dict[tuple[int, ...], list[Sample]] = {}
        for sample, tokens_of in zip(scene, covered[image], strict=True):
            if named[image][sample.id]:
                groups.setdefault(tuple(tokens_of), []).append(sample)
        for tokens, questions in groups.items():
            others = np.setdiff1d(np.arange(len(features[image])), tokens)
            if not tokens or len(others) < len(tokens):
                left_out += len(questions)
                continue
            generator = np.random.default_rng([config.seed, image, *tokens])
            drawn = [
                torch.from_numpy(generator.choice(others, size=len(tokens), replace=False)) for _ in range(config.draws)
            ]
            found.append(Asked(image, questions, torch.tensor(tokens), drawn))
    return (
        found,
        torch.stack(features).mean(0),
        features,
        {"skipped": {}, "questions_without_as_many_other_tokens": left_out},
    )


def _surveyed(context: Context, chunk: Chunk[list[Sample]]) -> Part:
    """Grids of the images of a chunk, what the connector receives for them, and the visual tokens that cover the
    objects of each question; or why not."""
    grids, features, covered, why = [], list[Tensor](), [], ""
    for _, scenes in chunk.batches():
        try:
            rasters, read = survey(context.mllm, scenes, chunk.batch_size, encoder=True)
        except ModelError as error:
            return Part(record={"why": str(error)})
        grids += [grids_of(parts) for parts in rasters]
        features += read
        covered += [
            [covering(parts, asked_objects(sample)) for sample in scene]
            for parts, scene in zip(rasters, scenes, strict=True)
        ]
    record = {"grids": grids, "tokens": [len(own) for own in features], "covered": covered, "why": why}
    return Part(tensors={"features": torch.cat(features)}, record=record)


def asked_objects(sample: Sample) -> list[Object]:
    """The objects that a question names: by their whole name, or, if it names none so, by a word of it."""
    words = set(re.findall(r"\w+", sample.question.lower()))
    names = [set(re.findall(r"\w+", item.name.lower())) for item in sample.objects]
    whole = [item for item, name in zip(sample.objects, names, strict=True) if name <= words]
    return whole or [item for item, name in zip(sample.objects, names, strict=True) if name & words]


def covering(rasters: Sequence[VisualTokens], objects: Iterable[Object]) -> list[int]:
    """Numbers of an image's visual tokens whose cell an object touches, by its mask or, without one, its box."""
    found, start, objects = [], 0, list(objects)
    for part in rasters:
        assert part.grid is not None
        for number in range(len(part.index)):
            cell = part.token_box(*divmod(number, part.grid[1]))
            if any(_touches(cell, item) for item in objects):
                found.append(start + number)
        start += len(part.index)
    return found


def _touches(cell: Box, item: Object) -> bool:
    left, top, right, bottom = cell
    if item.mask is None:
        return left < item.box[2] and item.box[0] < right and top < item.box[3] and item.box[1] < bottom
    height, width = item.mask.shape
    rows = slice(max(0, round(top * height)), max(0, math.ceil(round(bottom * height, 6))))
    columns = slice(max(0, round(left * width)), max(0, math.ceil(round(right * width, 6))))
    return bool(item.mask[rows, columns].any())


def _ablated(
    config: Config,
    context: Context,
    asked: list[Asked],
    mean: Float[Tensor, "token f"],
    features: list[Float[Tensor, "token f"]],
    chunk: Chunk[int],
) -> Part:
    """Scores of some questions without their objects, and without as many other tokens; the items of the chunk are
    numbers of `asked`."""
    tables = []
    for _, numbers in chunk.batches():
        part = [asked[number] for number in numbers]
        quiz = Quiz(
            context.mllm,
            [one.questions for one in part],
            chunk.batch_size,
            features=[features[one.image] for one in part],
        )
        before = quiz.logprobs()
        taken = [(OBJECT, 0, [one.tokens for one in part])]
        taken += [(RANDOM, draw, [one.others[draw] for one in part]) for draw in range(config.draws)]
        for kind, draw, tokens in taken:
            after = quiz.logprobs("encoder", partial(_without, tokens=tokens, mean=mean))
            tables.append(quiz.scored(before, after).assign(site="encoder", kind=kind, first=0, last=0, draw=draw))
    return Part({"samples": pd.concat(tables, ignore_index=True)})


def _without(
    values: Float[Tensor, "token f"], group: int, *, tokens: list[Int[Tensor, " token"]], mean: Float[Tensor, "token f"]
) -> Float[Tensor, "token f"]:
    """The features with the tokens of a group replaced by the mean at their places."""
    values[tokens[group]] = mean[tokens[group]].to(values)
    return values


# --- tables and figures ---------------------------------------------------------------------------


def _scores(samples: pd.DataFrame, config: Config) -> pd.DataFrame:
    """One row for each place, kind and question type, random draws averaged question by question."""
    rows = []
    for (place, kind, first, last), own in samples.groupby(["site", "kind", "first", "last"], sort=False):
        named: dict[str, Any] = {
            "site": place,
            "kind": kind,
            "first": first,
            "last": last,
            "draws": own["draw"].nunique(),
        }
        rows += [named | row for row in change_by_type(own, seed=config.seed)]
    objects, random = (samples[samples["kind"] == kind] for kind in (OBJECT, RANDOM))
    if len(objects):
        mean = random.groupby("id")[["correct_after", "kl"]].mean().loc[objects["id"]]
        both = objects.assign(
            correct_before=mean["correct_after"].to_numpy(), kl=objects["kl"].to_numpy() - mean["kl"].to_numpy()
        )
        named = {"site": "encoder", "kind": AGAINST, "first": 0, "last": 0, "draws": config.draws}
        rows += [named | row for row in change_by_type(both, seed=config.seed)]
    return pd.DataFrame(rows)


def summary(found: Mapping[str, Run]) -> pd.DataFrame:
    """One row per model and window for the mean of types, and one per type for the objects; `object - random` is after
    random against after object."""
    table = changes(found)
    return table[(table["category"] == MEAN) | (table["site"] == "encoder")].drop(
        columns=["first", "last", "seed", "draws"]
    )


def figures(found: Mapping[str, Run]) -> dict[str, go.Figure]:
    """The drop by window, and by question type without the asked object and without as many other tokens."""
    table = drops(changes(found))
    windows = table[(table["kind"] == "knockout") & (table["category"] == MEAN)]
    windows = windows.assign(
        layer=windows["first"], width=(windows["last"] - windows["first"] + 1).map("{} blocks".format)
    )
    figure = fig.layer_curves(windows, y="drop in accuracy", kind="width")
    figure.update_xaxes(title="first block of the window")
    made = {"Drop by window of blocks in which no text looks at the image, mean of types": figure}
    objects = table[table["kind"].isin([OBJECT, RANDOM])]
    if len(objects):
        objects = objects.assign(taken=objects["model"] + " · " + objects["kind"])
        made["Drop by question type without the asked object, and without as many other tokens"] = fig.bars(
            objects, x="category", y="drop in accuracy", by="taken"
        )
        against = table[table["kind"] == AGAINST]
        made["How much more the asked object matters than as many other tokens"] = fig.bars(
            against, x="category", y="accuracy without random - without object"
        )
    return made


# 2: intervals that cover what they say
ANALYSIS = Analysis(
    "knockout",
    "Where the text reads the image (attention knockout, object ablation)",
    Config,
    run,
    figures,
    summary,
    version=3,
)

if __name__ == "__main__":
    main(ANALYSIS)
