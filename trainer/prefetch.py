"""Batches that are prepared in a thread while the GPU works on the ones before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any


class Prefetched(Iterator[Any]):
    """The items of an iterator, in its order; the next `ahead` of them are always being prepared in one thread.

    An error of the iterator is raised by the call that asks for its item. The first item is prepared by the caller
    itself: there accelerate synchronizes the processes, which must not happen beside the training.
    """

    def __init__(self, source: Iterator[Any], ahead: int) -> None:
        self.source, self.ahead = source, ahead
        self._items: deque[Future[Any]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def __next__(self) -> Any:
        first = next(self.source) if not self._items else None
        while len(self._items) < self.ahead + (first is None):
            self._items.append(self._thread.submit(next, self.source))
        return self._items.popleft().result() if first is None else first

    def wait(self) -> None:
        """Wait until the thread has nothing to do, since tokenizers cannot be used by two threads at a time."""
        wait_for(self._items)
