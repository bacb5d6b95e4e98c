"""Permute visual tokens, before the projector and inside every layer, and score the answers again (docs/paper.md, A5).

    python -m analyses.permutation --model runs/baseline runs/viral --data shapes:val --limit 200 --output_dir runs

The number is the accuracy drop: accuracy before minus accuracy after, on the same questions, with an interval over
images. Beside it is KL(before || after) of the answer over the question's options, in nats. Each image has a
permutation of its own, drawn `permutations` times; the mean over these draws counts. The paper's Table 3 counts right
answers instead, of generated answers to benchmarks; the table `counts` has them, with the drop in % of those before.

    python -m analyses.permutation --model A B --data cv_bench:PATH --types Count Relation --questions 0 --limit 5000
    --answers generated --scorer paper --prompt paper --permutations 1 --layers 0

What the number is not: a measure of how well a model knows where things are. At the vision encoder, features that carry
their position take it along when they are permuted, which hides the effect. So there are three permutations (`part`):

    whole      features with their positions: the rows of the projector's input are permuted, as in the paper
    features   features alone: the positional part of each place stays, the rest of each feature moves
    positions  positions alone: the positional part moves, the rest of each feature stays

The positional part of a place is the mean of the encoder's features there over the images of the run, so it is
estimated on `n_images` images; what depends on place *and* content together counts as content. A drop of 0 deep in the
model may mean that order does not matter there, or that nothing is read there any more. Compare it with `mean token` at
the same layer, where every visual token of an image is replaced by their mean.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

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
from workbench.capture.edit import Site, check_site
from workbench.capture.hidden_states import check_layers
from workbench.data.base import Sample
from workbench.errors import ConfigError, DataError, ModelError
from workbench.mllm import MLLM
from workbench.runs import Run
from workbench.scoring.questions import Grid, grids_of, random_order, survey
from workbench.scoring.quiz import Change, Quiz
from workbench.scoring.tables import change_by_type, changes, counts_by_type, drop_differences, drops
from workbench.training_folder import MEAN

log = logging.getLogger(__name__)

PARTS = ("whole", "features", "positions")
Order = Callable[[int], Tensor]
"""Number of an image -> for each place, the index of the token that moves there."""


@dataclass(frozen=True)
class Config(QuestionOptions):
    """Which questions are asked, and how tokens are permuted."""

    ADDED: ClassVar[tuple[str, ...]] = (*QuestionOptions.ADDED, "answers", "scorer", "max_new_tokens")

    layers: tuple[int, ...] = ()
    """Layers at which tokens are permuted, 0 to L; all by default. The vision encoder is always among the sites."""
    permutations: Annotated[int, Ge(1)] = 2
    """Random permutations of each image, whose results are averaged."""
    block: Annotated[int, Ge(1)] = 2
    """Side of the blocks that the block shuffle keeps together, in tokens."""
    answers: Literal["likelihood", "generated"] = "likelihood"
    """An answer is the likeliest option, or what the model generates (greedy), as in the paper."""
    scorer: str = "own"
    """Scorer of generated answers; see docs/reference/benchmarks.md."""
    max_new_tokens: Annotated[int, Ge(1)] = 16
    """Tokens at which a generated answer is cut."""


@dataclass(frozen=True)
class Condition:
    """One intervention at one site; `draw` counts the random ones."""

    site: Site
    kind: str
    part: str
    draw: int
    change: Change


@dataclass(frozen=True)
class Images:
    """What interventions need to know about the images of the run.

    Attributes:
        grids: (rows, columns) of every patch grid of each image.
        features: what the projector receives for each image; empty if the vision encoder is not among the sites.
    """

    config: Config
    grids: list[tuple[Grid, ...]]
    features: list[Float[Tensor, "_token f"]]

    @property
    def alike(self) -> bool:
        """Whether all images have the same patch grids, so that a place means the same in each of them."""
        return len(set(self.grids)) == 1

    def permuted(self, image: int, draw: int) -> Int[Tensor, " token"]:
        """Return a random order of all visual tokens of an image, the same at every site and for every part."""
        count = sum(rows * columns for rows, columns in self.grids[image])
        return random_order(count, image=image, draw=draw, seed=self.config.seed)

    def shuffled_blocks(self, image: int, draw: int) -> Int[Tensor, " token"]:
        """Return a random order of the blocks of each patch grid; within a block nothing moves.

        Raises:
            ConfigError: a patch grid that cannot be divided into such blocks.
        """
        rng, side = np.random.default_rng([self.config.seed, draw, image]), self.config.block

        def order(rows: int, columns: int) -> np.ndarray:
            if rows % side or columns % side:
                raise ConfigError(
                    f"block is {side} for a patch grid of {rows} x {columns} tokens: expected a divisor of both"
                )
            tokens = np.arange(rows * columns).reshape(rows // side, side, columns // side, side)
            blocks = tokens.transpose(0, 2, 1, 3).reshape(-1, side, side)
            shuffled = rng.permutation(blocks).reshape(rows // side, columns // side, side, side)
            return shuffled.transpose(0, 2, 1, 3)

        return _joined([order(*grid) for grid in self.grids[image]])

    def transposed(self, image: int) -> Int[Tensor, " token"]:
        """Return the order that exchanges the rows and columns of square patch grids."""
        return _joined([np.arange(rows * columns).reshape(rows, columns).T for rows, columns in self.grids[image]])


def _joined(orders: list[np.ndarray]) -> Int[Tensor, " token"]:
    """Join an order within each patch grid of an image to one order of all its tokens."""
    starts = np.cumsum([0, *(order.size for order in orders)])
    return torch.from_numpy(
        np.concatenate([order.reshape(-1) + start for order, start in zip(orders, starts, strict=False)])
    )


def run(config: Config, context: Context) -> Result:
    """Ask every question before and after every intervention."""
    mllm = context.mllm
    asking = _asking(config, context)
    scenes = asking.worded
    sites, skipped = _sites(mllm, check_layers(mllm, config.layers))
    images = _images(config, context, scenes, sites, skipped)
    conditions = list(_conditions(images, sites, skipped))
    for name, reason in skipped.items():
        log.warning("%s: %s is left out: %s", mllm.name, name, reason)
    parts = context.map(
        "permuted questions",
        scenes,
        partial(_ask_chunk, config, context, asking, images, conditions),
        depends=(context.data.fingerprint, asking.benchmark),
    )
    samples = joined(parts, "samples")
    tables = {"scores": _scores(samples, config), "counts": _counts(samples, config), "samples": samples}
    record = {"skipped": skipped, "positional_share": _positional_share(images)} | asking.record
    return Result(tables, {}, record, asking.left_out)


def _ask_chunk(
    config: Config,
    context: Context,
    asking: Asking,
    images: Images,
    conditions: Sequence[Condition],
    chunk: Chunk[list[Sample]],
) -> Part:
    """Ask the questions of a chunk before and after every intervention."""
    tables = []
    for first, scenes in chunk.batches():
        features = images.features[first : first + len(scenes)] or None
        quiz = Quiz(context.mllm, scenes, chunk.batch_size, features=features, first=first)
        before, texts = quiz.logprobs(), _generated(config, quiz, None)
        for condition in conditions:
            scored = quiz.scored(before, quiz.logprobs(condition.site, condition.change))
            if texts:
                scored["answer_before"], scored["answer_after"] = texts, _generated(config, quiz, condition)
                for moment in ("before", "after"):
                    scored[f"correct_{moment}"] = [
                        asking.is_right(name, answer, config.scorer)
                        for name, answer in zip(scored["id"], scored[f"answer_{moment}"], strict=True)
                    ]
            tables.append(
                scored.assign(site=str(condition.site), kind=condition.kind, part=condition.part, draw=condition.draw)
            )
    return Part({"samples": pd.concat(tables, ignore_index=True)})


def _generated(config: Config, quiz: Quiz, condition: Condition | None) -> list[str]:
    """Return generated answers, if they are asked for."""
    if config.answers == "likelihood":
        return []
    at, change = (condition.site, condition.change) if condition else (None, None)
    return quiz.answers(at, change, max_new_tokens=config.max_new_tokens)


def _asking(config: Config, context: Context) -> Asking:
    """Return the questions to ask.

    Raises:
        DataError: fewer than two images have questions.
        UnknownNameError: the benchmark has no such scorer.
    """
    generated = config.answers == "generated"
    asking = ask(config, context.mllm, context.data, types=config.types, each=config.questions, generated=generated)
    if len(asking.scenes) < 2:
        raise DataError(
            f"{len(asking.scenes)} image with questions: expected at least 2, since tokens of another image are a"
            " control"
        )
    if generated:
        asking.check_scorer(config.scorer)
    return asking


def _sites(mllm: MLLM, layers: list[int]) -> tuple[list[Site], dict[str, str]]:
    """Return the sites at which tokens can be changed, and why the others cannot be used.

    Raises:
        ModelError: none of them can.
    """
    sites: list[Site] = []
    skipped = {}
    wanted: list[Site] = ["encoder", *layers]
    for site in wanted:
        try:
            sites.append(check_site(mllm, site))
        except ModelError as error:
            skipped[f"site {site}"] = str(error)
    if not sites:
        raise ModelError(
            f"{mllm.name}: visual tokens can be changed neither at the encoder nor in the layers"
            f" ({next(iter(skipped.values()))})"
        )
    return sites, skipped


def _images(
    config: Config, context: Context, scenes: list[list[Sample]], sites: list[Site], skipped: dict[str, str]
) -> Images:
    """Read the patch grids of all images and, for the site `encoder`, what the projector receives for them.

    Where that cannot be read token by token, `encoder` is moved from `sites` to `skipped`.
    """
    parts = context.map(
        "images of the questions", scenes, partial(_read_chunk, context, "encoder" in sites), keep=False
    )
    reason = next((part.record["why"] for part in parts if part.record["why"]), "")
    if reason:
        sites.remove("encoder")
        skipped["site encoder"] = reason
    grids = [tuple((rows, columns) for rows, columns in grids) for part in parts for grids in part.record["grids"]]
    features: list[Tensor] = []
    if "encoder" in sites:
        for part in parts:
            features += part.tensors["features"].split(part.record["tokens"])
    return Images(config, grids, features)


def _read_chunk(context: Context, encoder: bool, chunk: Chunk[list[Sample]]) -> Part:
    """Read the patch grids of a chunk and, if `encoder`, the projector's input, or why that cannot be read."""
    grids: list[tuple[Grid, ...]] = []
    features: list[Tensor] = []
    reason = ""
    for _, scenes in chunk.batches():
        try:
            visual_tokens, batch_features = survey(
                context.mllm, scenes, chunk.batch_size, encoder=encoder and not reason
            )
        except ModelError as error:
            if not encoder:
                raise
            reason = str(error)
            visual_tokens, batch_features = survey(context.mllm, scenes, chunk.batch_size, encoder=False)
        grids += [grids_of(of_image) for of_image in visual_tokens]
        features += batch_features
    tensors = {"features": torch.cat(features)} if features and not reason else {}
    return Part(tensors=tensors, record={"grids": grids, "tokens": [len(f) for f in features], "why": reason})


