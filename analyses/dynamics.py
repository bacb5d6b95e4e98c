"""Accuracy and alignment during training, and how soon one run reaches another run's final score.

    python -m analyses.dynamics --model runs/baseline-s0 runs/viral-s0 runs/baseline-s1 runs/viral-s1 --vfm dinov2-small
    --data shapes:val --limit 200

This is row A6 of docs/paper.md. Each model is a training folder. Its model is evaluated on the same images at step 0
(if the model that the training started from still exists), at every checkpoint, and at the end:

    accuracy  of each question type and as the mean of types, by the log-probability of each option's first token
    CKNNA     between the visual tokens of three layers and a VFM's patches, within images, with its permutation null
    drop      accuracy before minus accuracy after the visual tokens of each image are permuted after the vision
              encoder (features together with their positions)

The two training losses come from the training log: each value is the mean over the training batches since the previous
row. For a single run they have no interval. Models named NAME-s0, NAME-s1, ... are treated as seeds of NAME: their
scores are means over seeds with Student's t interval. For all other models the interval is over images; it says
nothing about other seeds.

`steps to the other's final score`, for accuracy and CKNNA, is the first step at which a run's score is at least the
final score of the other run of the same seed, with linear interpolation between evaluations. It is compared with the
step at which the other run itself first reached that score, by the same rule, so identical runs differ by 0. The
difference is paired by seed, with Student's t interval. If a run never reaches the score, the table says that it did
not within so many steps and gives no difference, because a number would only count the seeds that succeed.

What this number is not: a measure of the final score. Look at the difference of final scores first. Of two runs with
equal but noisy curves, the one whose last evaluation happened to be lower is reached early, so read both directions.
Where all seeds agree, as in an interval of [0, 0], the resolution is still limited by the distance between evaluations.
Differences of scores are paired by seed too, and need at least two seeds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from workbench import figures as fig
from workbench.analysis.chunks import Chunk, Part, joined
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, DataOptions, Result, vfm_inputs
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
from workbench.vfm import VFM, load_vfm
from workbench.weights.fetch import sha256

log = logging.getLogger(__name__)

VERSION = 2  # since 2: intervals that reach their nominal coverage
ACCURACY, CKNNA, DROP = "accuracy", "CKNNA", "drop in accuracy"


@dataclass(frozen=True)
class Config(DataOptions):
    """Options of the evaluation of every checkpoint."""

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Vision foundation models (VFMs) that the visual tokens are compared with."""
    layers: tuple[int, ...] = ()
    """Layers for CKNNA, 0 to L; by default 1, the aligned layer (the middle one without alignment) and the last."""
    k: Annotated[int, Ge(1)] = 10
    """Nearest neighbors in CKNNA."""
    null: Annotated[int, Ge(10)] = 20
    """Permutations for CKNNA's null."""
    types: tuple[str, ...] = ()
    """Question types; all by default."""
    questions: Annotated[int, Ge(0)] = 1
    """Questions of each type per image; 0 for all."""
    permutations: Annotated[int, Ge(1)] = 2
    """Random permutations of each image's tokens; the accuracy drop is averaged over them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vfm:
            raise ConfigError("vfm is empty: expected at least one VFM, as --vfm NAME ...")


# --- training folder ------------------------------------------------------------------------------


def _earlier_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints from before the last step; the model at the last step is in the folder itself.

    Raises:
        RunError: the folder is not a finished training, or has no such checkpoints.
    """
    last = training_record(folder)["recipe"]["optim"]["steps"]
    earlier = [checkpoint for checkpoint in checkpoints(folder) if checkpoint.step < last]
    if not earlier:
        raise RunError(
            f"{folder} has no checkpoints from before its last step, {last}: expected folders checkpoint-STEP, which a"
            " recipe with keep_checkpoints: null keeps"
        )
    return earlier


def _start(folder: Path) -> Path | None:
    """Return the folder of the model that a training started from, or None if there is none.

    The recipe may name it relative to the folder in which the trainer was called, so all parent folders are tried.
    """
    start = training_record(folder)["recipe"].get("start")
    if not start:
        return None
    parents = [Path(), *folder.resolve().parents]
    return next((parent / start for parent in parents if (parent / start / "config.json").exists()), None)


