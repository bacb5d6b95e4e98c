"""What becomes of answers and alignment while a model is trained, and how soon one run is as good as another in the end
(docs/paper.md, A6).

    python -m analyses.dynamics --model runs/baseline-s0 runs/viral-s0 runs/baseline-s1 runs/viral-s1 --vfm dinov2-small
    --data shapes:val --limit 200

Each model is a training folder. At its start (step 0, where what it started from is still there), at every checkpoint
and at its end, on the same images:

    accuracy  of each question type and of the mean of types, by the log-probability of each option's first token
    CKNNA     of the visual tokens of three layers with a VFM's patches, within images, over its permutation null
    drop      accuracy before minus accuracy after the visual tokens of each image change places after the tower
              (features with their positions)

and from the training log the two losses, means over the training batches since the row before, which have no interval
for one run. Models called NAME-s0, NAME-s1, ... are the seeds of NAME: scores are then means over seeds with Student's
interval, otherwise over images. An interval over images says nothing about other seeds.

`steps to the other's final score`, of accuracy and CKNNA: the first step at which a run's score is at least the other
run's last one (of the same seed), on straight lines between evaluations. What it is compared with is the step at which
the other run itself was there first, by the same rule, so that identical runs differ by 0; the difference is paired by
seed, with Student's interval. Where a run never gets there it is not within so many steps, and there is no difference
then: a number would only count the seeds that succeed. What it is not: a measure of the final score, whose own
difference is the one to look at first; of two equal curves with noise the one whose last evaluation came out lower is
reached early, so read both directions. Where seeds agree, as in an interval of [0, 0], there is still the distance
between evaluations. A difference of scores is paired by seed too, and needs two seeds or more.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from workbench import figures as fig
from workbench.analysis.chunks import Chunk, Part, joined
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, DataOptions, Result
from workbench.capture.hidden_states import check_layers
from workbench.data.base import Sample
from workbench.errors import ConfigError, ModelError, RunError
from workbench.hashing import fingerprint, saved_tensors
from workbench.metrics import METRICS
from workbench.mllm import MLLM
from workbench.mllm.residual import FILE as RESIDUAL_FILE
from workbench.models import did_you_mean
from workbench.runs import Run
from workbench.scoring.questions import questions_of, random_order
from workbench.scoring.quiz import Quiz
from workbench.scoring.tables import accuracy_by_type, change_by_type
from workbench.spatial.vfm_patches import patches_under
from workbench.spatial.within_image import GridFeatures, Within, read_by_grid
from workbench.stats import first_reached, null_of, t_interval
from workbench.training_folder import LOG_FILE, MEAN, Checkpoint, checkpoints, training_log, training_record
from workbench.vfm import VFM, find_vfm, load_vfm
from workbench.weights.fetch import sha256

log = logging.getLogger(__name__)

VERSION = 2  # intervals that cover what they say
ACCURACY, CKNNA, DROP = "accuracy", "CKNNA", "drop in accuracy"


@dataclass(frozen=True)
class Config(DataOptions):
    """What is asked of every checkpoint."""

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Vision foundation models."""
    layers: tuple[int, ...] = ()
    """Layers for CKNNA, 0 to L; by default the first, the aligned one (the middle one without alignment) and the
    last."""
    k: int = 10
    """Neighbours."""
    null: int = 20
    """Permutations for CKNNA's null."""
    types: tuple[str, ...] = ()
    """Question types; all by default."""
    questions: int = 1
    """Questions of each type about an image, 0 for all."""
    permutations: int = 2
    """Random permutations of each image's tokens, whose results are averaged."""

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("null", 10), ("questions", 0), ("permutations", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least {least}")
        if not self.vfm:
            raise ConfigError("no VFM given: expected --vfm NAME ...")


# --- a training folder ----------------------------------------------------------------------------


def _between(folder: Path) -> list[Checkpoint]:
    """The checkpoints before the end; at the end there is the model itself.

    Raises:
        RunError: the folder is not a finished training, or has no checkpoints.
    """
    last = training_record(folder)["recipe"]["optim"]["steps"]
    found = [checkpoint for checkpoint in checkpoints(folder) if checkpoint.step < last]
    if not found:
        raise RunError(
            f"{folder} has no checkpoints from before its end: expected folders checkpoint-STEP, as a recipe with"
            " keep_checkpoints: null keeps them"
        )
    return found


def _start(folder: Path) -> Path | None:
    """The folder that a training started from, as the recipe names it from wherever the trainer was called."""
    start = training_record(folder)["recipe"].get("start")
    above = [Path(), *folder.resolve().parents]
    return (
        next((parent / start for parent in above if (parent / start / "config.json").exists()), None) if start else None
    )


def beside(config: Config, model: str) -> dict[str, str]:
    """The identity of the log, of every checkpoint, and of what the training started from."""
    folder = Path(model)
    if not folder.is_dir():
        raise RunError(
            f"'{model}' is not a folder: expected the output_dir of a training, with its"
            f" checkpoints{did_you_mean(model)}"
        )
    steps = {f"step {checkpoint.step}": _identity(checkpoint.folder) for checkpoint in _between(folder)}
    training_log(folder)
    start = _start(folder)
    return steps | {"log": sha256(folder / LOG_FILE), "start": "none" if start is None else _identity(start)}


MODEL_FILES = (
    "model*.safetensors*",
    RESIDUAL_FILE,
    "*config.json",
    "*.jinja",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*_tokens*.json",
)


def _identity(folder: Path) -> str:
    """Of all by which a checkpoint answers; its optimizer, its heads and its log say nothing there."""
    files = {file for pattern in MODEL_FILES for file in folder.glob(pattern)}
    return ", ".join(f"{file.name} {sha256(file)}" for file in sorted(files))


# --- one checkpoint -------------------------------------------------------------------------------


@dataclass
class Questions:
    """What every checkpoint is asked, and what is the same for all of them."""

    config: Config
    context: Context
    scenes: list[list[Sample]]
    layers: list[int]

    @cached_property
    def vfms(self) -> list[VFM]:
        return [load_vfm(name) for name in dict.fromkeys(self.config.vfm)]

    @cached_property
    def _patches(self) -> dict[int, list[GridFeatures]]:
        return {}

    def patches(self, start: int, samples: Sequence[Sample]) -> list[GridFeatures]:
        """Each VFM's patches of the batch that begins with image number `start`, found once for all checkpoints:
        [VFM]."""
        if start not in self._patches:
            places = self.context.mllm.token_grids(
                self.context.mllm.encode([s.image for s in samples], [s.question for s in samples])
            )
            self._patches[start] = [patches_under(vfm, [s.image for s in samples], places) for vfm in self.vfms]
        return self._patches[start]


def run(config: Config, context: Context) -> Result:
    """Ask the start, every checkpoint and the end the same questions."""
    folder = Path(context.mllm.name)
    record = training_record(folder)
    asked = Questions(
        config,
        context,
        questions_of(context.data.scenes, types=config.types, each=config.questions),
        _layers(config, context.mllm, record),
    )
    notes: dict[str, str] = {}
    found: dict[str, list[pd.DataFrame]] = {}
    points: list[tuple[int, Path | None]] = [(checkpoint.step, checkpoint.folder) for checkpoint in _between(folder)]
    points = [(0, _start(folder)), *points, (record["recipe"]["optim"]["steps"], None)]
    for step, place in points:
        point = Checked(asked, step, place)
        if step == 0 and (place is None or not point.is_start(record.get("start_fingerprint"))):
            notes["step 0"] = (
                "the model that the training started from is not there"
                if place is None
                else f"{place} is not what the training started from"
            )
            continue
        tables, skipped = _measure(asked, point)
        notes |= skipped
        for name, table in tables.items():
            found.setdefault(name, []).append(table.assign(step=step))
    for what, why in notes.items():
        log.warning("%s: %s is left out: %s", context.mllm.name, what, why)
    tables = {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()} | {
        "log": training_log(folder)
    }
    alignment = record["recipe"]["alignment"]
    return Result(
        tables,
        record={
            "skipped": notes,
            "alignment": alignment,
            "training_seed": record["recipe"]["seed"],
            "layers": asked.layers,
        },
    )


def _layers(config: Config, mllm: MLLM, record: Mapping[str, Any]) -> list[int]:
    alignment = record["recipe"]["alignment"]
    middle = alignment["layer"] if alignment["objective"] != "none" else [max(1, mllm.n_layers // 2)]
    return check_layers(mllm, config.layers or sorted({1, *middle, mllm.n_layers}))


@dataclass
class Checked:
    """One point of the training: its step, and the folder of its model, where that is not the finished one.

    The model is loaded when the first chunk of questions has to be asked.
    """

    asked: Questions
    step: int
    folder: Path | None

    @cached_property
    def mllm(self) -> MLLM:
        finished = self.asked.context.mllm
        if self.folder is None:
            return finished
        return MLLM.load(
            str(self.folder), dtype=str(finished.model.dtype).removeprefix("torch."), device=str(finished.device)
        )

    def is_start(self, wanted: object) -> bool:
        """Whether the model has the fingerprint with which the training started."""

        def same(_: Chunk[str]) -> Part:
            return Part(record={"fingerprint": fingerprint(saved_tensors(self.mllm.model))})

        (part,) = self.asked.context.map("start", [str(self.folder)], same)
        return bool(part.record["fingerprint"] == wanted)


def _measure(asked: Questions, point: Checked) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """The scores of one checkpoint with their intervals over images, and the questions they come from."""
    config = asked.config
    parts = asked.context.map(f"answers at step {point.step}", asked.scenes, partial(_answers, config, point))
    samples, why = joined(parts, "samples"), next((part.record["why"] for part in parts if part.record["why"]), "")
    skipped = {"drop": why} if why else {}
    rows = [
        _row(ACCURACY, own["category"], own, own["accuracy"], own["chance"], own["chance"])
        for own in _accuracy(samples, config)
    ]
    if not skipped:
        rows += [
            _row(DROP, own["category"], own, own["accuracy_drop"], 0.0, 0.0)
            for own in change_by_type(samples, seed=config.seed)
        ]
    aligned, per_image, left_out = _aligned(asked, point)
    if left_out:
        skipped |= {f"alignment of {len(left_out)} images": "; ".join(left_out[:3])}
    columns = ["id", "image_id", "category", "chance", "correct_before", "correct_after", "kl"]
    first = (
        samples.groupby("id", sort=False)
        .agg({name: "mean" if name in columns[4:] else "first" for name in columns[1:]})
        .reset_index()
    )
    return {"scores": pd.DataFrame([*rows, *aligned]), "samples": first, "per_image": per_image}, skipped


def _accuracy(samples: pd.DataFrame, config: Config) -> list[dict[str, Any]]:
    each = samples.drop_duplicates("id").rename(columns={"correct_before": "correct"})
    return accuracy_by_type(each, seed=config.seed)


def _row(
    measure: str, of: str, own: Mapping[str, Any], score: float, null_mean: float, null_q95: float
) -> dict[str, Any]:
    named = {
        "measure": measure,
        "of": of,
        "score": score,
        "low": own["low"],
        "high": own["high"],
        "null_mean": null_mean,
        "null_q95": null_q95,
    }
    return named | {"n": own["n"], "n_images": own["n_images"], "seed": own["seed"]}


def _answers(config: Config, point: Checked, chunk: Chunk[list[Sample]]) -> Part:
    """The questions of a chunk before and after each permutation at the tower; before alone where the tower cannot be
    changed."""
    tables, why = [], ""
    for start, scenes in chunk.batches():
        quiz = Quiz(point.mllm, scenes, chunk.batch_size, first=start)
        before = quiz.logprobs()
        for draw in range(config.permutations):
            try:
                after = quiz.logprobs("encoder", partial(_permuted, draw=draw, seed=config.seed))
            except ModelError as error:
                why, after = str(error), before
            tables.append(quiz.scored(before, after).assign(draw=draw))
            if why:
                break
    return Part({"samples": pd.concat(tables, ignore_index=True)}, record={"why": why})


def _permuted(values: Float[Tensor, "token f"], image: int, *, draw: int, seed: int) -> Float[Tensor, "token f"]:
    """An image's tokens in the random order of a draw."""
    return values[random_order(len(values), image=image, draw=draw, seed=seed)]


def _read(asked: Questions, point: Checked, chunk: Chunk[list[Sample]]) -> Part:
    """CKNNA of the images of a chunk, by layer and VFM."""
    within = Within(
        METRICS.get("cknna"), asked.config.k, null=asked.config.null, seed=asked.config.seed, first=chunk.start
    )
    for start, scenes in chunk.batches():
        samples = [scene[0] for scene in scenes]
        batch = point.mllm.encode([s.image for s in samples], [s.question for s in samples])
        within.add(
            read_by_grid(point.mllm, batch, point.mllm.token_grids(batch), asked.layers), asked.patches(start, samples)
        )
    return Part(tensors=within.tensors(), record=within.record())


def _aligned(asked: Questions, point: Checked) -> tuple[list[dict[str, Any]], pd.DataFrame, list[str]]:
    """CKNNA of each layer with each VFM, its values by image, and sentences about images that have none."""
    config = asked.config
    collector = Within(METRICS.get("cknna"), config.k, null=config.null, seed=config.seed)
    for part in asked.context.map(
        f"alignment at step {point.step}", asked.scenes, partial(_read, asked, point), depends=asked.layers
    ):
        collector.take(part.tensors, part.record)
    found = collector.finish()
    rows, per_image = [], []
    ids = [asked.scenes[n][0].image_id for n in collector.scored]
    for row, layer in enumerate(asked.layers):
        for column, name in enumerate(dict.fromkeys(config.vfm)):
            interval = found.intervals[row][column]
            null = null_of(interval.estimate, found.nulls[:, row, column])
            own = {
                "low": interval.low,
                "high": interval.high,
                "n": found.n,
                "n_images": interval.n,
                "seed": config.seed,
            }
            rows.append(_row(CKNNA, f"layer {layer}, {name}", own, interval.estimate, null.mean, null.q95))
            per_image += [
                (layer, name, image_id, score)
                for image_id, score in zip(ids, found.parts[:, row, column].tolist(), strict=True)
            ]
    left_out = collector.sentences([scene[0].source for scene in asked.scenes])
    return rows, pd.DataFrame(per_image, columns=["layer", "vfm", "image_id", "score"]), left_out


# --- several runs ---------------------------------------------------------------------------------


def groups(found: Mapping[str, Run]) -> dict[str, dict[str, Run]]:
    """{NAME: {seed: run}}: NAME-s0, NAME-s1, ... are the seeds of NAME, if they were asked the same; any other model
    has the seed ""."""
    parts = {label: re.fullmatch(r"(.+)-s(\d+)", label) for label in found}
    asked: dict[str, set[object]] = {}
    for label, part in parts.items():
        asked.setdefault(part[1] if part else label, set()).add(_question(found[label]))
    grouped: dict[str, dict[str, Run]] = {}
    for label, part in parts.items():
        alike = part is not None and part[1] not in found and len(asked[part[1]]) == 1
        name, seed = (part[1], part[2]) if part is not None and alike else (label, "")
        grouped.setdefault(name, {})[seed] = found[label]
    return grouped


def curves(found: Mapping[str, Run], table: str = "scores") -> pd.DataFrame:
    """Every score by step: the run's own with its interval over images, or the mean over seeds at the steps that all of
    them have, with Student's.

    Returns:
        Columns model, measure, of, step, score, low, high, null_mean, null_q95, n, n_images, over ("200 images" or "3
        seeds").
    """
    parts = []
    for name, seeds in groups(found).items():
        own = pd.concat([run.tables[table].assign(model=name) for run in seeds.values()], ignore_index=True)
        if len(seeds) == 1:
            parts.append(own.assign(over=own["n_images"].map("{:.0f} images".format)))
            continue
        for key, each in own.groupby(["model", "measure", "of", "step"], sort=False):
            if len(each) == len(seeds):
                known, trials = each["score"].to_numpy(), int(each["n"].iloc[0])
                interval = t_interval(known, bounds=(0, 1), trials=trials) if key[1] == ACCURACY else t_interval(known)
                values = {
                    "score": interval.estimate,
                    "low": interval.low,
                    "high": interval.high,
                    "n": each["n"].iloc[0],
                    "n_images": each["n_images"].iloc[0],
                }
                named = dict(zip(("model", "measure", "of", "step"), key, strict=True))
                parts.append(
                    pd.DataFrame(
                        [
                            named
                            | values
                            | {"over": f"{len(seeds)} seeds"}
                            | each[["null_mean", "null_q95"]].mean().to_dict()
                        ]
                    )
                )
    return pd.concat(parts, ignore_index=True)


def losses(found: Mapping[str, Run]) -> pd.DataFrame:
    """The training log by step, as `curves`; for one run without an interval."""
    parts = []
    for name, seeds in groups(found).items():
        own = (
            pd.concat([run.tables["log"] for run in seeds.values()])
            .melt("step", var_name="of", value_name="score")
            .dropna()
        )
        for (of, step), each in own.groupby(["of", "step"], sort=False):
            interval = t_interval(each["score"].to_numpy())
            if len(each) == len(seeds):
                named: dict[str, Any] = {
                    "model": name,
                    "of": str(of).removesuffix("_loss").replace("lm", "language model"),
                    "step": step,
                }
                spread = (
                    {"low": interval.low, "high": interval.high}
                    if len(seeds) > 1
                    else {"low": interval.estimate, "high": interval.estimate}
                )
                parts.append(
                    named
                    | {
                        "score": interval.estimate,
                        "over": f"{len(seeds)} seeds" if len(seeds) > 1 else "1 run, no interval",
                    }
                    | spread
                )
    return pd.DataFrame(parts)


def differences(found: Mapping[str, Run]) -> pd.DataFrame:
    """Every score less that of the first model by step, paired by seed with Student's interval; only where two seeds or
    more are there to pair.

    Returns:
        Columns as `curves`, `model` naming both.
    """
    (first, reference), *others = groups(found).items()
    rows = []
    for name, seeds in others:
        shared = [seed for seed in seeds if seed in reference and _question(seeds[seed]) == _question(reference[seed])]
        if len(shared) < 2:
            continue
        keys = ["measure", "of", "step"]
        pairs = [
            [one.tables["scores"].set_index(keys)["score"] for one in (seeds[seed], reference[seed])] for seed in shared
        ]
        table = pd.concat([mine - theirs for mine, theirs in pairs], axis=1).dropna()
        for key, values in zip(table.index, table.to_numpy(), strict=True):
            interval = t_interval(values)
            named: dict[str, Any] = {
                "model": f"{name} - {first}",
                **dict(zip(keys, key, strict=True)),
                "over": f"{len(shared)} seeds, paired",
            }
            rows.append(
                named
                | {
                    "score": interval.estimate,
                    "low": interval.low,
                    "high": interval.high,
                    "null_mean": 0.0,
                    "null_q95": 0.0,
                }
            )
    return pd.DataFrame(
        rows, columns=["model", "measure", "of", "step", "score", "low", "high", "null_mean", "null_q95", "over"]
    )


def to_reach(found: Mapping[str, Run]) -> pd.DataFrame:
    """Steps to the other model's final score, by seed.

    Returns:
        Columns model, other, measure, of, seed, target, step and other_step (NaN where not known), reached and
        other_reached in words.
    """
    rows = []
    for (name, seeds), (other, others) in permutations(groups(found).items(), 2):
        for seed in sorted(seeds.keys() & others.keys()):
            if _question(seeds[seed]) == _question(others[seed]):
                rows += [
                    {"model": name, "other": other, "seed": seed} | row
                    for row in _first_steps(seeds[seed], others[seed])
                ]
    columns = ["model", "other", "measure", "of", "seed", "target", "step", "other_step", "reached", "other_reached"]
    return pd.DataFrame(rows, columns=columns)


def _question(run: Run) -> tuple[object, ...]:
    return run.record["data_fingerprint"], str(run.record["config"])


def _first_steps(run: Run, other: Run) -> Iterator[dict[str, Any]]:
    own, their = (
        dict(list(one.tables["scores"].sort_values("step").groupby(["measure", "of"], sort=False)))
        for one in (run, other)
    )
    for key in [key for key in own if key in their and key[0] != DROP]:  # a larger drop is not a better one
        target = float(their[key]["score"].iloc[-1])
        mine, theirs = (
            first_reached(each["step"].to_numpy(), each["score"].to_numpy(), target) for each in (own[key], their[key])
        )
        steps = {
            "step": np.nan if mine.step is None else mine.step,
            "other_step": np.nan if theirs.step is None else theirs.step,
        }
        yield {
            "measure": key[0],
            "of": key[1],
            "target": target,
            "reached": mine.text,
            "other_reached": theirs.text,
        } | steps


def compared(found: Mapping[str, Run]) -> pd.DataFrame:
    """`to_reach` over seeds: mean steps, and the difference paired by seed with Student's interval; NaN unless every
    seed gets there.

    Returns:
        Columns model, other, measure, of, seeds, target, step, other_step, difference, low, high, reached.
    """
    rows = []
    for key, own in to_reach(found).groupby(["model", "other", "measure", "of"], sort=False):
        named: dict[str, Any] = dict(zip(("model", "other", "measure", "of"), key, strict=True))
        known = own["step"].notna() & own["other_step"].notna()
        values: dict[str, Any] = dict.fromkeys(("step", "other_step", "difference", "low", "high"), np.nan)
        if known.all():
            interval = t_interval((own["step"] - own["other_step"]).to_numpy())
            values = {
                "step": own["step"].mean(),
                "other_step": own["other_step"].mean(),
                "difference": interval.estimate,
            }
            values |= {"low": interval.low, "high": interval.high}
            said = (
                own["reached"].iloc[0] if len(own) == 1 else f"step {own['step'].mean():.0f}, mean of {len(own)} seeds"
            )
        else:
            wrong = own[~known]
            each = [
                (r.seed, r.reached if np.isnan(r.step) else f"the other {r.other_reached}") for r in wrong.itertuples()
            ]
            said = "; ".join(f"seed {seed}: {text}" if seed else text for seed, text in each)
            if len(wrong) == len(own) > 1 and len({text for _, text in each}) == 1:
                said = f"{each[0][1]}, all {len(own)} seeds"
        rows.append(named | {"seeds": len(own), "target": own["target"].mean(), **values, "reached": said})
    columns = [
        "model",
        "other",
        "measure",
        "of",
        "seeds",
        "target",
        "step",
        "other_step",
        "difference",
        "low",
        "high",
        "reached",
    ]
    return pd.DataFrame(rows, columns=columns)


def summary(found: Mapping[str, Run]) -> pd.DataFrame:
    """One row per model and score, its last value; where there are others, one for each other model, with the steps to
    its final score."""
    table = curves(found)
    last = table[table["step"] == table.groupby(["model", "measure", "of"])["step"].transform("max")]
    last = last[
        ["model", "measure", "of", "step", "score", "low", "high", "null_mean", "null_q95", "over", "n"]
    ].rename(columns={"step": "steps"})
    reach = compared(found)
    if reach.empty:
        return last
    reach = reach.rename(
        columns={
            "target": "others_final",
            "step": "reached_at",
            "other_step": "other_at",
            "low": "difference_low",
            "high": "difference_high",
        }
    )
    return last.merge(reach.drop(columns=["seeds"]), on=["model", "measure", "of"], how="left")


def figures(found: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Every score over training steps, and the steps to the other model's final score where there are two models."""
    table = curves(found)
    made: dict[str, go.Figure] = {}
    accuracy, aligned, drop = (table[table["measure"] == measure] for measure in (ACCURACY, CKNNA, DROP))
    mean, types, drop = accuracy[accuracy["of"] == MEAN], accuracy[accuracy["of"] != MEAN], drop[drop["of"] == MEAN]
    if len(mean):
        chance = mean["null_mean"].iloc[0]
        made["Accuracy over training, mean of types"] = fig.step_curves(mean, y=f"accuracy (chance {chance:.2f})")
    if len(types):
        made["Accuracy over training by question type"] = fig.step_curves(
            types, panel="of", y="accuracy", null="chance", share=True
        )
    if len(aligned):
        made["Alignment over training"] = fig.step_curves(
            aligned, panel="of", y="CKNNA", null="chance (95 % of the null)"
        )
    if len(drop):
        made["Drop when tokens change places after the tower, mean of types"] = fig.step_curves(
            drop, y="drop in accuracy", null="no change"
        )
    paired = differences(found)
    paired = paired[(paired["measure"] == CKNNA) | ((paired["measure"] == ACCURACY) & (paired["of"] == MEAN))]
    if len(paired):
        paired = paired.assign(of=np.where(paired["of"] == MEAN, "accuracy, " + MEAN, "CKNNA, " + paired["of"]))
        made["Difference over training, paired by seed"] = fig.step_curves(
            paired, panel="of", y="difference", null="no difference"
        )
    made["Training losses"] = fig.step_curves(losses(found), panel="of", y="loss")
    reach = compared(found)
    # the difference of one pair of runs has no interval, and stays in the table
    if len(reach) and (reach["seeds"] > 1).all():
        made["Steps to the other model's final score"] = fig.step_differences(reach)
    return made


def uses(config: Config) -> dict[str, str]:
    """The identity of every VFM: another copy of its weights is another question."""
    return {f"vfm {name}": find_vfm(name).identity() for name in config.vfm}


ANALYSIS = Analysis(
    "dynamics",
    "Scores over a training's checkpoints (dynamics)",
    Config,
    run,
    figures,
    summary,
    version=VERSION,
    uses=uses,
    beside=beside,
)

if __name__ == "__main__":
    main(ANALYSIS)