def _conditions(images: Images, sites: list[Site], skipped: dict[str, str]) -> Iterator[Condition]:
    """Yield all interventions; those that the images' patch grids do not allow are noted in `skipped`."""
    if "encoder" in sites:
        yield from _encoder_conditions(images, skipped)
    for site in sites:
        for draw in range(images.config.permutations):
            order = partial(images.permuted, draw=draw)
            yield Condition(site, "permute", "whole", draw, partial(_reordered, order=order))
        yield Condition(site, "mean token", "whole", 0, lambda v, _: v.mean(0, keepdim=True).expand_as(v))


def _encoder_conditions(images: Images, skipped: dict[str, str]) -> Iterator[Condition]:
    """Yield the interventions at the encoder alone: the controls, and features and positions permuted apart."""
    draws = range(images.config.permutations)
    yield Condition("encoder", "identity", "whole", 0, lambda v, _: v)
    for draw in draws:
        block_order = partial(images.shuffled_blocks, draw=draw)
        yield Condition("encoder", "block shuffle", "whole", draw, partial(_reordered, order=block_order))
    if all(rows == columns for grids in images.grids for rows, columns in grids):
        yield Condition("encoder", "transpose", "whole", 0, partial(_reordered, order=images.transposed))
    else:
        skipped["transpose"] = "a patch grid is not square"
    if not images.alike:
        reason = "images have different patch grids, so that a place does not mean the same in all of them"
        skipped["other image"] = skipped["parts features, positions"] = reason
        return
    others = _other_images(len(images.grids), images.config.seed)
    yield Condition("encoder", "other image", "whole", 0, lambda _, i: images.features[others[i]])
    mean = torch.stack(images.features).mean(0)
    for draw in draws:
        for part in ("features", "positions"):
            change = partial(
                _permuted_part, mean=mean, order=partial(images.permuted, draw=draw), features=part == "features"
            )
            yield Condition("encoder", "permute", part, draw, change)


