"""Evaluation while a model is trained: answers to packed questions or to questions with options, or the loss on
conversations; and the tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import pandas as pd
import torch
from accelerate.utils import send_to_device
from torch.distributed.fsdp import FSDPModule

from trainer import distributed
from trainer.aligned_model import AlignedForConditionalGeneration
from trainer.setups.conversation_data import ConversationSet, encode_rows
from trainer.setups.packed_data import PackedDataset, collate
from workbench.data import Sample
from workbench.mllm import MLLM
from workbench.mllm.conversation import IGNORED
from workbench.scoring.quiz import Quiz
from workbench.scoring.tables import accuracy_by_type
from workbench.stats import mean_interval
from workbench.training_folder import MEAN, OF_A_SCORE


def _mine(numbers: Sequence[int], size: int, *, together: bool = False) -> Iterator[tuple[list[int], bool]]:
    """This process's batches of `numbers`, and whether each is its own to answer: every process makes as many passes as
    the others.

    Args:
        together: all batches are every process's own.
    """
    batches = [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]
    if together:
        yield from ((batch, True) for batch in batches)
        return
    for turn in range(0, len(batches), distributed.count()):
        mine = turn + distributed.rank()
        yield batches[min(mine, len(batches) - 1)], mine < len(batches)


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation of a model gives.

    Attributes:
        table: one row per question, with `correct`, or per conversation, with its `lm_loss`.
        losses: the training losses on the same data, by name: `lm_loss` per answer token, `alignment_loss` per visual
            token.
    """

    table: pd.DataFrame
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The larger, the better: mean accuracy of the question types, or the negative loss per answer token."""
        if "correct" in self.table:
            return float(self.table.groupby("category")["correct"].mean().mean())
        return -float((self.table["lm_loss"] * self.table["tokens"]).sum() / self.table["tokens"].sum())


@torch.no_grad()  # sharded weights know no inference mode
def answer_packed(model: AlignedForConditionalGeneration, data: PackedDataset, batch_size: int) -> Evaluation:
    """Whether each question is answered right by greedy decoding: every answer token and the end token is the most
    likely one; and both losses.

    Several processes share the batches; each runs as many passes as the others, since sharded weights are gathered in
    every pass, but every sample counts once.

    Returns:
        One row per sample: id, image_id, category, answer, correct, chance (one over the number of options).
    """
    was_training = model.training
    model.eval()
    rows, scenes = [], data.data.scenes
    sums: list[dict[str, tuple[float, int]]] = []  # of each batch: a loss times what it is a mean over, and that
    for indices, counts in _mine(range(len(data)), batch_size):
        batch, device = collate(data.__getitems__(indices)), next(model.parameters()).device
        output = model(**send_to_device(batch, device))
        if not counts:
            continue
        tokens = int(batch["labels"].ne(IGNORED).sum())
        sums.append({"lm_loss": (float(output.lm_loss) * tokens, tokens)})
        if output.alignment_loss is not None:
            sums[-1]["alignment_loss"] = (float(output.alignment_loss) * len(indices), len(indices))
        right = (output.logits.argmax(-1).cpu() == batch["labels"]) | (batch["labels"] == IGNORED)
        for row, index in enumerate(indices):
            for number, sample in enumerate(scenes[index], start=1):
                correct = bool(right[row][batch["segments"][row] == number].all())
                rows.append(
                    (index, number, sample.id, sample.image_id, sample.category, sample.answer, correct, sample.chance)
                )
    model.train(was_training)
    rows = [row[2:] for row in sorted(distributed.gathered(rows))]
    assert len(rows) == sum(map(len, scenes))
    batches = distributed.gathered(sums)
    losses = {
        name: sum(part[name][0] for part in batches) / sum(part[name][1] for part in batches) for name in batches[0]
    }
    return Evaluation(pd.DataFrame(rows, columns=["id", "image_id", "category", "answer", "correct", "chance"]), losses)


def answer_questions(
    model: torch.nn.Module, mllm: MLLM, scenes: Sequence[Sequence[Sample]], batch_size: int
) -> pd.DataFrame:
    """Whether the right option of each question is the most likely one, as in every analysis (workbench/scoring/);
    columns as `answer_packed`.

    Args:
        model: the whole of which `mllm` is a part. Processes that divide its weights answer all questions together,
            since how many passes a batch takes follows from its questions.
    """
    tables, together = [], distributed.divided()
    with _outside_blocks(model):
        for numbers, counts in _mine(range(len(scenes)), batch_size, together=together):
            if counts:
                quiz = Quiz(mllm, [scenes[n] for n in numbers], batch_size)
                scores = quiz.logprobs()
                tables.append(
                    (numbers, quiz.scored(scores, scores).assign(answer=[sample.answer for sample in quiz.samples]))
                )
    found = tables if together else sorted(distributed.gathered(tables), key=lambda own: own[0])
    table = pd.concat([table for _, table in found], ignore_index=True)
    return table.rename(columns={"correct_before": "correct"})[
        ["id", "image_id", "category", "answer", "correct", "chance"]
    ]


@contextmanager
def _outside_blocks(model: torch.nn.Module) -> Iterator[None]:
    """Hold the weights outside the blocks whole, where FSDP divides them and parts of the model are called by
    themselves; each block gathers its own."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