def beside(config: Config, model: str) -> dict[str, str]:
    """Return the identity of the training log, of every checkpoint, and of the model that the training started from."""
    folder = Path(model)
    if not folder.is_dir():
        raise RunError(
            f"'{model}' is not a folder: expected the output_dir of a training, with its"
            f" checkpoints{did_you_mean(model)}"
        )
    steps = {f"step {checkpoint.step}": _identity(checkpoint.folder) for checkpoint in _earlier_checkpoints(folder)}
    training_log(folder)  # raises if there is none
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
    """Return the name and hash of every file that affects the answers: not the optimizer, alignment heads or log."""
    files = {file for pattern in MODEL_FILES for file in folder.glob(pattern)}
    return ", ".join(f"{file.name} {sha256(file)}" for file in sorted(files))


# --- one checkpoint -------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """The questions and options of the evaluation, and what all checkpoints share.

    Attributes:
        scenes: questions by image.
        layers: layers for CKNNA.
    """

    config: Config
    context: Context
    scenes: list[list[Sample]]
    layers: list[int]

    @cached_property
    def vfms(self) -> list[VFM]:
        return [load_vfm(name) for name in dict.fromkeys(self.config.vfm)]

    @cached_property
    def _patches(self) -> dict[int, list[GridFeatures]]:
        """{number of a batch's first image: patches of each VFM}."""
        return {}

    def patches(self, start: int, samples: Sequence[Sample]) -> list[GridFeatures]:
        """Return each VFM's patches for the batch of images from number `start` on, computed once for all checkpoints.

        Returns:
            One element for each VFM.
        """
        if start not in self._patches:
            mllm, images = self.context.mllm, [s.image for s in samples]
            grids = mllm.token_grids(mllm.encode(images, [s.question for s in samples]))
            self._patches[start] = [patches_under(vfm, images, grids) for vfm in self.vfms]
        return self._patches[start]


def run(config: Config, context: Context) -> Result:
    """Evaluate the model at the start, at every checkpoint and at the end on the same questions."""
    folder = Path(context.mllm.name)
    record = training_record(folder)
    evaluation = Evaluation(
        config,
        context,
        questions_of(context.data.scenes, types=config.types, each=config.questions),
        _layers(config, context.mllm, record),
    )
    notes: dict[str, str] = {}
    parts_by_table: dict[str, list[pd.DataFrame]] = {}
    models: list[tuple[int, Path | None]] = [
        (checkpoint.step, checkpoint.folder) for checkpoint in _earlier_checkpoints(folder)
    ]
    models = [(0, _start(folder)), *models, (record["recipe"]["optim"]["steps"], None)]
    for step, model_folder in models:
        point = TrainingPoint(evaluation, step, model_folder)
        if step == 0 and (model_folder is None or not point.has_fingerprint(record.get("start_fingerprint"))):
            notes["step 0"] = (
                "the model that the training started from was not found"
                if model_folder is None
                else f"the weights in {model_folder} are not those that the training started from"
            )
            continue
        tables, skipped = _measure(evaluation, point)
        notes |= skipped
        for name, table in tables.items():
            parts_by_table.setdefault(name, []).append(table.assign(step=step))
    for what, why in notes.items():
        log.warning("%s: %s is left out: %s", context.mllm.name, what, why)
    tables = {name: pd.concat(parts, ignore_index=True) for name, parts in parts_by_table.items()}
    tables["log"] = training_log(folder)
    return Result(
        tables,
        record={
            "skipped": notes,
            "alignment": record["recipe"]["alignment"],
            "training_seed": record["recipe"]["seed"],
            "layers": evaluation.layers,
        },
    )


def _layers(config: Config, mllm: MLLM, record: Mapping[str, Any]) -> list[int]:
    """Return the layers for CKNNA; see `Config.layers`."""
    alignment = record["recipe"]["alignment"]
    middle = alignment["layer"] if alignment["objective"] != "none" else [max(1, mllm.n_layers // 2)]
    return check_layers(mllm, config.layers or sorted({1, *middle, mllm.n_layers}))


@dataclass
class TrainingPoint:
    """One step of the training and its model, which is loaded when the first chunk of questions is asked.

    Attributes:
        folder: folder of the model; None for the finished model, which is loaded already.
    """

    evaluation: Evaluation
    step: int
    folder: Path | None

    @cached_property
    def mllm(self) -> MLLM:
        """The model, with the data type and on the device of the finished one."""
        finished = self.evaluation.context.mllm
        if self.folder is None:
            return finished
        return MLLM.load(
            str(self.folder), dtype=str(finished.model.dtype).removeprefix("torch."), device=str(finished.device)
        )

    def has_fingerprint(self, expected: object) -> bool:
        """Return whether the model's weights have the expected fingerprint."""

        def compute(_: Chunk[str]) -> Part:
            return Part(record={"fingerprint": fingerprint(saved_tensors(self.mllm.model))})

        (part,) = self.evaluation.context.map("start", [str(self.folder)], compute)
        return bool(part.record["fingerprint"] == expected)


def _measure(evaluation: Evaluation, point: TrainingPoint) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Return the tables of one checkpoint, and what was skipped and why.

    Returns:
        Tables scores (with intervals over images), samples (one row per question) and per_image (CKNNA); and
        {what was skipped: why}.
    """
    config = evaluation.config
    parts = evaluation.context.map(f"answers at step {point.step}", evaluation.scenes, partial(_answers, config, point))
    samples, why = joined(parts, "samples"), next((part.record["why"] for part in parts if part.record["why"]), "")
    skipped = {"drop": why} if why else {}
    rows = [
        _row(ACCURACY, row["category"], row, row["accuracy"], row["chance"], row["chance"])
        for row in _accuracy(samples, config)
    ]
    if not skipped:
        rows += [
            _row(DROP, row["category"], row, row["accuracy_drop"], 0.0, 0.0)
            for row in change_by_type(samples, seed=config.seed)
        ]
    aligned, per_image, left_out = _aligned(evaluation, point)
    if left_out:
        skipped |= {f"alignment of {len(left_out)} images": "; ".join(left_out[:3])}
    columns = ["id", "image_id", "category", "chance", "correct_before", "correct_after", "kl"]
    by_question = (
        samples.groupby("id", sort=False)
        .agg({name: "mean" if name in columns[4:] else "first" for name in columns[1:]})
        .reset_index()
    )
    return {"scores": pd.DataFrame([*rows, *aligned]), "samples": by_question, "per_image": per_image}, skipped


def _accuracy(samples: pd.DataFrame, config: Config) -> list[dict[str, Any]]:
    """Return the accuracy of each question type before any permutation."""
    by_question = samples.drop_duplicates("id").rename(columns={"correct_before": "correct"})
    return accuracy_by_type(by_question, seed=config.seed)


def _row(
    measure: str, of: str, spread: Mapping[str, Any], score: float, null_mean: float, null_q95: float
) -> dict[str, Any]:
    """Return a row of the table scores; `spread` has the interval, the counts and the seed."""
    values = {
        "measure": measure,
        "of": of,
        "score": score,
        "low": spread["low"],
        "high": spread["high"],
        "null_mean": null_mean,
        "null_q95": null_q95,
    }
    return values | {"n": spread["n"], "n_images": spread["n_images"], "seed": spread["seed"]}


def _answers(config: Config, point: TrainingPoint, chunk: Chunk[list[Sample]]) -> Part:
    """Ask a chunk's questions before and after each permutation of the visual tokens after the vision encoder.

    Where the encoder's features cannot be changed, the answers after are those before, and the part's `why` says why.
    """
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
    """Return an image's features in the random order that belongs to the image, draw and seed."""
    return values[random_order(len(values), image=image, draw=draw, seed=seed)]


def _read(evaluation: Evaluation, point: TrainingPoint, chunk: Chunk[list[Sample]]) -> Part:
    """Compute CKNNA for a chunk's images, by layer and VFM."""
    config = evaluation.config
    within = Within(METRICS.get("cknna"), config.k, null=config.null, seed=config.seed, first=chunk.start)
    for start, scenes in chunk.batches():
        samples = [scene[0] for scene in scenes]
        batch = point.mllm.encode([s.image for s in samples], [s.question for s in samples])
        hidden = read_by_grid(point.mllm, batch, point.mllm.token_grids(batch), evaluation.layers)
        within.add(hidden, evaluation.patches(start, samples))
    return Part(tensors=within.tensors(), record=within.record())


def _aligned(evaluation: Evaluation, point: TrainingPoint) -> tuple[list[dict[str, Any]], pd.DataFrame, list[str]]:
    """Return CKNNA of each layer with each VFM, its values by image, and a sentence for each image without one."""
    config = evaluation.config
    collector = Within(METRICS.get("cknna"), config.k, null=config.null, seed=config.seed)
    for part in evaluation.context.map(
        f"alignment at step {point.step}",
        evaluation.scenes,
        partial(_read, evaluation, point),
        depends=evaluation.layers,
    ):
        collector.take(part.tensors, part.record)
    scores = collector.finish()
    rows, per_image = [], []
    ids = [evaluation.scenes[n][0].image_id for n in collector.scored]
    for row, layer in enumerate(evaluation.layers):
        for column, name in enumerate(dict.fromkeys(config.vfm)):
            interval = scores.intervals[row][column]
            null = null_of(interval.estimate, scores.nulls[:, row, column])
            spread = {
                "low": interval.low,
                "high": interval.high,
                "n": scores.n,
                "n_images": interval.n,
                "seed": config.seed,
            }
            rows.append(_row(CKNNA, f"layer {layer}, {name}", spread, interval.estimate, null.mean, null.q95))
            per_image += [
                (layer, name, image_id, score)
                for image_id, score in zip(ids, scores.parts[:, row, column].tolist(), strict=True)
            ]
    left_out = collector.sentences([scene[0].source for scene in evaluation.scenes])
    return rows, pd.DataFrame(per_image, columns=["layer", "vfm", "image_id", "score"]), left_out


# --- several runs ---------------------------------------------------------------------------------


def groups(runs: Mapping[str, Run]) -> dict[str, dict[str, Run]]:
    """Group runs by model and seed: NAME-s0, NAME-s1, ... are seeds of NAME if their options and data are equal.

    Returns:
        {model: {seed: run}}; a model that is not one of several seeds has the seed "".
    """
    matches = {label: re.fullmatch(r"(.+)-s(\d+)", label) for label in runs}
    questions: dict[str, set[object]] = {}
    for label, match in matches.items():
        questions.setdefault(match[1] if match else label, set()).add(_question(runs[label]))
    grouped: dict[str, dict[str, Run]] = {}
    for label, match in matches.items():
        is_seed = match is not None and match[1] not in runs and len(questions[match[1]]) == 1
        name, seed = (match[1], match[2]) if match is not None and is_seed else (label, "")
        grouped.setdefault(name, {})[seed] = runs[label]
    return grouped


def curves(runs: Mapping[str, Run], table: str = "scores") -> pd.DataFrame:
    """Return every score by step: of one run with its interval over images, or the mean over a model's seeds.

    Means over seeds have Student's t interval and are given at the steps that all seeds have.

    Returns:
        Columns model, measure, of, step, score, low, high, null_mean, null_q95, n, n_images, over ("200 images" or "3
        seeds").
    """
    keys = ["model", "measure", "of", "step"]
    parts = []
    for name, seeds in groups(runs).items():
        scores = pd.concat([run.tables[table].assign(model=name) for run in seeds.values()], ignore_index=True)
        if len(seeds) == 1:
            parts.append(scores.assign(over=scores["n_images"].map("{:.0f} images".format)))
            continue
        for key, rows in scores.groupby(keys, sort=False):
            if len(rows) == len(seeds):
                values, trials = rows["score"].to_numpy(), int(rows["n"].iloc[0])
                bounded = key[1] == ACCURACY
                interval = t_interval(values, bounds=(0, 1), trials=trials) if bounded else t_interval(values)
                row = {
                    **dict(zip(keys, key, strict=True)),
                    "score": interval.estimate,
                    "low": interval.low,
                    "high": interval.high,
                    "n": rows["n"].iloc[0],
                    "n_images": rows["n_images"].iloc[0],
                    "over": f"{len(seeds)} seeds",
                    **rows[["null_mean", "null_q95"]].mean().to_dict(),
                }
                parts.append(pd.DataFrame([row]))
    return pd.concat(parts, ignore_index=True)


def losses(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the training losses by step, with Student's t interval over seeds, or none for a single run.

    Returns:
        Columns model, of (which loss), step, score, over, low, high.
    """
    rows = []
    for name, seeds in groups(runs).items():
        logs = pd.concat([run.tables["log"] for run in seeds.values()])
        logs = logs.melt("step", var_name="of", value_name="score").dropna()
        for (of, step), values in logs.groupby(["of", "step"], sort=False):
            interval = t_interval(values["score"].to_numpy())
            if len(values) == len(seeds):
                several = len(seeds) > 1
                row: dict[str, Any] = {
                    "model": name,
                    "of": str(of).removesuffix("_loss").replace("lm", "language model"),
                    "step": step,
                    "score": interval.estimate,
                    "over": f"{len(seeds)} seeds" if several else "1 run, no interval",
                    "low": interval.low if several else interval.estimate,
                    "high": interval.high if several else interval.estimate,
                }
                rows.append(row)
    return pd.DataFrame(rows)


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return every score minus that of the first model, by step, paired by seed with Student's t interval.

    A model that shares fewer than two seeds with the first one is left out.

    Returns:
        Columns model (naming both), measure, of, step, score (the difference), low, high, null_mean, null_q95, over.
    """
    (first, reference), *others = groups(runs).items()
    rows = []
    for name, seeds in others:
        shared = [seed for seed in seeds if seed in reference and _question(seeds[seed]) == _question(reference[seed])]
        if len(shared) < 2:
            continue
        keys = ["measure", "of", "step"]
        pairs = [
            [run.tables["scores"].set_index(keys)["score"] for run in (seeds[seed], reference[seed])] for seed in shared
        ]
        table = pd.concat([scores - reference_scores for scores, reference_scores in pairs], axis=1).dropna()
        for key, values in zip(table.index, table.to_numpy(), strict=True):
            interval = t_interval(values)
            row: dict[str, Any] = {
                "model": f"{name} - {first}",
                **dict(zip(keys, key, strict=True)),
                "over": f"{len(shared)} seeds, paired",
                "score": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "null_mean": 0.0,
                "null_q95": 0.0,
            }
            rows.append(row)
    return pd.DataFrame(
        rows, columns=["model", "measure", "of", "step", "score", "low", "high", "null_mean", "null_q95", "over"]
    )


def to_reach(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the steps that each model takes to reach each other model's final score, seed by seed.

    Returns:
        Columns model, other, measure, of, seed, target (the other model's final score), step and other_step (when the
        model and the other one first reached it; NaN if never or not known), reached and other_reached (the same in
        words).
    """
    rows = []
    for (name, seeds), (other, others) in permutations(groups(runs).items(), 2):
        for seed in sorted(seeds.keys() & others.keys()):
            if _question(seeds[seed]) == _question(others[seed]):
                rows += [
                    {"model": name, "other": other, "seed": seed} | row
                    for row in _first_steps(seeds[seed], others[seed])
                ]
    columns = ["model", "other", "measure", "of", "seed", "target", "step", "other_step", "reached", "other_reached"]
    return pd.DataFrame(rows, columns=columns)


def _question(run: Run) -> tuple[object, ...]:
    """Return what must be equal for two runs to be compared: data and options."""
    return run.record["data_fingerprint"], str(run.record["config"])


def _first_steps(run: Run, other: Run) -> Iterator[dict[str, Any]]:
    """For each score of both runs, yield when they first reached the other run's final score."""
    curves_of_run, curves_of_other = (
        dict(list(each.tables["scores"].sort_values("step").groupby(["measure", "of"], sort=False)))
        for each in (run, other)
    )
    for key in [key for key in curves_of_run if key in curves_of_other and key[0] != DROP]:  # a larger drop is no goal
        target = float(curves_of_other[key]["score"].iloc[-1])
        of_run, of_other = (
            first_reached(curve["step"].to_numpy(), curve["score"].to_numpy(), target)
            for curve in (curves_of_run[key], curves_of_other[key])
        )
        yield {
            "measure": key[0],
            "of": key[1],
            "target": target,
            "reached": of_run.text,
            "other_reached": of_other.text,
            "step": np.nan if of_run.step is None else of_run.step,
            "other_step": np.nan if of_other.step is None else of_other.step,
        }


def compared(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return `to_reach` averaged over seeds, and the difference in steps paired by seed.

    Returns:
        Columns model, other, measure, of, seeds, target, step, other_step, difference (with Student's t interval: low,
        high), reached. The steps and their difference are NaN unless every seed reaches the score.
    """
    rows = []
    for key, by_seed in to_reach(runs).groupby(["model", "other", "measure", "of"], sort=False):
        names: dict[str, Any] = dict(zip(("model", "other", "measure", "of"), key, strict=True))
        known = by_seed["step"].notna() & by_seed["other_step"].notna()
        values: dict[str, Any] = dict.fromkeys(("step", "other_step", "difference", "low", "high"), np.nan)
        n = len(by_seed)
        if known.all():
            interval = t_interval((by_seed["step"] - by_seed["other_step"]).to_numpy())
            values = {
                "step": by_seed["step"].mean(),
                "other_step": by_seed["other_step"].mean(),
                "difference": interval.estimate,
                "low": interval.low,
                "high": interval.high,
            }
            reached = by_seed["reached"].iloc[0] if n == 1 else f"step {by_seed['step'].mean():.0f}, mean of {n} seeds"
        else:
            unknown = by_seed[~known]
            reasons = [
                (row.seed, row.reached if np.isnan(row.step) else f"the other {row.other_reached}")
                for row in unknown.itertuples()
            ]
            reached = "; ".join(f"seed {seed}: {text}" if seed else text for seed, text in reasons)
            if len(unknown) == n > 1 and len({text for _, text in reasons}) == 1:
                reached = f"{reasons[0][1]}, all {n} seeds"
        rows.append(names | {"seeds": n, "target": by_seed["target"].mean(), **values, "reached": reached})
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


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the final value of every score, and the steps to every other model's final score.

    Returns:
        One row for each model, score and other model, or one for each model and score if nothing can be compared.
    """
    table = curves(runs)
    last = table[table["step"] == table.groupby(["model", "measure", "of"])["step"].transform("max")]
    last = last[
        ["model", "measure", "of", "step", "score", "low", "high", "null_mean", "null_q95", "over", "n"]
    ].rename(columns={"step": "steps"})
    reach = compared(runs)
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


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw every score over training steps and, given several seeds, the steps to other models' final scores."""
    table = curves(runs)
    drawn: dict[str, go.Figure] = {}
    accuracy, aligned, drop = (table[table["measure"] == measure] for measure in (ACCURACY, CKNNA, DROP))
    mean, types, drop = accuracy[accuracy["of"] == MEAN], accuracy[accuracy["of"] != MEAN], drop[drop["of"] == MEAN]
    if len(mean):
        chance = mean["null_mean"].iloc[0]
        drawn["Accuracy over training, mean of types"] = fig.step_curves(mean, y=f"accuracy (chance {chance:.2f})")
    if len(types):
        drawn["Accuracy over training by question type"] = fig.step_curves(
            types, panel="of", y="accuracy", null="chance", share=True
        )
    if len(aligned):
        drawn["Alignment over training"] = fig.step_curves(
            aligned, panel="of", y="CKNNA", null="chance (95 % of the null)"
        )
    if len(drop):
        drawn["Accuracy drop when tokens are permuted after the vision encoder, mean of types"] = fig.step_curves(
            drop, y="accuracy drop", null="no change"
        )
    paired = differences(runs)
    paired = paired[(paired["measure"] == CKNNA) | ((paired["measure"] == ACCURACY) & (paired["of"] == MEAN))]
    if len(paired):
        paired = paired.assign(of=np.where(paired["of"] == MEAN, "accuracy, " + MEAN, "CKNNA, " + paired["of"]))
        drawn["Difference over training, paired by seed"] = fig.step_curves(
            paired, panel="of", y="difference", null="no difference"
        )
    drawn["Training losses"] = fig.step_curves(losses(runs), panel="of", y="loss")
    reach = compared(runs)
    # the difference of a single pair of runs has no interval, so it is in the table only
    if len(reach) and (reach["seeds"] > 1).all():
        drawn["Steps to the other model's final score"] = fig.step_differences(reach)
    return drawn


ANALYSIS = Analysis(
    "dynamics",
    "Scores over a training's checkpoints (dynamics)",
    Config,
    run,
    figures,
    summary,
    version=VERSION,
    uses=vfm_inputs,
    beside=beside,
)

if __name__ == "__main__":
    main(ANALYSIS)
