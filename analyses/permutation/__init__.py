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
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from analyses.permutation.drawing import differences, figures, summary
from analyses.permutation.interventions import Condition, Config, Images, conditions_of
from workbench.analysis.chunks import Chunk, Part, joined
from workbench.analysis.declaration import Analysis, Context, Result
from workbench.benchmarks.asking import Asking, ask
from workbench.capture.edit import Site, check_site
from workbench.capture.hidden_states import check_layers
from workbench.data.base import Sample
from workbench.errors import DataError, ModelError
from workbench.mllm import MLLM
from workbench.scoring.questions import Grid, grids_of, survey
from workbench.scoring.quiz import Quiz
from workbench.scoring.tables import change_by_type, counts_by_type

__all__ = ["ANALYSIS", "Config", "differences", "figures", "run", "summary"]

log = logging.getLogger(__name__)


def run(config: Config, context: Context) -> Result:
    """Ask every question before and after every intervention."""
    mllm = context.mllm
    asking = _asking(config, context)
    scenes = asking.worded
    sites, skipped = _sites(mllm, check_layers(mllm, config.layers))
    images = _images(config, context, scenes, sites, skipped)
    conditions = list(conditions_of(images, sites, skipped))
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