def _reordered(values: Float[Tensor, "token d"], image: int, *, order: Order) -> Float[Tensor, "token d"]:
    return values[order(image)]


def _permuted_part(
    values: Float[Tensor, "token f"], image: int, *, mean: Float[Tensor, "token f"], order: Order, features: bool
) -> Float[Tensor, "token f"]:
    return permute_part(values, mean, order(image), features=features)


def permute_part(
    values: Float[Tensor, "token f"], mean: Float[Tensor, "token f"], order: Int[Tensor, " token"], *, features: bool
) -> Float[Tensor, "token f"]:
    """Permute either the features without their positional part `mean`, or that part alone."""
    mean = mean.to(values.device)
    rest = values.float() - mean
    return mean + rest[order] if features else mean[order] + rest


def _other_images(count: int, seed: int) -> list[int]:
    """Return another image for each image: the one before it in a random circle of them all."""
    circle = np.random.default_rng([seed, count]).permutation(count)
    others = np.empty(count, dtype=int)
    others[circle] = np.roll(circle, 1)
    return [int(other) for other in others]


def _positional_share(images: Images) -> float | None:
    """Return the share of the variance of the encoder's features that their mean at each place has.

    With n images, 1/n of the remaining variance is in it by chance. None without features, or if patch grids differ.
    """
    if not images.features or not images.alike:
        return None
    features = torch.stack(images.features).double()
    center = features.mean((0, 1))
    return float(((features.mean(0) - center) ** 2).sum(-1).mean() / ((features - center) ** 2).sum(-1).mean())


