"""Conversations as training items, their batches, and the order in which they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from trainer.setups.rows import Rows
from trainer.targets.vfm_targets import Targets
from workbench.data import Dataset
from workbench.data.base import Conversation
from workbench.data.images import shown
from workbench.errors import DataError, WorkbenchError
from workbench.mllm import MLLM, Batch
from workbench.mllm.conversation import encode_conversations

MEGABATCH = 50  # batches whose conversations are sorted by length together, as in transformers' own grouping


class GroupedSampler(Sampler[int]):
    """The order of all conversations over a whole training: each epoch another one, all of it known from the seed, so
    that a resumed run has the same.

    Consecutive `group` conversations all have images, or none, and are of about the same length. What an epoch leaves
    over of each kind, less than a group, is the first of that kind in the next one, where it may stand in one group
    twice; so of one kind none is ever two times ahead of another.

    Args:
        group: conversations of one optimiser step.
        total: conversations of the whole training.
        grouped: False for a plain random order.
    """

    def __init__(self, rows: Rows, group: int, total: int, seed: int, *, grouped: bool = True) -> None:
        self._with_image, self._lengths = torch.from_numpy(rows.with_image), torch.from_numpy(rows.lengths)
        self._group, self._total, self._seed, self._grouped = group, total, seed, grouped

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        given, epoch, left = 0, 0, torch.empty(0, dtype=torch.long)
        while given < self._total:
            own = torch.Generator().manual_seed(int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0]))
            order = torch.cat([left, torch.randperm(len(self._lengths), generator=own)])
            batches, left = self._groups(order, own) if self._grouped else (list(order.split(self._group)), order[:0])
            for batch in batches:
                yield from batch[: self._total - given].tolist()
                given += len(batch[: self._total - given])
            epoch += 1

    def left_out(self) -> str | None:
        """One sentence about a kind of conversations that comes less than half as often as it is in the data: what is
        left over of few fills no group."""
        seen = self._with_image[torch.tensor(list(self))].float().mean()
        for kind, there, own in (
            ("with", self._with_image.float().mean(), seen),
            ("without", 1 - self._with_image.float().mean(), 1 - seen),
        ):
            if own < there / 2:
                count = int((self._with_image == (kind == "with")).sum())
                shares = f"{float(there):.3g} of the data and {float(own):.3g} of what is trained on"
                why = f"since they rarely fill a step of {self._group}; see optim.global_batch and data.group"
                return f"the {count} conversations {kind} an image are {shares}, {why}"
        return None

    def _groups(self, order: Tensor, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
        """Whole groups of one kind each, in random order, and what is left of both kinds."""
        groups: list[Tensor] = []
        left: list[Tensor] = []
        for kind in (True, False):
            own = order[self._with_image[order] == kind]
            whole = len(own) - len(own) % self._group
            left.append(own[whole:])
            for mega in own[:whole].split(MEGABATCH * self._group):
                groups += mega[self._lengths[mega].argsort(stable=True)].split(self._group)
        groups = [group for group in groups if len(group)]
        return [groups[i] for i in torch.randperm(len(groups), generator=generator)], torch.cat(left)


class ConversationSet(torch.utils.data.Dataset):
    """Conversations by number; the collator makes batches of them.

    Args:
        data: what is read.
        parts: the data sets that it is mixed from, by which rows are named.
        stored: the rows that a run which goes on with repaired data was started with; its order stays, whatever became
            of some of them.

    Attributes:
        rows: those that the order is of.
        said: what looking through them before the first step found (trainer/preflight.py).

    Raises:
        RunError: the data are not the stored rows, some of them repaired or some left out.
    """

    def __init__(self, data: Dataset, parts: Sequence[Dataset] = (), stored: Rows | None = None) -> None:
        self.data, self.conversations, self.rows = data, data.conversations, Rows.of(data.conversations)
        self._names = {id(c): part.name for part in parts for c in part.conversations}
        self.said: list[str] = []
        self.dropped = 0
        if stored is not None:
            numbers, self.dropped = self.rows.in_place_of(stored, data.name)
            self.conversations, self.rows = [data.conversations[n] for n in numbers], stored

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> int:
        return index

    def where(self, conversation: Conversation) -> str:
        """A conversation in messages, by its row and its data set."""
        return f"conversation {conversation.id} of {shown(self._names.get(id(conversation), self.data.name))}"

    def sentences(self) -> list[str]:
        """What is left out of the data, and what is cut."""
        return [*(f"{shown(self.data.name)}: {sentence}" for sentence in self.data.left_out), *self.said]


def encoded(
    mllm: MLLM, data: ConversationSet, numbers: Sequence[int], max_length: int | None, *, device: str | None = None
) -> tuple[Batch, Tensor]:
    """Some conversations as a batch, and its labels; on the model's device where no other is asked for.

    Raises:
        DataError: names the row that cannot be used (all was looked through before, so its image is broken behind its
            header, or was replaced) and the remedy.
    """
    own = [data.conversations[number] for number in numbers]
    try:
        return encode_conversations(
            mllm, [c.images for c in own], [c.turns for c in own], max_length=max_length, device=device
        )
    except WorkbenchError as error:
        broken, why = own[0], error
        for conversation in own if len(own) > 1 else ():
            try:
                encode_conversations(mllm, [conversation.images], [conversation.turns], max_length=max_length)
            except WorkbenchError as alone:
                broken, why = conversation, alone
                break
        remedy = "repair it, or leave it out (drop=ROW in the spec), and go on with --resume --repaired"
        raise DataError(f"{data.where(broken)}: {why}; {remedy}") from error


class Collator:
    """Numbers of conversations -> what the model's forward takes.

    Args:
        targets: (numbers, images, visual tokens) -> features by VFM, [conversation][image or tile]; None where nothing
            comes with the batch.
        count_tiles: what one batch weighs among those of a step: its images and tiles, or its visual tokens.
    """

    def __init__(
        self,
        mllm: MLLM,
        data: ConversationSet,
        max_length: int | None,
        targets: Targets | None = None,
        *,
        count_tiles: bool = False,
    ) -> None:
        self._mllm, self._data, self.max_length, self._targets, self._count_tiles = (
            mllm,
            data,
            max_length,
            targets,
            count_tiles,
        )

    def __call__(self, numbers: list[int]) -> dict[str, Any]:
        """Everything on the CPU: the Trainer moves it."""
        batch, labels = encoded(self._mllm, self._data, numbers, self.max_length, device="cpu")
        visual = self._mllm.visual_tokens(batch)
        inputs: dict[str, Any] = dict(batch.inputs)
        parts = [part for sample in visual for part in sample]
        inputs |= {
            "labels": labels,
            "visual": visual,
            "aligned": len(parts) if self._count_tiles else sum(len(part.index) for part in parts),
        }
        if self._targets is not None:
            inputs["targets"] = self._targets(numbers, batch.images, visual)
        return inputs
