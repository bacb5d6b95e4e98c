"""Data sets of conversations, and mixtures of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import cast

import numpy as np

from workbench.data.base import Conversation, Dataset, Sample, content_hash
from workbench.errors import DataError


class ConversationDataset(Dataset):
    """A data set of conversations.

    Args:
        name: the spec it was loaded from.
        conversations: all conversations.
        fingerprint: hash of everything that determines the conversations, or a function that computes it.
        samples: one question of each conversation with exactly one image, in their order; by default the first, since
            later turns depend on earlier ones.
        left_out: see `Dataset`.
    """

    def __init__(
        self,
        name: str,
        conversations: Sequence[Conversation],
        fingerprint: str | Callable[[], str],
        samples: Sequence[Sample] | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        if not conversations:
            raise DataError(f"data set '{name}' has no conversations")
        self._conversations = list(conversations)
        if samples is None:
            samples = [
                Sample(c.id, (c.image_ids or (c.id,))[0], c.loads[0], *c.turns[0])
                for c in conversations
                if len(c.loads) == 1
            ]
        self.name, self.samples, self._fingerprint = name, list(samples), fingerprint
        self._words, self.left_out, self.origin = (), tuple(left_out), ""

    @property
    def conversations(self) -> list[Conversation]:  # type: ignore[override]
        return self._conversations

    def only(self, ids: Collection[str], limit: int | None = None) -> ConversationDataset:
        """Return the questions with these ids and their conversations, as `Dataset.only`."""
        chosen = cast(ConversationDataset, super().only(ids, limit))
        kept = {sample.id for sample in chosen.samples}
        about_one_image = (conversation for conversation in self._conversations if len(conversation.loads) == 1)
        questions = zip(about_one_image, self.samples, strict=True)
        chosen._conversations = [conversation for conversation, sample in questions if sample.id in kept]
        return chosen


def mixed(parts: Sequence[Dataset], weights: Sequence[float], seed: int = 0) -> ConversationDataset:
    """Mix the conversations of several data sets into one epoch.

    Args:
        parts: the data sets.
        weights: how often each comes; 2.5 is the whole data set twice, and a random half of it once more.
        seed: of the random selection.

    Raises:
        DataError: another number of weights, one that is not above 0, or one so small that it leaves no conversation.
    """
    if len(weights) != len(parts) or not all(weight > 0 for weight in weights):
        raise DataError(
            f"weights are {', '.join(f'{w:g}' for w in weights)}: expected {len(parts)} numbers above 0, one for each"
            " data set"
        )
    chosen: list[Conversation] = []
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        conversations, whole = part.conversations, int(weight)
        if not (rest := round((weight - whole) * len(conversations))) and not whole:
            raise DataError(
                f"weight {weight:g} of {part.name} leaves none of its {len(conversations)} conversations: expected at"
                f" least {1 / len(conversations):.2g}"
            )
        drawn = np.random.default_rng([seed, number]).choice(len(conversations), rest, replace=False)
        chosen += [*conversations * whole, *(conversations[i] for i in np.sort(drawn))]

    def fingerprint() -> str:
        return content_hash(
            "mixed", seed, *((part.fingerprint, float(weight)) for part, weight in zip(parts, weights, strict=True))
        )

    left_out = [sentence for part in parts for sentence in part.left_out]
    return ConversationDataset(" + ".join(part.name for part in parts), chosen, fingerprint, left_out=left_out)