def _scores(samples: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Return one row for each site, kind, part and question type; random draws are averaged question by question."""
    rows = []
    for (site, kind, part), answers in samples.groupby(["site", "kind", "part"], sort=False):
        named: dict[str, Any] = {"site": site, "kind": kind, "part": part, "draws": answers["draw"].nunique()}
        rows += [named | row for row in change_by_type(answers, seed=config.seed)]
    return pd.DataFrame(rows)


def _counts(samples: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Return the same as counts of right answers, with the drop in % of those before."""
    rows = []
    for (site, kind, part), answers in samples.groupby(["site", "kind", "part"], sort=False):
        named = {"site": site, "kind": kind, "part": part, "answers": config.answers}
        rows += [named | row for row in counts_by_type(answers, seed=config.seed)]
    return pd.DataFrame(rows)


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the mean of types for each model, site and intervention, and every type for permutation at the encoder.

    Permutation at the encoder has the numbers of right answers too, as in the paper's Table 3.
    """
    table = changes(runs)
    at_encoder = (table["site"] == "encoder") & (table["kind"] == "permute")
    counts = pd.concat([run.tables["counts"].assign(model=label) for label, run in runs.items()])
    named = ["model", "site", "kind", "part", "category"]
    counts = counts[(counts["kind"] == "permute") & (counts["site"] == "encoder")].rename(
        columns={"low": "drop_percent_low", "high": "drop_percent_high"}
    )
    counts = counts[[*named, "right_before", "right_after", "drop_percent", "drop_percent_low", "drop_percent_high"]]
    shown = table[(table["category"] == MEAN) | at_encoder].drop(columns=["seed", "draws"])
    return shown.merge(counts, on=named, how="left")


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Subtract the drop of the first model from that of every other; p_holm corrects over the sites of a kind."""
    samples = {label: run.tables["samples"] for label, run in runs.items()}
    compared = {label: table[table["kind"].isin(["permute", "mean token"])] for label, table in samples.items()}
    return drop_differences(compared, by=("site", "kind", "part"), within=("kind", "part"))


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw the accuracy drop by layer; at the encoder by question type for each part, and for every intervention.

    The drop by layer has a second figure with the paired difference of the models.
    """
    table, drop = drops(changes(runs)), "accuracy drop"
    means = table[table["category"] == MEAN]
    curves = means[means["kind"].isin(["permute", "mean token"]) & (means["part"] == "whole")]
    curves = curves.assign(layer=curves["site"].replace("encoder", "-1").astype(int))
    drawn = {"Accuracy drop by layer, mean of types": fig.layer_curves(curves, y=drop, kind="kind")}
    changed = differences(runs)
    changed = changed[changed["part"] == "whole"].assign(layer=lambda t: t["site"].replace("encoder", "-1").astype(int))
    if len(changed):
        drawn["Accuracy drop by layer: difference, mean of types"] = fig.difference_curves(
            changed, y=f"{drop}, minus {changed['against'].iloc[0]}", kind="kind"
        )
    at_encoder = table[table["site"] == "encoder"]
    for part in PARTS:
        permuted = at_encoder[(at_encoder["kind"] == "permute") & (at_encoder["part"] == part)]
        if len(permuted):
            title = f"Accuracy drop by question type, permuted at the encoder: {part}"
            drawn[title] = fig.bars(permuted, x="category", y=drop)
    controls = at_encoder[at_encoder["category"] == MEAN]
    if len(controls):
        change = np.where(controls["part"] == "whole", controls["kind"], controls["kind"] + ", " + controls["part"])
        drawn["Accuracy drop at the encoder by intervention, mean of types"] = fig.bars(
            controls.assign(change=change), x="change", y=drop
        )
    return drawn


# versions: 2 intervals with their stated coverage; 3 tables name sites and the accuracy drop; 4 all tokens of
# an option; 5 interval of a drop in % where few answers changed; 6 answers with two letters
ANALYSIS = Analysis(
    "permutation",
    "What changes when visual tokens change places (permutation)",
    Config,
    run,
    figures,
    summary,
    version=6,
)

if __name__ == "__main__":
    main(ANALYSIS)
