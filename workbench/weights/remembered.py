"""Fingerprints of large models, remembered as long as their files do not change."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workbench.errors import WeightsError
from workbench.files import atomic_file, cache_folder, state_of
from workbench.hashing import settings_hash

LARGE = 2**28  # bytes; hashing less takes under a second
RECENT = 2 * 10**9  # ns; a file changed so recently may change again within one tick of the file system's clock
CHECK = "VIRAL_CHECK_FINGERPRINTS"


@dataclass(frozen=True)
class LoadedFrom:
    """The files that a model was loaded from, and the time before the first of them was read (`time.time_ns()`)."""

    files: tuple[Path, ...]
    began: int


NO_FILES = LoadedFrom((), 0)  # of a model whose fingerprint is not to be remembered


def remembered_fingerprint(source: LoadedFrom, settings: object, compute: Callable[[], str]) -> str:
    """Return `compute()`, the fingerprint of what was loaded from `source`; of large files it is remembered.

    It is computed again if the path, inode, size or a time of change of a file differs, and always if the variable
    VIRAL_CHECK_FINGERPRINTS is 1. Of a file that changed shortly before it was read, or since, it is neither remembered
    nor looked up.

    Args:
        settings: what else decides the fingerprint, such as the number format that the files were loaded in.

    Raises:
        WeightsError: with VIRAL_CHECK_FINGERPRINTS=1, the remembered fingerprint is not the computed one.
    """
    resolved = sorted(file.resolve() for file in source.files)
    stats = [file.stat() for file in resolved]
    if not stats or sum(stat.st_size for stat in stats) < LARGE:
        return compute()
    if max(max(stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats) >= source.began - RECENT:
        return compute()
    states = [(stat.st_dev, *state_of(stat)) for stat in stats]
    key = settings_hash([str(file) for file in resolved], states, settings)
    store = cache_folder("fingerprints") / f"{key}.json"
    remembered = _read(store)
    check = os.environ.get(CHECK, "0") == "1"
    if remembered is not None and not check:
        return remembered
    computed = compute()
    if remembered not in (None, computed):
        raise WeightsError(
            f"{resolved[0]} has fingerprint {computed}, but {store} remembers {remembered}: expected the same for"
            " unchanged files; remove that file, and distrust results computed since"
        )
    with atomic_file(store) as partial:
        partial.write_text(json.dumps({"fingerprint": computed, "files": [str(file) for file in resolved]}))
    return computed


def _read(store: Path) -> str | None:
    """Return a stored fingerprint, or None if there is none or it is damaged."""
    try:
        return str(json.loads(store.read_text())["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
