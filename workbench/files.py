"""The cache folder, writing that leaves either the whole result or nothing, and locks between processes."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from workbench.errors import RunError

HEAD_FILE = "alignment_head.safetensors"  # in a model folder, beside the model itself
UMASK = os.umask(0o077)  # can only be read by setting it
os.umask(UMASK)


def cache_folder(part: str) -> Path:
    """Return (and make) `$VIRAL_CACHE/<part>`, by default below `~/.cache/viral-workbench`."""
    root = Path(os.environ.get("VIRAL_CACHE", Path.home() / ".cache" / "viral-workbench"))
    return make_folder(root / part)


def make_folder(path: Path) -> Path:
    """Make `path` and its parents; a disk that refuses is one sentence, not a traceback."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make folder {path}: {error.strerror or error}") from error
    return path


def check_can_make(path: Path) -> None:
    """See that a folder at `path` is there or can be made, and leave it as it was: what is found wrong later must leave
    no empty folder behind.

    Raises:
        RunError: it cannot be made, or not be written to.
    """
    new = [part for part in (path, *path.parents) if not part.exists()]
    try:
        make_folder(path)
        if not os.access(path, os.W_OK | os.X_OK):
            raise RunError(f"cannot write to folder {path}: expected one that is yours")
    finally:
        _remove_empty(new)


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make `path` and its parents; on any failure those that were made are removed again, if nobody put anything
    there."""
    new = [part for part in (path, *path.parents) if not part.exists()]
    make_folder(path)
    try:
        yield
    except BaseException:
        _remove_empty(new)
        raise


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty
            folder.rmdir()


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` and rename it to `target` on success; on any failure nothing remains.

    If another process finished the same folder meanwhile, its result is kept and ours is dropped.
    """
    with _parents(target.parent), _partial_folder(target) as partial:
        yield partial


@contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise RunError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        yield partial
        share(partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.exists():
                raise
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {target}: {_reason(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target` and rename it to `target` on success; on any failure `target` is
    untouched."""
    with _parents(target.parent):
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            yield partial
            share(partial)
            partial.replace(target)
        except (OSError, SafetensorError) as error:
            raise RunError(f"cannot write {target}: {_reason(error)}") from error
        finally:
            partial.unlink(missing_ok=True)


def share(written: Path) -> None:
    """Let those read a file, or all of a folder, whom the umask lets: temporary folders and what safetensors writes are
    their owner's alone."""
    for path in (written, *written.rglob("*")):
        with suppress(OSError):  # a disk that knows no modes
            path.chmod((0o777 if path.is_dir() else 0o666) & ~UMASK)


def partial_files(folder: Path, name: str) -> list[Path]:
    """What processes have begun to write into `folder`, as `name`, and not finished: temporary files and folders, of
    processes killed or alive."""
    return [
        path
        for path in folder.glob(f".{name}.*")
        if re.fullmatch(r"\d+" if path.is_file() else r"\w{8}", path.name.rpartition(".")[2])
    ]


def remove_partial(folder: Path, name: str) -> None:
    """Remove what killed processes left half written; only for who holds the lock that all who write there hold."""
    for path in partial_files(folder, name):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold `path` as a lock against other processes, and yield whether it is held: at once, or when it is free if
    `wait`.

    The kernel frees the lock of a process that dies.
    """
    new = [part for part in path.parents if not part.exists()]
    make_folder(path.parent)
    try:
        file = _lock(path, wait)
    except OSError as error:
        raise RunError(f"cannot lock {path}: {_reason(error)}") from error
    if file is None:
        yield False
        return
    with file:
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            _remove_empty(new)  # a command that was refused under the lock leaves no folder


def _lock(path: Path, wait: bool) -> IO[str] | None:
    while True:
        make_folder(path.parent)  # whoever held the lock may have left nothing there
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return None
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # whoever held it before us has removed it, and another process may hold a new one


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
