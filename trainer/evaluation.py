"""Answers to packed questions during training, and the accuracy table."""

from __future__ import annotations

import pandas as pd
import torch

from trainer import processes
from trainer.data import PackedDataset, collate
from trainer.model import (
    IGNORED,
    AlignedForConditionalGeneration,
)
from workbench.stats import bootstrap_ci


@torch.no_grad()  # sharded weights know no inference mode
def answer_packed(model: AlignedForConditionalGeneration, data: PackedDataset, batch_size: int) -> pd.DataFrame:
    """Whether each question is answered right by greedy decoding: every answer token and the end token is the most likely one.

    Several processes share the batches; each runs as many passes as the others, since sharded weights are gathered in every pass, but every sample counts once.

    Returns:
        One row per sample: id, image_id, category, answer, correct, chance (one over the number of options).
    """
    was_training = model.training
    model.eval()
    rows, scenes = [], data.data.scenes
    batches = [list(range(len(data)))[start : start + batch_size] for start in range(0, len(data), batch_size)]
    for turn in range(0, len(batches), processes.count()):
        mine = turn + processes.rank()
        indices = batches[min(mine, len(batches) - 1)]
        batch, device = collate(data.__getitems__(indices)), next(model.parameters()).device
        output = model(**{name: value.to(device) for name, value in batch.items()})
        if mine >= len(batches):
            continue
        right = (output.logits.argmax(-1).cpu() == batch["labels"]) | (batch["labels"] == IGNORED)
        for row, index in enumerate(indices):
            for number, sample in enumerate(scenes[index], start=1):
                correct = bool(right[row][batch["segments"][row] == number].all())
                rows.append((index, number, sample.id, sample.image_id, sample.category, sample.answer, correct, sample.chance))
    model.train(was_training)
    rows = [row[2:] for row in sorted(processes.gathered(rows))]
    assert len(rows) == sum(map(len, scenes))
    return pd.DataFrame(rows, columns=["id", "image_id", "category", "answer", "correct", "chance"])


def accuracy_table(evaluation: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Accuracy per question type with a 95 % interval over images: columns category, accuracy, low, high, n, n_images, chance, seed."""
    rows = []
    for category, part in evaluation.groupby("category"):
        interval = bootstrap_ci(part["correct"].to_numpy(), groups=part["image_id"].tolist(), seed=seed)
        row = {"category": category, "accuracy": interval.estimate, "low": interval.low, "high": interval.high, "n": len(part), "n_images": interval.n}
        rows.append(row | {"chance": part["chance"].mean(), "seed": seed})
    return pd.DataFrame(rows)
