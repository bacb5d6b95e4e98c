"""Evaluation of a model in training: answers to questions, or the loss on conversations, and tables of both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import pandas as pd
import torch
from accelerate.utils import send_to_device
from jaxtyping import Float
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
from workbench.training_folder import MEAN, SCORE_COLUMNS

ANSWERS = ["id", "image_id", "category", "question", "answer", "given", "p_right", "correct", "chance"]
"""Columns of a stored evaluation: `given` is the model's answer, `p_right` the probability that it gives `answer`, and
`chance` one over the number of options."""


def _batches_of_rank(numbers: Sequence[int], size: int, *, together: bool = False) -> Iterator[tuple[list[int], bool]]:
    """Yield this rank's batches of `numbers`, each with whether its results count.

    Every rank gets the same number of batches, so some ranks repeat the last one, whose results then do not count.

    Args:
        together: every rank gets all batches, and all of them count.
    """
    batches = [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]
    if together:
        yield from ((batch, True) for batch in batches)
        return
    for first in range(0, len(batches), distributed.count()):
        index = first + distributed.rank()
        yield batches[min(index, len(batches) - 1)], index < len(batches)


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        table: one row per question, with `correct`, or per conversation, with its `lm_loss`.
        losses: means of the training losses on the same data, by name: `lm_loss` per answer token, `alignment_loss`
            per image.
    """

    table: pd.DataFrame
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Mean accuracy of the question types, or the negative loss per answer token: larger is better."""
        if "correct" in self.table:
            return float(self.table.groupby("category")["correct"].mean().mean())
        return -float((self.table["lm_loss"] * self.table["tokens"]).sum() / self.table["tokens"].sum())


@torch.no_grad()  # sharded weights know no inference mode
def answer_packed(model: AlignedForConditionalGeneration, data: PackedDataset, batch_size: int) -> Evaluation:
    """Answer packed questions by greedy decoding, and compute both losses on them.

    An answer is correct if every answer token and the end token is the most likely one. Several processes share the
    batches; each runs the same number of passes, since sharded weights are gathered in every pass, but every question
    counts once.

    Returns:
        An evaluation whose table has one row per question: the columns `ANSWERS`. `given` is what greedy decoding
        gives (a later token of a longer answer follows the right ones before it), and `p_right` the probability of the
        right answer and its end among all texts.
    """
    was_training = model.training
    model.eval()
    rows, scenes, tokenizer = [], data.data.scenes, data.packer.tokenizer
    sums: list[dict[str, tuple[float, int]]] = []  # for each batch: sum of a loss, and the number that it sums over
    for indices, counts in _batches_of_rank(range(len(data)), batch_size):
        batch, device = collate(data.__getitems__(indices)), next(model.parameters()).device
        output = model(**send_to_device(batch, device))
        if not counts:
            continue
        tokens = int(batch["labels"].ne(IGNORED).sum())
        sums.append({"lm_loss": (float(output.lm_loss) * tokens, tokens)})
        if output.alignment_loss is not None:
            sums[-1]["alignment_loss"] = (float(output.alignment_loss) * len(indices), len(indices))
        is_answer = batch["labels"] != IGNORED
        expected, logits = batch["labels"][is_answer], output.logits.float()
        decoded = logits.argmax(-1).cpu()
        log_p = logits.log_softmax(-1).gather(1, expected[:, None].to(device))[:, 0].cpu()
        row_of, segment = is_answer.nonzero()[:, 0], batch["segments"][is_answer]
        for row, index in enumerate(indices):
            for number, sample in enumerate(scenes[index], start=1):
                own = (row_of == row) & (segment == number)
                given = tokenizer.decode(decoded[own], skip_special_tokens=True).strip()
                scored = (given, float(log_p[own].sum().exp()), bool((decoded[own] == expected[own]).all()))
                rows.append((index, number, *_asked(sample), *scored, sample.chance))
    model.train(was_training)
    rows = [row[2:] for row in sorted(distributed.gathered(rows))]
    assert len(rows) == sum(map(len, scenes))
    batches = distributed.gathered(sums)
    losses = {
        name: sum(part[name][0] for part in batches) / sum(part[name][1] for part in batches) for name in batches[0]
    }
    return Evaluation(pd.DataFrame(rows, columns=ANSWERS), losses)


def _asked(sample: Sample) -> tuple[str, str, str, str, str]:
    """Return the first columns of `ANSWERS`, those that do not depend on the model."""
    return sample.id, sample.image_id, sample.category, sample.question, sample.answer


def answer_questions(
    model: torch.nn.Module, mllm: MLLM, scenes: Sequence[Sequence[Sample]], batch_size: int
) -> pd.DataFrame:
    """Answer questions by their most likely option, scored as in every analysis (workbench/scoring/).

    Where the weights are sharded, all processes answer all questions together: the number of passes of a batch depends
    on its questions, and every process must run the same passes.

    Args:
        model: the module in training, of which `mllm` is a part.
        mllm: the multimodal model.
        scenes: the questions, in one list for each image.
        batch_size: images of a batch.

    Returns:
        One row per question: the columns `ANSWERS`. `given` is the most likely option, and `p_right` the probability of
        the right one among the options.
    """
    tables, together = [], distributed.is_sharded()
    with _weights_outside_blocks(model):
        for numbers, counts in _batches_of_rank(range(len(scenes)), batch_size, together=together):
            if counts:
                quiz = Quiz(mllm, [scenes[n] for n in numbers], batch_size)
                scores = quiz.logprobs()
                tables.append((numbers, _answered(quiz, scores)))
    in_order = tables if together else sorted(distributed.gathered(tables), key=lambda entry: entry[0])
    return pd.concat([table for _, table in in_order], ignore_index=True)


def _answered(quiz: Quiz, scores: Float[torch.Tensor, "question option"]) -> pd.DataFrame:
    """Return the columns `ANSWERS` of the questions of a quiz, from the log-probabilities of their options."""
    rows = []
    for sample, of_sample in zip(quiz.samples, scores, strict=True):
        right, best = sample.options.index(sample.answer), int(of_sample.argmax())
        scored = (sample.options[best], float(of_sample[right].exp()), best == right)
        rows.append((*_asked(sample), *scored, sample.chance))
    return pd.DataFrame(rows, columns=ANSWERS)


@contextmanager
def _weights_outside_blocks(model: torch.nn.Module) -> Iterator[None]:
    """Gather the weights outside the blocks while parts of an FSDP model are called directly.

    FSDP gathers them only in a forward pass of the whole model; each block gathers its own.
    """
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
    """Compute the loss on the answer tokens of each conversation.

    Conversations with images come first, so that in every pass either all processes have images or none has.

    Returns:
        One row per conversation with an answer within `max_length`: id, image_id (of all its images; of a conversation
        without images, "text" and its id), tokens (of its answers), lm_loss (nats per token), chance (the loss of a
        guess among all tokens of the vocabulary, ln |V|).
    """
    rows, conversations = [], data.conversations
    with_images = [n for n, conversation in enumerate(conversations) if conversation.loads]
    texts_alone = [n for n, conversation in enumerate(conversations) if not conversation.loads]
    batches = chain.from_iterable(_batches_of_rank(numbers, batch_size) for numbers in (with_images, texts_alone))
    for numbers, counted in batches:
        batch, labels = encode_rows(mllm, data, numbers, max_length)
        logits = model(labels=labels, visual=(), **batch.inputs).logits.float()
        is_answer = labels[:, 1:] != IGNORED
        counts = is_answer.sum(1).tolist()
        by_token = torch.nn.functional.cross_entropy(logits, labels[:, 1:][is_answer], reduction="none")
        losses = [float(of_conversation.sum()) for of_conversation in by_token.split(counts)]
        chance = math.log(logits.shape[-1])
        for number, loss, count in zip(numbers, losses, counts, strict=True):
            if count and counted:
                conversation = conversations[number]
                image_id = " ".join(conversation.image_ids) or f"text {conversation.id}"
                rows.append((number, conversation.id, image_id, count, loss / count, chance))
    return pd.DataFrame(
        [row[1:] for row in sorted(distributed.gathered(rows))],
        columns=["id", "image_id", "tokens", "lm_loss", "chance"],
    )


def summary(evaluation: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return accuracies by question type and their mean, or the loss per answer token, with 95 % intervals.

    Intervals are over images; a conversation without images counts as an image of its own.
    """
    if "correct" in evaluation:
        return pd.DataFrame(accuracy_by_type(evaluation, seed=seed))
    # The loss per token is a ratio of sums. By the delta method its spread is that of the conversations' differences
    # from it, each weighted by its share of the mean length.
    loss = float((evaluation["lm_loss"] * evaluation["tokens"]).sum() / evaluation["tokens"].sum())
    share = evaluation["tokens"] / evaluation["tokens"].mean()
    linearized = loss + share * (evaluation["lm_loss"] - loss)
    interval = mean_interval(linearized, kind="real", groups=evaluation["image_id"].tolist())
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
    """Return what the training log stores of an evaluation: each score with low, high, chance and n.

    The scores are the accuracies by question type and their mean, or the loss per answer token.
    """
    table = evaluation.table
    if "correct" not in table:
        (loss,) = summary(table, seed).to_dict("records")
        return {"val_lm_loss": loss["lm_loss"], **{f"val_lm_loss_{key}": float(loss[key]) for key in SCORE_COLUMNS}}
    metrics = {f"val_{name}": value for name, value in evaluation.losses.items()}
    for row in accuracy_by_type(table, seed=seed):
        name = "mean" if row["category"] == MEAN else row["category"]
        metrics[f"accuracy/{name}"] = row["accuracy"]
        metrics |= {f"accuracy_{key}/{name}": float(row[key]) for key in SCORE_COLUMNS}
    return metrics
