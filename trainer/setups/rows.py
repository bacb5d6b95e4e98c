"""The rows of the data that a training was started with, stored in every checkpoint.

With them a run can be resumed in its original order after some rows were repaired or left out.
"""

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
    """What the order of a training depends on, and a digest by which each row is recognized.

    Attributes:
        digests: (n,) Hash of each row's texts and image locations; it does not depend on pixels or row numbers.
        with_image: (n,) Whether the row has an image.
        lengths: (n,) Length of the row's texts in characters.
    """

    digests: np.ndarray
    with_image: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, conversations: Sequence[Conversation]) -> Rows:
        """Return the rows of `conversations`."""
        return cls(
            np.array([_digest(c) for c in conversations], np.uint64),
            np.array([bool(c.loads) for c in conversations], bool),
            np.array([c.length for c in conversations], np.int64),
        )

    def save(self, folder: Path) -> None:
        """Write the rows into a checkpoint folder."""
        save_file({"digests": self.digests, "with_image": self.with_image, "lengths": self.lengths}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Rows | None:
        """Return the rows stored in a checkpoint folder; None if it has none."""
        if not (folder / FILE).exists():
            return None
        stored = load_file(folder / FILE)
        return cls(stored["digests"], stored["with_image"], stored["lengths"])

    def match_stored(self, stored: Rows, name: str) -> tuple[list[int], int]:
        """Find for each stored row the current row that takes its place.

        If there are as many current rows as stored ones, each takes the place of the one with its number, changed or
        not, but not if it is another stored row. If there are fewer, all of them must be stored rows, in the same
        order. The place of a stored row that is gone is taken by the next current row of its kind (with or without an
        image), or else by the first of its kind.

        Args:
            name: name of the data set, for messages.

        Returns:
            The number of the current row for each stored one, and how many stored rows are gone.

        Raises:
            RunError: there are new rows, rows in another order, or no row of the kind of one that is gone.
        """
        n_stored, n_current = len(stored.digests), len(self.digests)
        if n_stored == n_current:
            moved = (self.digests != stored.digests) & np.isin(self.digests, stored.digests)
            if moved.any():
                raise RunError(
                    f"row {int(moved.argmax()) + 1} of the {n_current} conversations now in {name} is another one of"
                    " those that the run was started with: expected each in its place. Where rows are drawn at random,"
                    " leave one out with drop=ROW, and do not delete it; under a weight that is no whole number, repair"
                    " it"
                )
            return list(range(n_stored)), 0
        numbers, current = [], 0
        for digest in stored.digests.tolist():
            same = current < n_current and int(self.digests[current]) == digest
            numbers.append(current if same else -1)
            current += same
        if current < n_current:
            raise RunError(
                f"the run was started with {n_stored} conversations, and row {current + 1} of the {n_current} now in"
                f" {name} is not the next of them: expected the same ones in the same order, some repaired or some left"
                " out"
            )
        gone = [row for row, number in enumerate(numbers) if number < 0]
        for row in gone:
            same_kind = self.with_image == stored.with_image[row]
            if not same_kind.any():
                which = "with" if stored.with_image[row] else "without"
                raise RunError(
                    f"{name} has no conversation {which} an image any more: expected one to take the place of row"
                    f" {row + 1}, which is left out"
                )
            next_number = next((number for number in numbers[row:] if number >= 0), 0)
            following = np.flatnonzero(same_kind[next_number:])
            numbers[row] = int(following[0]) + next_number if len(following) else int(np.flatnonzero(same_kind)[0])
        return numbers, len(gone)


def _digest(conversation: Conversation) -> int:
    locations = [load.place if isinstance(load, StoredImage) else "" for load in conversation.loads]
    return int.from_bytes(blake2b(repr((conversation.turns, locations)).encode(), digest_size=8).digest(), "big")
