"""The cache folder, atomic writing of files and folders, and locks between processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
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

HEAD_FILE = "alignment_head.safetensors"  # the alignment heads, beside the model in its folder
UMASK = os.umask(0o077)  # the umask can only be read by setting it; the next line sets it back
os.umask(UMASK)


def cache_folder(part: str) -> Path:
    """Return the folder `$VIRAL_CACHE/<part>`, made if needed; VIRAL_CACHE is by default ~/.cache/viral-workbench."""
    root = Path(os.environ.get("VIRAL_CACHE", Path.home() / ".cache" / "viral-workbench"))
    return make_folder(root / part)


def make_folder(path: Path) -> Path:
    """Make `path` and its parents, and return `path`.

    Raises:
        RunError: the folder cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make folder {path}: {error.strerror or error}") from error
    return path


def check_can_make(path: Path) -> None:
    """Check that a folder exists at `path` or can be made there, and that it can be written to.

    Folders made for the check are removed again, so that a command that fails later leaves no empty folder.

    Raises:
        RunError: the folder cannot be made, or cannot be written to.
    """
    missing = [part for part in (path, *path.parents) if not part.exists()]
    try:
        make_folder(path)
        if not os.access(path, os.W_OK | os.X_OK):
            raise RunError(f"cannot write to folder {path}: expected a folder in which you may write")
    finally:
        _remove_empty(missing)


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make `path` and its parents; on any failure, remove those that were made here and are still empty."""
    missing = [part for part in (path, *path.parents) if not part.exists()]
    make_folder(path)
    try:
        yield
    except BaseException:
        _remove_empty(missing)
        raise


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty
            folder.rmdir()


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` and rename it to `target` on success; on any failure nothing remains.

    If another process has meanwhile made the same folder, its result stays and ours is deleted.
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
    """Yield a temporary path beside `target` and rename it to `target` on success.

    On any failure `target` stays as it was.
    """
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
    """Give a file, or a folder and everything in it, the permissions that the umask allows.

    Temporary folders and the files that safetensors writes are otherwise accessible to their owner only.
    """
    for path in (written, *written.rglob("*")):
        with suppress(OSError):  # a file system without permissions
            path.chmod((0o777 if path.is_dir() else 0o666) & ~UMASK)


def partial_files(folder: Path, name: str) -> list[Path]:
    """Return the temporary files and folders from which processes would make `folder / name`.

    They belong to processes that are still writing or that were killed.
    """
    return [
        path
        for path in folder.glob(f".{name}.*")
        if re.fullmatch(r"\d+" if path.is_file() else r"\w{8}", path.name.rpartition(".")[2])
    ]


def remove_partial(folder: Path, name: str) -> None:
    """Remove the temporary files and folders of killed processes.

    Call it only while holding the lock that every process holds that writes there.
    """
    for path in partial_files(folder, name):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock the file `path` against other processes, and yield whether this process holds the lock.

    With `wait`, block until the lock is free; without it, yield False if another process holds it. The kernel frees
    the lock of a process that dies.

    Raises:
        RunError: the file cannot be made or locked.
    """
    missing = [part for part in path.parents if not part.exists()]
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
            _remove_empty(missing)  # a command that fails while it holds the lock leaves no empty folder


def _lock(path: Path, wait: bool) -> IO[str] | None:
    """Return the locked file, or None if another process holds the lock and `wait` is False."""
    while True:
        make_folder(path.parent)  # the previous holder of the lock may have removed the folder
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return None
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # the previous holder removed this file, and another process may have locked a new one


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def leads_outside(file: Path, root: Path) -> bool:
    """Return whether a link, on the way from the folder `root` to a file or folder below it, leads out of `root`."""
    way = (file, *file.parents)[: len(file.parts) - len(root.parts)]
    return any(each.is_symlink() for each in way) and not file.resolve().is_relative_to(root.resolve())


def state_of(stat: os.stat_result) -> tuple[int, int, int, int]:
    """Return what differs if a file was changed or replaced: its inode, size, and times of change (ns)."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parquet_columns(file: Path) -> set[str] | None:
    """Return the columns of a parquet file; None if it is missing or damaged, in its rows too, which are read."""
    import pyarrow.parquet

    try:
        return set(pyarrow.parquet.read_table(file).column_names)
    except (OSError, ValueError):  # of pyarrow too
        return None


def whole_safetensors(file: Path) -> bool:
    """Return whether a file has the header of a safetensors file and all the bytes that it announces."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size
            if length + 8 > size:
                return False
            header = json.loads(stream.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return bool(8 + length + max(ends, default=0) == size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return False
