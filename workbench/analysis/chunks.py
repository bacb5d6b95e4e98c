"""The loop of an analysis: its items in chunks, each stored as soon as it is done.

A chunk is known by its content: the analysis and its options but for `limit`, the model, the libraries, and its own
items. So a killed analysis goes on after its last whole chunk, a larger `--limit` takes over the chunks of a smaller
one where they have the same items, and processes that are asked the same question at once, ranks of one launch or two
launches, share the chunks through a common folder. A chunk is computed whole by one process, in batches that depend on
nothing but the chunk, so that the number of processes changes no bit of the result.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from workbench.data.base import Dataset, Object, Sample, content_hash
from workbench.data.images import StoredImage
from workbench.errors import one_line
from workbench.files import atomic_folder, locked
from workbench.ranks import Ranks

log = logging.getLogger(__name__)
T = TypeVar("T")
SIZE = 32  # items of a chunk, or the next multiple of the batch size
PAUSE = 0.2  # seconds between looks at chunks that other processes compute
PART_FILE, TENSOR_FILE = "part.json", "tensors.safetensors"


@dataclass(frozen=True)
class Chunk(Generic[T]):
    """Some of the items of a map, in order.

    Attributes:
        start: number of the first among all items.
        batch_size: items in one forward pass, at most.
    """

    items: Sequence[T]
    start: int
    batch_size: int

    def __len__(self) -> int:
        return len(self.items)

    def batches(self) -> Iterator[tuple[int, Sequence[T]]]:
        """(number of its first item among all, the items) of each batch."""
        for at in range(0, len(self.items), self.batch_size):
            yield self.start + at, self.items[at : at + self.batch_size]


@dataclass(frozen=True)
class Part:
    """What a chunk gives: tables, tensors, and plain values (as JSON holds them)."""

    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


class RunStoredError(Exception):
    """Another rank has stored the run that this one was computing for."""


class Chunks:
    """Where the chunks of one question are stored.

    Args:
        folder: common to all processes; None keeps parts in memory alone.
        question: all that the numbers of a chunk depend on besides its items.
        stored: whether the run itself has been stored meanwhile.
    """

    def __init__(
        self,
        folder: Path | None = None,
        question: object = (),
        ranks: Ranks | None = None,
        stored: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder, self.question, self.ranks, self._stored = folder, question, ranks or Ranks(), stored
        self._temporary: set[Path] = set()

    def map(
        self,
        what: str,
        chunks: Sequence[Chunk[T]],
        fn: Callable[[Chunk[T]], Part],
        depends: object,
        keep: bool,
        bar: str,
    ) -> list[Part]:
        """`fn` of every chunk, in order; see `Context.map`."""
        progress = tqdm(
            total=len(chunks), desc=bar, unit="chunk", delay=2, file=sys.stderr, disable=not self.ranks.main
        )
        if self.folder is None:
            with progress:
                return [self._in_memory(chunk, fn, progress) for chunk in chunks]
        folders = [self._folder(self.folder, what, chunk, depends) for chunk in chunks]
        self._temporary |= set() if keep else set(folders)
        waiting = self.ranks.rotated(range(len(chunks)))
        with progress:
            while waiting:
                busy = []  # what other processes are computing
                for n in waiting:
                    if self._done(folders[n], chunks[n], fn):
                        progress.update()
                    else:
                        busy.append(n)
                if len(busy) == len(waiting):
                    self._stop_if_stored()
                    time.sleep(PAUSE)
                waiting = busy
        return [self._stored_part(folder, chunk, fn) for folder, chunk in zip(folders, chunks, strict=True)]

    @staticmethod
    def _in_memory(chunk: Chunk[T], fn: Callable[[Chunk[T]], Part], progress: Any) -> Part:
        part = fn(chunk)
        progress.update()
        return part

    def clean(self) -> None:
        """Remove the chunks that were not to be kept; a run that is stored needs none."""
        for folder in self._temporary:
            shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, root: Path, what: str, chunk: Chunk[Any], depends: object) -> Path:
        key = content_hash(self.question, what, chunk.start, [identity(item) for item in chunk.items], depends)
        return root / f"{what.replace(' ', '_')}-{chunk.start}-{key}"

    def _done(self, folder: Path, chunk: Chunk[T], fn: Callable[[Chunk[T]], Part]) -> bool:
        """Whether a chunk is stored, by this call if no other process is at it."""
        if (folder / PART_FILE).exists():
            return True
        with locked(folder.with_name(f".{folder.name}.lock")) as held:
            if not held:
                return False
            if not (folder / PART_FILE).exists():
                self._stop_if_stored()
                _save(fn(chunk), folder)
            return True

    def _stored_part(self, folder: Path, chunk: Chunk[T], fn: Callable[[Chunk[T]], Part]) -> Part:
        """A stored chunk; one that cannot be read is computed again."""
        try:
            return _load(folder)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            self._stop_if_stored()
            log.warning("chunk %s is damaged (%s) and is computed again", folder, one_line(error, 120))
            shutil.rmtree(folder, ignore_errors=True)
            while not self._done(folder, chunk, fn):
                time.sleep(PAUSE)
            return _load(folder)

    def _stop_if_stored(self) -> None:
        if not self.ranks.main and self._stored():
            raise RunStoredError


def chunked(items: Sequence[T], batch_size: int, size: int | None = None) -> list[Chunk[T]]:
    """Items in chunks of `size`, by default the least multiple of the batch size from SIZE on."""
    size = size or -(-SIZE // batch_size) * batch_size
    return [Chunk(items[start : start + size], start, batch_size) for start in range(0, len(items), size)]


def identity(item: object) -> object:
    """What an item is known by: all of a sample but its image, which its `image_id` or the hash of its pixels stands
    for.

    Raises:
        TypeError: an item that is no sample, plain value, dataclass or sequence of these.
    """
    if item is None or isinstance(item, str | int | float | bytes):
        return item
    if isinstance(item, Path):
        return str(item)
    if isinstance(item, Sample):
        pixels = item.load.pixels if isinstance(item.load, StoredImage) else None
        return (
            item.id,
            item.image_id,
            pixels,
            item.question,
            item.answer,
            item.options,
            item.category,
            identity(item.objects),
            item.text_only,
        )
    if isinstance(item, Object):
        return item.name, item.box  # its mask is drawn from what the data set's origin stands for
    if isinstance(item, Mapping):
        return [(key, identity(value)) for key, value in item.items()]
    if isinstance(item, Sequence):
        return [identity(one) for one in item]
    if dataclasses.is_dataclass(item):
        return [identity(getattr(item, own.name)) for own in dataclasses.fields(item)]
    raise TypeError(
        f"an item of a map is a {type(item).__name__}: expected samples, plain values, or dataclasses and sequences of"
        " these"
    )


def origin_of(data: Dataset) -> object:
    """What the samples of a data set depend on besides themselves."""
    return data.origin or data.fingerprint


def joined(parts: Sequence[Part], name: str) -> pd.DataFrame:
    """A table of all parts, one below another."""
    return pd.concat([part.tables[name] for part in parts], ignore_index=True)


def stacked(parts: Sequence[Part], name: str) -> Tensor:
    """A tensor of all parts, one after another along its first axis; parts without it, which had nothing to give, are
    left out."""
    return torch.cat([part.tensors[name] for part in parts if name in part.tensors])


def _save(part: Part, folder: Path) -> None:
    with atomic_folder(folder) as partial:
        for name, table in part.tables.items():
            table.to_parquet(partial / f"{name}.parquet", index=False)
        if part.tensors:
            save_file({name: value.contiguous() for name, value in part.tensors.items()}, partial / TENSOR_FILE)
        (partial / PART_FILE).write_text(
            json.dumps({"tables": sorted(part.tables), "tensors": sorted(part.tensors), "record": part.record})
        )


def _load(folder: Path) -> Part:
    record = json.loads((folder / PART_FILE).read_text())
    tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in record["tables"]}
    return Part(tables, load_file(folder / TENSOR_FILE) if record["tensors"] else {}, record["record"])
