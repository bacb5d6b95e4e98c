"""Image files on disk: which exist, and hashes of their bytes, which are stored for files that do not change."""

from __future__ import annotations

import os
import posixpath
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b, file_digest
from pathlib import Path
from unicodedata import normalize
from urllib.parse import unquote

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from workbench.data.base import content_hash
from workbench.data.images import StoredImage, shown
from workbench.errors import DataError
from workbench.files import atomic_file, cache_folder, state_of
from workbench.progress import progress_bar

# besides those that begin with a dot
SKIPPED_FOLDERS = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
RECENT = 2 * 10**9  # ns; a file changed so recently may change again within one tick of the file system's clock
READERS = 8  # threads
SPELLINGS: tuple[Callable[[str], str], ...] = (
    unquote,
    lambda name: name.replace("\\", "/"),
    partial(normalize, "NFC"),
    partial(normalize, "NFD"),
)


@dataclass(frozen=True)
class ImageFile:
    """An existing file.

    Attributes:
        path: the file.
        hints: inode, size in bytes, and times of the last change of content and inode (ns). If they are equal, the file
            is taken to be unchanged.
    """

    path: Path
    hints: tuple[int, int, int, int]


def below(root: Path, written: str, where: str) -> str:
    """Return the normalized path below `root` of an image path in a row.

    Args:
        root: the image root.
        written: the path as the row has it.
        where: the row, in messages.

    Raises:
        DataError: a web address, or a path that leads out of `root`.
    """
    if "://" in written[:10]:
        raise DataError(
            f"{where} has image '{shown(written)}', a web address: expected a file below the image root; download it"
            " first"
        )
    name = posixpath.normpath(written)
    if os.path.isabs(written):
        # as it is written, since the file may be a link; else the root or a folder above it may be one
        name = os.path.relpath(name, os.path.abspath(root))
        if name.split("/")[0] == "..":
            folder, file = os.path.split(written)
            name = os.path.relpath(os.path.join(os.path.realpath(folder), file), os.path.realpath(root))
    if name.split("/")[0] == ".." or not written.strip() or "\0" in written:
        raise DataError(f"{where} has image '{shown(written)}': expected a path below the image root")
    return name


def image_files(root: Path, names: Iterable[str]) -> dict[str, ImageFile]:
    """Return the file below `root` of each name that exists; every folder is read once.

    A name that does not exist as written is also tried with percent escapes decoded, with `/` for backslashes, and in
    the other Unicode normal forms.
    """
    wanted = set(names)
    files = _existing(root, {name: name for name in wanted})
    for respell in SPELLINGS:
        others = {
            other: name
            for name in wanted - files.keys()
            if (other := posixpath.normpath(respell(name))) != name and other.split("/")[0] != ".."
        }
        files |= _existing(root, others)
    return files


def stored_images(root: Path, files: Mapping[str, ImageFile]) -> dict[str, StoredImage]:
    """Return the image of each file, by name; a file with several names (links) is one place."""
    first: dict[object, str] = {}
    return {
        name: StoredImage(str(file.path), file.path, first.setdefault(file.hints, name))
        for name, file in sorted(files.items())
    }


def embedded_image(data: bytes, name: str, fetch: Callable[[], bytes] | None = None) -> StoredImage:
    """Return an image whose bytes are part of the data itself.

    Args:
        data: the bytes.
        name: what messages call the image.
        fetch: returns the bytes again, so that they need not stay in memory.
    """
    return StoredImage(name, fetch or (lambda: data), f"bytes {blake2b(data, digest_size=16).hexdigest()}")


def _existing(root: Path, names: Mapping[str, str]) -> dict[str, ImageFile]:
    """Return the existing files, by name, of `names` {path below root: name}."""
    wanted: dict[str, dict[str, str]] = {}
    for path, name in names.items():
        parent, _, last = path.rpartition("/")
        wanted.setdefault(parent, {})[last] = name
    files: dict[str, ImageFile] = {}
    for parent, names_of in wanted.items():
        if os.path.isdir(root / parent):  # False for names that are too long
            with os.scandir(root / parent) as entries:
                for entry in entries:
                    if entry.name in names_of and entry.is_file():
                        files[names_of[entry.name]] = ImageFile(Path(entry.path), state_of(entry.stat()))
    return files


def missing(source: str, root: Path, names: Sequence[str]) -> str:
    """Return a text that says how many images named by `source` are missing, in which folders, and the first ones."""
    folders = Counter(name.rpartition("/")[0] or "." for name in names)
    where = ", ".join(f"{shown(folder, 30)} {count}" for folder, count in folders.most_common(6))
    where += ", ..." if len(folders) > 6 else ""
    counted = f"{len(names)} images of {source} are" if len(names) > 1 else f"1 image of {source} is"
    return f"{counted} not below {shown(root, 60)} ({where}), first {', '.join(shown(name, 40) for name in names[:3])}"


def walk(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (path below `root`, file) of every file, sorted by that path.

    Links are followed. Folders of operating systems and editors are skipped.

    Raises:
        DataError: a folder that may not be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"folder {shown(error.filename)} cannot be read ({error.strerror})") from error

    files: list[tuple[str, Path]] = []
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:  # a folder that a link leads back to
            folders[:] = []
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS]
        files += [
            (os.path.relpath(path, root), Path(path))
            for name in names
            if os.path.isfile(path := os.path.join(folder, name))
        ]
    yield from sorted(files)


# --- hashes of files -------------------------------------------------------------------------------


def file_hashes(files: Mapping[str, ImageFile], what: str) -> dict[str, bytes]:
    """Return a hash (16 bytes) of the bytes of each file, by name.

    The hashes are stored in the cache; a file whose hints have not changed since is not read again.

    Args:
        files: the files by name.
        what: the data set's name, for the progress bar.

    Raises:
        DataError: a file that cannot be read.
    """
    names = sorted(files)
    hints = np.array([files[name].hints for name in names], dtype=np.int64).reshape(len(names), 4)
    hashes = np.zeros((len(names), 16), dtype=np.uint8)
    store = cache_folder("images") / f"{content_hash(*(str(files[name].path) for name in names))}.safetensors"
    known = np.zeros(len(names), dtype=bool)
    if (earlier := _stored_hashes(store)) is not None and earlier[0].shape == hints.shape:
        known = (earlier[0] == hints).all(axis=1)
        hashes[known] = earlier[1][known]
    unknown = np.flatnonzero(~known)
    began = time.time_ns()
    bar = progress_bar(f"image files of {what}", unknown, unit="file", leave=False)
    with ThreadPoolExecutor(READERS) as readers:
        for number, digest in zip(bar, readers.map(lambda n: _hash(files[names[n]].path), unknown), strict=True):
            hashes[number] = np.frombuffer(digest, dtype=np.uint8)
    if len(unknown):
        valid_hints = hints.copy()
        valid_hints[hints[:, 2:].max(axis=1) > began - RECENT] = -1  # to be read again next time
        with atomic_file(store) as partial:
            save_file({"hints": valid_hints, "hashes": hashes}, partial)
    return {name: row.tobytes() for name, row in zip(names, hashes, strict=True)}


def _stored_hashes(store: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the hints and hashes of an earlier call; None if there are none, or they are damaged."""
    try:
        stored = load_file(store)
        return stored["hints"], stored["hashes"]
    except (OSError, KeyError, SafetensorError):
        return None


def _hash(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file_digest(file, lambda: blake2b(digest_size=16)).digest()
    except OSError as error:
        raise DataError(f"image {shown(path)} cannot be read ({error.strerror or error})") from error
