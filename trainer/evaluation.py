"""Answers to packed questions during training, and the accuracy table."""

from __future__ import annotations

import pandas as pd
import torch
from torch.utils.data import DataLoader

from trainer.data import PackedDataset, collate
from trainer.model import (
    IGNORED,
    AlignedForConditionalGeneration,
)
from workbench.stats import bootstrap_ci


@torch.inference_mode()
def answer_packed(model: AlignedForConditionalGeneration, data: PackedDataset, batch_size: int) -> pd.DataFrame:
    """Whether each question is answered right by greedy decoding: every answer token and the end token is the most likely one.

    Returns:
        One row per sample: id, image_id, category, answer, correct, chance (one over the number of options).
    """
    was_training = model.training
    model.eval()
    rows, scenes = [], iter(data.data.scenes)
    for batch in DataLoader(data, batch_size=batch_size, collate_fn=collate):
        device = next(model.parameters()).device
        output = model(**{name: value.to(device) for name, value in batch.items()})
        right = (output.logits.argmax(-1).cpu() == batch["labels"]) | (batch["labels"] == IGNORED)
        for row in range(len(right)):
            for number, sample in enumerate(next(scenes), start=1):
                correct = bool(right[row][batch["segments"][row] == number].all())
                rows.append((sample.id, sample.image_id, sample.category, sample.answer, correct, 1 / max(1, len(sample.options))))
    model.train(was_training)
    return pd.DataFrame(rows, columns=["id", "image_id", "category", "answer", "correct", "chance"])


def accuracy_table(evaluation: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Accuracy per question type with a 95 % interval over images: columns category, accuracy, low, high, n, n_images, chance, seed."""
    rows = []
    for category, part in evaluation.groupby("category"):
        interval = bootstrap_ci(part["correct"].to_numpy(), groups=part["image_id"].tolist(), seed=seed)
        row = {"category": category, "accuracy": interval.estimate, "low": interval.low, "high": interval.high, "n": len(part), "n_images": interval.n}
        rows.append(row | {"chance": part["chance"].mean(), "seed": seed})
    return pd.DataFrame(rows)
