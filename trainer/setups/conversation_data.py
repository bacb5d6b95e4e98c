"""Conversations as training data: the items, their batches, and the order in which they are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from trainer.aligned_model import answer_positions
from trainer.masking import loss_tokens
from trainer.setups.rows import Rows
from trainer.targets.vfm_targets import Targets
from workbench.capture.hidden_states import encoder_rows
from workbench.data import Dataset
from workbench.data.base import Conversation
from workbench.data.images import shown
from workbench.errors import DataError, WorkbenchError
from workbench.mllm import MLLM, Batch, VisualTokens
from workbench.mllm.conversation import encode_conversations

MEGABATCH = 50  # groups that are sorted by length together, as in transformers' own grouping by length


class GroupedSampler(Sampler[int]):
    """The order of the conversations over a whole training, which the seed alone decides, also for a resumed run.

    Each epoch has another order. The conversations of a group (one optimizer step) either all have images or none does,
    and they are of about the same length. What is left over of a kind at the end of an epoch, less than a group, is
    carried over to the next epoch, where a conversation may then occur twice in one group. So at the end of an epoch
    two conversations of one kind never differ by more than one in how often they were trained on.

    Args:
        rows: the training rows.
        group: conversations of one optimizer step, over all ranks.
        total: conversations of the whole training, each counted as often as it comes.
        grouped: False for a plain random order.
    """

    def __init__(self, rows: Rows, group: int, total: int, seed: int, *, grouped: bool = True) -> None:
        self._with_image, self._lengths = torch.from_numpy(rows.with_image), torch.from_numpy(rows.lengths)
        self._group, self._total, self._seed, self._grouped = group, total, seed, grouped

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        yielded, epoch, left_over = 0, 0, torch.empty(0, dtype=torch.long)
        while yielded < self._total:
            epoch_seed = int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0])
            generator = torch.Generator().manual_seed(epoch_seed)
            order = torch.cat([left_over, torch.randperm(len(self._lengths), generator=generator)])
            if self._grouped:
                groups, left_over = self._groups(order, generator)
            else:
                groups, left_over = list(order.split(self._group)), order[:0]
            for group in groups:
                yield from group[: self._total - yielded].tolist()
                yielded += len(group[: self._total - yielded])
            epoch += 1

    def rare_kind(self) -> str | None:
        """Return a warning if a kind of conversations comes less than half as often as its share of the data.

        This happens to a kind with few conversations: those left over at the end of an epoch do not fill a group.
        """
        data_share = self._with_image.float().mean()
        trained_share = self._with_image[torch.tensor(list(self))].float().mean()
        for kind, in_data, in_training in (
            ("with", data_share, trained_share),
            ("without", 1 - data_share, 1 - trained_share),
        ):
            if in_training < in_data / 2:
                count = int((self._with_image == (kind == "with")).sum())
                shares = f"{float(in_data):.3g} of the data and {float(in_training):.3g} of what is trained on"
                why = f"since they rarely fill a step of {self._group}; see optim.global_batch and data.group"
                return f"the {count} conversations {kind} an image are {shares}, {why}"
        return None

    def _groups(self, order: Tensor, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
        """Return full groups of one kind each, in random order, and what is left over of both kinds."""
        groups: list[Tensor] = []
        left_over: list[Tensor] = []
        for with_image in (True, False):
            same_kind = order[self._with_image[order] == with_image]
            full = len(same_kind) - len(same_kind) % self._group
            left_over.append(same_kind[full:])
            for megabatch in same_kind[:full].split(MEGABATCH * self._group):
                groups += megabatch[self._lengths[megabatch].argsort(stable=True)].split(self._group)
        groups = [group for group in groups if len(group)]
        return [groups[i] for i in torch.randperm(len(groups), generator=generator)], torch.cat(left_over)


class ConversationSet(torch.utils.data.Dataset):
    """The conversations of a data set as training items; an item is only a number, of which `Collator` makes batches.

    Args:
        data: the data set.
        parts: the data sets that `data` is mixed from, whose names are used in messages.
        stored: for a resumed run, the rows that it was started with. The order of the training stays that of these
            rows; conversations that are gone are replaced as `Rows.match_stored` says.

    Attributes:
        rows: the rows that the order of the training depends on.
        preflight_warnings: what `trainer.preflight` warned of before the first step.
        dropped: how many of the stored rows are gone.

    Raises:
        RunError: the data are not the stored rows with some repaired or left out.
    """

    def __init__(self, data: Dataset, parts: Sequence[Dataset] = (), stored: Rows | None = None) -> None:
        self.data, self.conversations, self.rows = data, data.conversations, Rows.of(data.conversations)
        self._names = {id(c): part.name for part in parts for c in part.conversations}
        self.preflight_warnings: list[str] = []
        self.dropped = 0
        if stored is not None:
            numbers, self.dropped = self.rows.match_stored(stored, data.name)
            self.conversations, self.rows = [data.conversations[n] for n in numbers], stored

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> int:
        return index

    def where(self, conversation: Conversation) -> str:
        """Return the name of a conversation in messages: its row and its data set."""
        return f"conversation {conversation.id} of {shown(self._names.get(id(conversation), self.data.name))}"

    def unusable(self, conversation: Conversation, why: WorkbenchError) -> DataError:
        """Return the error about a conversation that stops a training, with what to do."""
        remedy = "repair it, or leave it out (drop=ROW in the spec), and resume with --resume --repaired"
        return DataError(f"{self.where(conversation)}: {why}; {remedy}")

    def warnings(self) -> list[str]:
        """Return sentences about what is left out of the data and what is cut."""
        left_out = [f"{shown(self.data.name)}: {sentence}" for sentence in self.data.left_out]
        return [*left_out, *self.preflight_warnings]


def encode_rows(
    mllm: MLLM, data: ConversationSet, numbers: Sequence[int], max_length: int | None, *, device: str | None = None
) -> tuple[Batch, Tensor]:
    """Encode the conversations with these numbers; return the batch and its labels.

    Args:
        device: where the tensors are put; by default the model's device.

    Raises:
        DataError: a conversation cannot be encoded; the message names its row and what to do. All conversations were
            checked before the first step (by their texts and image headers), so either an image is broken after its
            header, or the data have changed since.
    """
    conversations = [data.conversations[number] for number in numbers]

    def encoded(rows: Sequence[Conversation]) -> tuple[Batch, Tensor]:
        images = [row.images for row in rows]  # reads the image files
        return encode_conversations(mllm, images, [row.turns for row in rows], max_length=max_length, device=device)

    try:
        return encoded(conversations)
    except WorkbenchError as error:
        broken, why = conversations[0], error
        for conversation in conversations if len(conversations) > 1 else ():
            try:
                encoded([conversation])
            except WorkbenchError as alone:
                broken, why = conversation, alone
                break
        raise data.unusable(broken, why) from error


class Collator:
    """Makes a batch, as the model's forward takes it, from the numbers of conversations.

    Args:
        targets: returns the alignment targets of a batch; None if the batch has none.
        count_tiles: whether the weight of a batch among those of an optimizer step, its entry `aligned`, is the number
            of its images and tiles; otherwise it is the number of its visual tokens that the loss is on.
        mask: share of the visual tokens that are hidden, and that alone the loss is on; 0 for none.
        encoder: whether the targets are the features of the model's own vision encoder.
    """

    def __init__(
        self,
        mllm: MLLM,
        data: ConversationSet,
        max_length: int | None,
        targets: Targets | None = None,
        *,
        count_tiles: bool = False,
        mask: float = 0.0,
        encoder: bool = False,
    ) -> None:
        self._mllm, self._data, self.max_length = mllm, data, max_length
        self._targets, self._count_tiles, self._mask, self._encoder = targets, count_tiles, mask, encoder

    def __call__(self, numbers: list[int]) -> dict[str, Any]:
        """Return the batch, on the CPU; the Trainer moves it to the model's device."""
        batch, labels = encode_rows(self._mllm, self._data, numbers, self.max_length, device="cpu")
        visual = self._mllm.visual_tokens(batch)
        for number, sample in zip(numbers, visual, strict=True):
            self._check(number, sample)
        inputs: dict[str, Any] = dict(batch.inputs)
        tiles = [tile for sample in visual for tile in sample]
        aligned = len(tiles) if self._count_tiles else sum(loss_tokens(len(tile.index), self._mask) for tile in tiles)
        inputs |= {"labels": labels, "visual": visual, "aligned": aligned}
        inputs["answers"] = answer_positions(labels)
        if self._targets is not None:
            inputs["targets"] = self._targets(numbers, batch.images, visual)
        return inputs

    def _check(self, number: int, tiles: list[VisualTokens]) -> None:
        """Check that the alignment loss can use the images of a conversation.

        Raises:
            DataError: one has too few tokens for the mask, or tokens without features of their own; names the row.
        """
        try:
            for tile in tiles:
                loss_tokens(len(tile.index), self._mask)
            if self._encoder:
                encoder_rows(self._mllm, [tiles])
        except WorkbenchError as error:
            raise self._data.unusable(self._data.conversations[number], error) from error
