"""Evaluation of one checkpoint: accuracy before and after permutation, and CKNNA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from analyses.dynamics.options import ACCURACY, CKNNA, DROP, Config
from workbench.analysis.chunks import Chunk, Part, joined
from workbench.analysis.declaration import Context
from workbench.data.base import Sample
from workbench.errors import ModelError
from workbench.hashing import fingerprint, saved_tensors
from workbench.metrics import METRICS
from workbench.mllm import MLLM
from workbench.scoring.questions import random_order
from workbench.scoring.quiz import Quiz
from workbench.scoring.tables import accuracy_by_type, change_by_type
from workbench.spatial.vfm_patches import patches_under
from workbench.spatial.within_image import GridFeatures, Within, read_by_grid
from workbench.stats import null_of
from workbench.vfm import OWN, VFM, load_vfm, vfm_label


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
        return [load_vfm(name) for name in dict.fromkeys(self.config.vfm) if name != OWN]

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
        """The model, loaded as the finished one is."""
        finished = self.evaluation.context.mllm
        return finished if self.folder is None else finished.load_alike(str(self.folder))

    def has_fingerprint(self, expected: object) -> bool:
        """Return whether the stored weights have the expected fingerprint."""

        def compute(_: Chunk[str]) -> Part:
            # as it is stored: the training knows nothing of the data type in which it is evaluated
            stored = MLLM.load(str(self.folder), device="cpu", validate=False)
            return Part(record={"fingerprint": fingerprint(saved_tensors(stored.model))})

        (part,) = self.evaluation.context.map("start", [str(self.folder)], compute)
        return bool(part.record["fingerprint"] == expected)


def measure(evaluation: Evaluation, point: TrainingPoint) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
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
        row_of(ACCURACY, row["category"], row, row["accuracy"], row["chance"], row["chance"])
        for row in _accuracy(samples, config)
    ]
    if not skipped:
        rows += [
            row_of(DROP, row["category"], row, row["accuracy_drop"], 0.0, 0.0)
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


def row_of(
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
        names = list(dict.fromkeys(config.vfm))
        hidden, features = read_by_grid(
            point.mllm, batch, point.mllm.token_grids(batch), evaluation.layers, encoder=OWN in names
        )
        patches = list(evaluation.patches(start, samples))
        if features is not None:
            patches.insert(names.index(OWN), features)  # of this checkpoint, whose encoder may have been trained
        within.add(hidden, patches)
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
            rows.append(
                row_of(CKNNA, f"layer {layer}, {vfm_label(name)}", spread, interval.estimate, null.mean, null.q95)
            )
            per_image += [
                (layer, name, image_id, score)
                for image_id, score in zip(ids, scores.parts[:, row, column].tolist(), strict=True)
            ]
    left_out = collector.sentences([scene[0].image_name for scene in evaluation.scenes])
    return rows, pd.DataFrame(per_image, columns=["layer", "vfm", "image_id", "score"]), left_out
