"""Where the text reads the image: attention knockout in sliding windows of blocks, and ablation of the asked object.

    python -m analyses.knockout --model runs/baseline runs/viral --data shapes:val --limit 200 --output_dir runs

What the numbers are: accuracy before minus accuracy after the intervention, on the same questions, with an interval
over images; and KL(before || after) of the answer over the question's options, in nats.

    knockout  in the blocks of a window, text tokens cannot attend to the visual tokens; visual tokens still attend to
              one another. With all blocks knocked out the image has no influence on the answer.
    object    the vision encoder's features of the tokens on the objects that a question names are replaced by their
              mean over the run's images at the same position.
    random    the same for equally many other tokens of the image.
    object - random   compares the two question by question: here "accuracy before" is without the random tokens, and
              "accuracy after" without the object.

What they are not: a window without effect is not one in which nothing is read, because the same information may also
be read in other blocks. A small drop does not mean that the object was not needed, because neighboring tokens of a
transformer's vision encoder carry information about it too.

A question names an object if it has all words of the object's name; if it has all words of no name, one word is enough.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor

from workbench import figures as fig
from workbench.analysis.chunks import Chunk, Part, joined
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, Result
from workbench.benchmarks.asking import Asking, QuestionOptions, ask
from workbench.capture.edit import check_site
from workbench.capture.hidden_states import check_layers
from workbench.data.base import Object, Sample
from workbench.errors import ConfigError, DataError, ModelError
from workbench.mllm.family import Box, VisualTokens
from workbench.runs import Run
from workbench.scoring.questions import grids_of, survey
from workbench.scoring.quiz import Quiz
from workbench.scoring.tables import change_by_type, changes, drop_differences, drops
from workbench.training_folder import MEAN

log = logging.getLogger(__name__)

OBJECT, RANDOM, AGAINST = "object", "random", "object - random"  # kinds of ablation, as in the stored tables


@dataclass(frozen=True)
class Config(QuestionOptions):
    """Options of the knockout and of the object ablation."""

    layers: tuple[int, ...] = ()
    """First blocks of the windows, 1 to L; all by default."""
    width: tuple[int, ...] = (1, 3)
    """Blocks in a window; all blocks at once are always knocked out too."""
    objects: bool = True
    """Also ablate the objects that a question names; needs a data set with objects."""
    draws: Annotated[int, Ge(1)] = 2
    """Random choices of equally many other tokens, over which the `random` ablation is averaged."""


@dataclass(frozen=True)
class Ablation:
    """Questions about one image that name the same objects, and the tokens to ablate for them.

    Attributes:
        image: number of the image.
        tokens: its visual tokens on the objects.
        others: for each draw, equally many of its other tokens.
    """

    image: int
    questions: list[Sample]
    tokens: Int[Tensor, " token"]
    others: list[Int[Tensor, " _token"]]


def run(config: Config, context: Context) -> Result:
    """Ask every question before and after each knockout, and before and after each ablation of its objects."""
    asking = ask(config, context.mllm, context.data, types=config.types, each=config.questions)
    windows, too_long = _windows(config, context)
    ablations, mean, features, record = _ablations(config, context, asking)
    parts = context.map("knockout", asking.worded, partial(_knock_out, context, windows, features))
    parts += context.map(
        "object ablation",
        range(len(ablations)),
        partial(_ablate, config, context, ablations, mean, features),
        depends=context.data.fingerprint,
    )
    samples = joined(parts, "samples")
    record |= asking.record
    return Result({"scores": _scores(samples, config), "samples": samples}, {}, record, [*asking.left_out, *too_long])


def _knock_out(
    context: Context, windows: Sequence[tuple[int, int]], features: Sequence[Tensor], chunk: Chunk[list[Sample]]
) -> Part:
    """Ask the questions of a chunk before and after the knockout of each window of blocks."""
    tables = []
    for start, scenes in chunk.batches():
        quiz = Quiz(context.mllm, scenes, chunk.batch_size, features=features[start : start + len(scenes)] or None)
        before = quiz.logprobs()
        for first, last in windows:
            columns = {"site": f"blocks {first}-{last}", "kind": "knockout", "first": first, "last": last, "draw": 0}
            tables.append(quiz.scored(before, quiz.knocked_out(range(first, last + 1))).assign(**columns))
    return Part({"samples": pd.concat(tables, ignore_index=True)})


def _windows(config: Config, context: Context) -> tuple[list[tuple[int, int]], list[str]]:
    """Return the first and last block of each window, and which windows that were asked for end beyond the model.

    The last window has all blocks.

    Raises:
        ConfigError: a width that the model has not, or a layer, or no window of `layers` is within the model.
    """
    n_blocks = context.mllm.n_layers
    for width in config.width:
        if not 1 <= width <= n_blocks:
            raise ConfigError(f"width is {width}: expected 1 to {n_blocks}, the blocks of {context.mllm.name}")
    starts = check_layers(context.mllm, config.layers, first=1)
    windows = [(first, first + width - 1) for width in config.width for first in starts]
    within = [(first, last) for first, last in windows if last <= n_blocks]
    too_long = [
        f"blocks {first}-{last}: {context.mllm.name} has {n_blocks}" for first, last in windows if last > n_blocks
    ]
    if config.layers and not within:
        raise ConfigError(f"no window is left ({'; '.join(too_long)}): expected smaller layers, or a smaller width")
    return list(dict.fromkeys([*within, (1, n_blocks)])), too_long if config.layers else []


# --- objects --------------------------------------------------------------------------------------


def _ablations(
    config: Config, context: Context, asking: Asking
) -> tuple[list[Ablation], Float[Tensor, "token f"], list[Float[Tensor, "_token f"]], dict[str, Any]]:
    """Choose the tokens to ablate for each question that names an object.

    Returns:
        The ablations (none if the model's images cannot be compared position by position); the mean features that
        replace ablated tokens; the vision encoder's features of each image; and what was left out, for the record.

    Raises:
        DataError: no question names an object of the data set.
    """
    mllm, scenes = context.mllm, asking.scenes
    if not config.objects:
        return [], torch.empty(0, 0), [], {"skipped": {}}
    objects_of = [{sample.id: asked_objects(sample) for sample in scene} for scene in scenes]
    if not any(objects for of_scene in objects_of for objects in of_scene.values()):
        raise DataError(
            f"no question of {context.data.name} names an object of its image: expected a data set with objects, or"
            " --no-objects"
        )
    try:
        check_site(mllm, "encoder")
        parts = context.map("images of the questions", scenes, partial(_survey, context), keep=False)
        if why := next((part.record["why"] for part in parts if part.record["why"]), ""):
            raise ModelError(why)
        if len({str(grids) for part in parts for grids in part.record["grids"]}) > 1:
            raise ModelError("images have different patch grids, so a token has no common position to average over")
    except ModelError as error:
        log.warning("%s: objects are left out: %s", mllm.name, error)
        return [], torch.empty(0, 0), [], {"skipped": {"objects": str(error)}}
    features = [values for part in parts for values in part.tensors["features"].split(part.record["tokens"])]
    touched = [by_question for part in parts for by_question in part.record["covered"]]
    ablations, left_out = [], 0
    for image, scene in enumerate(scenes):
        questions_by_tokens: dict[tuple[int, ...], list[Sample]] = {}
        for sample, worded, touched_by_objects in zip(scene, asking.worded[image], touched[image], strict=True):
            if objects_of[image][sample.id]:
                questions_by_tokens.setdefault(tuple(touched_by_objects), []).append(worded)
        for tokens, questions in questions_by_tokens.items():
            others = np.setdiff1d(np.arange(len(features[image])), tokens)
            if not tokens or len(others) < len(tokens):
                left_out += len(questions)
                continue
            generator = np.random.default_rng([config.seed, image, *tokens])
            draws = [generator.choice(others, size=len(tokens), replace=False) for _ in range(config.draws)]
            ablations.append(Ablation(image, questions, torch.tensor(tokens), [torch.from_numpy(d) for d in draws]))
    record = {"skipped": {}, "questions_without_as_many_other_tokens": left_out}
    return ablations, torch.stack(features).mean(0), features, record


def _survey(context: Context, chunk: Chunk[list[Sample]]) -> Part:
    """Read the vision encoder's features of a chunk's images, their grids, and the tokens on each question's objects.

    If the features cannot be read, the part has only the reason, `why`.
    """
    grids, features, touched, why = [], list[Tensor](), [], ""
    for _, scenes in chunk.batches():
        try:
            visual_tokens, encoder_features = survey(context.mllm, scenes, chunk.batch_size, encoder=True)
        except ModelError as error:
            return Part(record={"why": str(error)})
        grids += [grids_of(parts) for parts in visual_tokens]
        features += encoder_features
        touched += [
            [touched_tokens(parts, asked_objects(sample)) for sample in scene]
            for parts, scene in zip(visual_tokens, scenes, strict=True)
        ]
    record = {"grids": grids, "tokens": [len(values) for values in features], "covered": touched, "why": why}
    return Part(tensors={"features": torch.cat(features)}, record=record)


def asked_objects(sample: Sample) -> list[Object]:
    """Return the objects whose whole name is in the question or, if there are none, those with a word in it."""
    words = set(re.findall(r"\w+", sample.question.lower()))
    names = [set(re.findall(r"\w+", item.name.lower())) for item in sample.objects]
    whole = [item for item, name in zip(sample.objects, names, strict=True) if name <= words]
    return whole or [item for item, name in zip(sample.objects, names, strict=True) if name & words]


def touched_tokens(parts: Sequence[VisualTokens], objects: Iterable[Object]) -> list[int]:
    """Return the numbers of an image's visual tokens whose patch an object touches.

    An object is its mask or, without one, its box.

    Args:
        parts: the image's visual tokens, one part for each tile.
    """
    numbers, first, objects = [], 0, list(objects)
    for part in parts:
        assert part.grid is not None
        for number in range(len(part.index)):
            patch = part.token_box(*divmod(number, part.grid[1]))
            if any(_touches(patch, item) for item in objects):
                numbers.append(first + number)
        first += len(part.index)
    return numbers


def _touches(patch: Box, item: Object) -> bool:
    """Return whether an object has a pixel of its mask, or else a part of its box, in the patch."""
    left, top, right, bottom = patch
    if item.mask is None:
        return left < item.box[2] and item.box[0] < right and top < item.box[3] and item.box[1] < bottom
    height, width = item.mask.shape
    rows, columns = (
        # rounded first, since an edge between two pixels may be off by a rounding error
        slice(max(0, math.floor(round(low * pixels, 6))), max(0, math.ceil(round(high * pixels, 6))))
        for low, high, pixels in ((top, bottom, height), (left, right, width))
    )
    return bool(item.mask[rows, columns].any())


def _ablate(
    config: Config,
    context: Context,
    ablations: list[Ablation],
    mean: Float[Tensor, "token f"],
    features: list[Float[Tensor, "_token f"]],
    chunk: Chunk[int],
) -> Part:
    """Ask questions before and after ablating their objects, and before and after ablating equally many other tokens.

    Args:
        mean: features that replace those of ablated tokens.
        features: the vision encoder's features of each image.
        chunk: numbers of `ablations`.
    """
    tables = []
    for _, numbers in chunk.batches():
        batch = [ablations[number] for number in numbers]
        quiz = Quiz(
            context.mllm,
            [ablation.questions for ablation in batch],
            chunk.batch_size,
            features=[features[ablation.image] for ablation in batch],
        )
        before = quiz.logprobs()
        ablated = [(OBJECT, 0, [ablation.tokens for ablation in batch])]
        ablated += [(RANDOM, draw, [ablation.others[draw] for ablation in batch]) for draw in range(config.draws)]
        for kind, draw, tokens in ablated:
            after = quiz.logprobs("encoder", partial(_replace_by_mean, tokens=tokens, mean=mean))
            tables.append(quiz.scored(before, after).assign(site="encoder", kind=kind, first=0, last=0, draw=draw))
    return Part({"samples": pd.concat(tables, ignore_index=True)})


def _replace_by_mean(
    values: Float[Tensor, "token f"],
    group: int,
    *,
    tokens: list[Int[Tensor, " _token"]],
    mean: Float[Tensor, "token f"],
) -> Float[Tensor, "token f"]:
    """Replace the features of the tokens in `tokens[group]` by the mean at their positions, in place."""
    values[tokens[group]] = mean[tokens[group]].to(values)
    return values


# --- tables and figures ---------------------------------------------------------------------------


def _scores(samples: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Return one row for each site, kind and question type; random draws are averaged question by question."""
    rows = []
    for (site, kind, first, last), of_site in samples.groupby(["site", "kind", "first", "last"], sort=False):
        columns: dict[str, Any] = {
            "site": site,
            "kind": kind,
            "first": first,
            "last": last,
            "draws": of_site["draw"].nunique(),
        }
        rows += [columns | row for row in change_by_type(of_site, seed=config.seed)]
    objects, random = (samples[samples["kind"] == kind] for kind in (OBJECT, RANDOM))
    if len(objects):
        mean = random.groupby("id")[["correct_after", "kl"]].mean().loc[objects["id"]]
        both = objects.assign(
            correct_before=mean["correct_after"].to_numpy(), kl=objects["kl"].to_numpy() - mean["kl"].to_numpy()
        )
        columns = {"site": "encoder", "kind": AGAINST, "first": 0, "last": 0, "draws": config.draws}
        rows += [columns | row for row in change_by_type(both, seed=config.seed)]
    return pd.DataFrame(rows)


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return one row for each model and window (mean of types), and for each model, ablation and question type.

    Rows `object - random` compare the accuracy without random tokens (before) with that without the object (after).
    """
    table = changes(runs)
    return table[(table["category"] == MEAN) | (table["site"] == "encoder")].drop(
        columns=["first", "last", "seed", "draws"]
    )


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Subtract the drop of the first model from that of every other; p_holm corrects over all windows."""
    return drop_differences(runs, lambda samples: samples["kind"] == "knockout", by=("first", "last"))


def _widths(windows: pd.DataFrame) -> pd.Series:
    """Return how many blocks each window has, in words."""
    return (windows["last"] - windows["first"] + 1).map(lambda n: f"{n} block{'s' * (n > 1)}")


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw the accuracy drop by window, its paired difference, and the drop by type without the asked object."""
    table = drops(changes(runs))
    windows = table[(table["kind"] == "knockout") & (table["category"] == MEAN)]
    windows = windows.assign(layer=windows["first"], width=_widths(windows))
    figure = fig.layer_curves(windows, y="accuracy drop", kind="width")
    figure.update_xaxes(title="first block of the window")
    drawn = {"Accuracy drop by window of blocks in which no text attends to the image, mean of types": figure}
    changed = differences(runs)
    if len(changed):
        changed = changed.assign(layer=changed["first"], width=_widths(changed))
        figure = fig.difference_curves(changed, y=f"accuracy drop, minus {changed['against'].iloc[0]}", kind="width")
        figure.update_xaxes(title="first block of the window")
        drawn["Accuracy drop by window of blocks: difference, mean of types"] = figure
    objects = table[table["kind"].isin([OBJECT, RANDOM])]
    if len(objects):
        objects = objects.assign(ablated=objects["model"] + " · " + objects["kind"])
        drawn["Accuracy drop by question type without the asked object, and without random tokens"] = fig.bars(
            objects, x="category", y="accuracy drop", by="ablated"
        )
        against = table[table["kind"] == AGAINST]
        drawn["How much more the asked object matters than equally many random tokens"] = fig.bars(
            against, x="category", y="accuracy without random tokens - without object"
        )
    return drawn


def uses(config: Config) -> dict[str, str]:
    """Return the version of the ablation's tables, so that runs without objects keep their keys."""
    return {"object ablation": "2, intervals of negative differences in KL"} if config.objects else {}


# versions: 2 intervals with their stated coverage; 3 the site of an ablation is "encoder"; 4 all tokens of an option
ANALYSIS = Analysis(
    "knockout",
    "Where the text reads the image (attention knockout, object ablation)",
    Config,
    run,
    figures,
    summary,
    version=4,
    uses=uses,
)

if __name__ == "__main__":
    main(ANALYSIS)
