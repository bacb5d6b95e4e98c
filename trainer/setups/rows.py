"""The rows that a training was started with, which every checkpoint keeps: so a run goes on in its order after some of
them were repaired or left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from workbench.data.base import Conversation
from workbench.data.images import StoredImage
from workbench.errors import RunError

FILE = "rows.safetensors"  # in every checkpoint of a training on conversations


@dataclass(frozen=True)
class Rows:
    """What the order of a training depends on, and by what each row is known again.

    Attributes:
        digests: (n,) of texts and places of images, not of pixels and not of the row's number.
        with_image: (n,) whether it has one.
        lengths: (n,) characters.
    """

    digests: np.ndarray
    with_image: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, conversations: Sequence[Conversation]) -> Rows:
        """The rows of conversations."""
        return cls(
            np.array([_digest(c) for c in conversations], np.uint64),
            np.array([bool(c.loads) for c in conversations], bool),
            np.array([c.length for c in conversations], np.int64),
        )

    def save(self, folder: Path) -> None:
        """Write them into a checkpoint."""
        save_file({"digests": self.digests, "with_image": self.with_image, "lengths": self.lengths}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Rows | None:
        """Those of a checkpoint; None where it has none."""
        if not (folder / FILE).exists():
            return None
        stored = load_file(folder / FILE)
        return cls(stored["digests"], stored["with_image"], stored["lengths"])

    def in_place_of(self, stored: Rows, name: str) -> tuple[list[int], int]:
        """For each stored row the number of the one of these that takes its place, and how many stored rows are left
        out.

        Rows of the same number may have changed. Fewer must be stored ones, in their order; in place of one that is not
        there comes the next one of its kind.

        Raises:
            RunError: there are more rows, others among them, or none of the kind of one that is left out.
        """
        old, new = len(stored.digests), len(self.digests)
        if old == new:
            return list(range(old)), 0
        numbers, at = [], 0
        for digest in stored.digests.tolist():
            same = at < new and int(self.digests[at]) == digest
            numbers.append(at if same else -1)
            at += same
        if at < new:
            reason = f"and row {at + 1} of what is there now is none of them in their order"
            raise RunError(
                f"the run was started with {old} conversations, {reason} ({new} of {name}): expected the same ones,"
                " some repaired or some left out"
            )
        left_out = [place for place, number in enumerate(numbers) if number < 0]
        for place in left_out:
            kind = self.with_image == stored.with_image[place]
            if not kind.any():
                what = "with" if stored.with_image[place] else "without"
                raise RunError(
                    f"no conversation {what} an image is left of {name}: expected one in place of row {place + 1},"
                    " which is left out"
                )
            behind = next((number for number in numbers[place:] if number >= 0), 0)
            following = np.flatnonzero(kind[behind:])
            numbers[place] = int(following[0]) + behind if len(following) else int(np.flatnonzero(kind)[0])
        return numbers, len(left_out)


def _digest(conversation: Conversation) -> int:
    places = [load.place if isinstance(load, StoredImage) else "" for load in conversation.loads]
    return int.from_bytes(blake2b(repr((conversation.turns, places)).encode(), digest_size=8).digest(), "big")