@torch.no_grad()  # sharded weights know no inference mode
def language_loss(
    model: torch.nn.Module, mllm: MLLM, data: ConversationSet, batch_size: int, max_length: int | None
) -> pd.DataFrame:
    """The loss on the answer tokens of each conversation; those with images first, so that all processes have images in
    the same passes.

    Returns:
        One row per conversation with an answer within `max_length`: id, image_id (of all its images; its id without
            any), tokens, lm_loss (nats per
        token), chance (of a guess among all tokens, ln |V|).
    """
    rows, conversations = [], data.conversations
    kinds = [[n for n, c in enumerate(conversations) if bool(c.loads) == kind] for kind in (True, False)]
    for numbers, counted in chain.from_iterable(_mine(kind, batch_size) for kind in kinds):
        own = [conversations[n] for n in numbers]
        batch, labels = encode_rows(mllm, data, numbers, max_length)
        logits = model(labels=labels, visual=(), **batch.inputs).logits[:, :-1]
        wanted = labels[:, 1:] != IGNORED
        counts = wanted.sum(1).tolist()
        # of the answers alone, which need the memory
        each = torch.nn.functional.cross_entropy(logits[wanted].float(), labels[:, 1:][wanted], reduction="none")
        losses = [float(own.sum()) for own in each.split(counts)]
        for number, c, loss, count in zip(numbers, own, losses, counts, strict=True):
            if count and counted:
                rows.append(
                    (
                        number,
                        c.id,
                        " ".join(c.image_ids) or f"text {c.id}",
                        count,
                        loss / count,
                        math.log(logits.shape[-1]),
                    )
                )
    return pd.DataFrame(
        [row[1:] for row in sorted(distributed.gathered(rows))],
        columns=["id", "image_id", "tokens", "lm_loss", "chance"],
    )


def summary(evaluation: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Accuracy per question type and their mean, or the loss per answer token, with 95 % intervals over images (a text
    alone is one too)."""
    if "correct" in evaluation:
        return pd.DataFrame(accuracy_by_type(evaluation, seed=seed))
    # a ratio of sums: each conversation's deviation from it, over the mean length, has the spread of the ratio (the
    # delta method)
    loss = float((evaluation["lm_loss"] * evaluation["tokens"]).sum() / evaluation["tokens"].sum())
    share = evaluation["tokens"] / evaluation["tokens"].mean()
    each = loss + share * (evaluation["lm_loss"] - loss)
    interval = mean_interval(each, kind="real", groups=evaluation["image_id"].tolist())
    row = {
        "category": "lm_loss",
        "lm_loss": loss,
        "low": interval.low,
        "high": interval.high,
        "n": int(evaluation["tokens"].sum()),
    }
    return pd.DataFrame(
        [row | {"n_conversations": len(evaluation), "chance": float(evaluation["chance"].iloc[0]), "seed": seed}]
    )


def metrics_of(evaluation: Evaluation, seed: int) -> dict[str, float]:
    """What the training log says of an evaluation: accuracy by type and their mean, or the loss per answer token, each
    with low, high, chance and n."""
    table = evaluation.table
    if "correct" not in table:
        (loss,) = summary(table, seed).to_dict("records")
        return {"val_lm_loss": loss["lm_loss"], **{f"val_lm_loss_{key}": float(loss[key]) for key in OF_A_SCORE}}
    found = {f"val_{name}": value for name, value in evaluation.losses.items()}
    for row in accuracy_by_type(table, seed=seed):
        name = "mean" if row["category"] == MEAN else row["category"]
        found |= {
            f"accuracy/{name}": row["accuracy"],
            **{f"accuracy_{key}/{name}": float(row[key]) for key in OF_A_SCORE},
        }
    return found
