"""The loop of an analysis: its items are processed in chunks, and each chunk is stored as soon as it is done.

The name of a stored chunk has a hash of everything that its result depends on: the analysis and its options (except
`limit`), the model, the libraries, and the items of the chunk. Therefore a killed analysis continues after its last
complete chunk, and a larger `--limit` reuses the chunks of a smaller one if they have the same items. Processes that
compute the same run at the same time, as ranks of one launch or in two launches, share the chunks through a common
folder. A chunk is computed by one process, in batches that depend on the chunk only, so that the result does not depend
on the number of processes, to the last bit.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
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

from workbench.data.base import Dataset, Object, Sample, content_hash
from workbench.data.images import StoredImage
from workbench.errors import one_line
from workbench.files import atomic_folder, locked
from workbench.progress import progress_bar
from workbench.ranks import Ranks

log = logging.getLogger(__name__)
T = TypeVar("T")
SIZE = 32  # least number of items in a chunk, rounded up to a multiple of the batch size
PAUSE = 0.2  # seconds between checks whether other processes have finished a chunk
PART_FILE, TENSOR_FILE = "part.json", "tensors.safetensors"


@dataclass(frozen=True)
class Chunk(Generic[T]):
    """Consecutive items of a map.

    Attributes:
        start: position of the first one among all items.
        batch_size: largest number of items in one forward pass.
    """

    items: Sequence[T]
    start: int
    batch_size: int

    def __len__(self) -> int:
        return len(self.items)

    def batches(self) -> Iterator[tuple[int, Sequence[T]]]:
        """Yield (position of its first item among all items, its items) of each batch."""
        for at in range(0, len(self.items), self.batch_size):
            yield self.start + at, self.items[at : at + self.batch_size]


@dataclass(frozen=True)
class Part:
    """The result of one chunk: tables, tensors, and plain values that JSON can store."""

    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


class RunStoredError(Exception):
    """Another rank has already stored the run that this rank was computing."""


class Chunks:
    """Compute, store and load the chunks of one run.

    Args:
        folder: folder of the chunks, common to all processes; None does not store them.
        question: everything that the result of a chunk depends on besides its items.
        ranks: the rank of this process.
        stored: returns whether the run itself has been stored meanwhile.
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
        """Return the result of `fn` for every chunk, in order; see `Context.map`.

        Args:
            bar: text before the progress bar.
        """
        progress = progress_bar(bar, total=len(chunks), unit="chunk", disable=not self.ranks.main)
        if self.folder is None:
            with progress:
                return [self._in_memory(chunk, fn, progress) for chunk in chunks]
        folders = [self._folder(self.folder, what, chunk, depends) for chunk in chunks]
        self._temporary |= set() if keep else set(folders)
        waiting = self.ranks.rotated(range(len(chunks)))
        with progress:
            while waiting:
                busy = []  # numbers of chunks that other processes are computing
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
        """Remove the chunks of maps with keep=False; call it when the run is stored."""
        for folder in self._temporary:
            shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, root: Path, what: str, chunk: Chunk[Any], depends: object) -> Path:
        key = content_hash(self.question, what, chunk.start, [identity(item) for item in chunk.items], depends)
        return root / f"{what.replace(' ', '_')}-{chunk.start}-{key}"

    def _done(self, folder: Path, chunk: Chunk[T], fn: Callable[[Chunk[T]], Part]) -> bool:
        """Return whether a chunk is stored; compute and store it first, unless another process is computing it."""
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
        """Load a stored chunk; if it cannot be read, compute it again."""
        try:
            return _load(folder)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            self._stop_if_stored()
            log.warning("chunk %s is damaged (%s) and will be computed again", folder, one_line(error, 120))
            shutil.rmtree(folder, ignore_errors=True)
            while not self._done(folder, chunk, fn):
                time.sleep(PAUSE)
            return _load(folder)

    def _stop_if_stored(self) -> None:
        if not self.ranks.main and self._stored():
            raise RunStoredError


def chunked(items: Sequence[T], batch_size: int, size: int | None = None) -> list[Chunk[T]]:
    """Split items into chunks of `size`, by default the least multiple of the batch size that is at least SIZE."""
    size = size or -(-SIZE // batch_size) * batch_size
    return [Chunk(items[start : start + size], start, batch_size) for start in range(0, len(items), size)]


def identity(item: object) -> object:
    """Return plain values that identify an item of a map, for the key of its chunk.

    Of a sample they are all fields except the image, which its `image_id` or the hash of its pixels identifies.

    Raises:
        TypeError: the item is not a sample, a plain value, or a dataclass, mapping or sequence of these.
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
            *((item.pair, item.source) if item.pair or item.source else ()),
            *((identity(item.asked),) if item.asked else ()),
        )
    if isinstance(item, Object):
        return item.name, item.box  # its mask follows from the origin of the data set, which is in the key too
    if isinstance(item, Mapping):
        return [(key, identity(value)) for key, value in item.items()]
    if isinstance(item, Sequence):
        return [identity(element) for element in item]
    if dataclasses.is_dataclass(item):
        return [identity(getattr(item, attribute.name)) for attribute in dataclasses.fields(item)]
    raise TypeError(
        f"an item of a map is a {type(item).__name__}: expected samples, plain values, or dataclasses and sequences of"
        " these"
    )


def origin_of(data: Dataset) -> object:
    """Return what the samples of a data set depend on besides their own fields."""
    return data.origin or data.fingerprint


def joined(parts: Sequence[Part], name: str) -> pd.DataFrame:
    """Return the rows of the table `name` of all parts."""
    return pd.concat([part.tables[name] for part in parts], ignore_index=True)


def stacked(parts: Sequence[Part], name: str) -> Tensor:
    """Concatenate the tensor `name` of all parts along its first axis; parts without it are skipped."""
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
