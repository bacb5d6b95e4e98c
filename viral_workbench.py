"""The distribution `viral-workbench`: the command `viral`, and the check that its packages are its own.

`workbench`, `trainer` and `analyses` are common names, and other distributions install packages of the same names. Each
of the three calls `check_packages` when it is imported, so that such a mixture is noticed before anything is computed
with it. This module needs nothing but the standard library.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import sys
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("workbench", "trainer", "analyses")
HOME = Path(__file__).resolve().parent  # of the three packages, too


class MixedInstallError(ImportError):
    """A package of ours is not the one that was installed."""


@cache
def check_packages(home: Path = HOME) -> None:
    """Warn where a package of ours is found elsewhere, or shares its folder with another distribution.

    Args:
        home: the folder that this distribution was installed into.

    Raises:
        MixedInstallError: another distribution has written over a package's `__init__.py`.
    """
    installed = _installed_files(home)
    for package in PACKAGES:
        if sentence := _replaced(package, home, installed):
            raise MixedInstallError(sentence)
        if sentence := _found_elsewhere(package, home) or _shared(package, home, installed):
            warnings.warn(sentence, RuntimeWarning, stacklevel=3)


def _replaced(package: str, home: Path, installed: Mapping[str, str]) -> str:
    """What is wrong with a package whose `__init__.py` is no longer ours, "" if it is."""
    init = f"{package}/__init__.py"
    if init not in installed or _hash(home / init) == installed[init]:
        return ""
    return (
        f"{home / init} is not what viral-workbench installed{_owner(home, init)}: expected an environment without"
        f" another package '{package}'; uninstall that one, then `pip install --force-reinstall --no-deps"
        " viral-workbench`"
    )


def _found_elsewhere(package: str, home: Path) -> str:
    """What is wrong where an import would find another folder than ours, "" if it finds ours or none."""
    try:
        spec = find_spec(package)
    except ValueError:  # a module that was put together by hand
        return ""
    if spec is None or spec.origin is None or Path(spec.origin).resolve().parent == home / package:
        return ""
    return (
        f"the package '{package}' of viral-workbench is in {home}, but an import finds {spec.origin}: expected no other"
        f" '{package}' first on the path"
    )


def _shared(package: str, home: Path, installed: Mapping[str, str]) -> str:
    """What is wrong where files of another distribution lie in a package's folder, "" if none do."""
    names = [f"{package}/{path.name}" for path in sorted((home / package).glob("*.py"))] if installed else []
    stranger = next((name for name in names if name not in installed), "")
    owner = _owner(home, stranger) if stranger else ""
    return (
        f"{home / stranger} lies in a package of viral-workbench{owner}: expected an environment without another"
        f" '{package}'"
        if owner
        else ""
    )


def _installed_files(home: Path) -> dict[str, str]:
    """{file: hash} of all that an installer put into `home` for this distribution; {} in a checkout and where no record
    says."""
    record = next(home.glob("viral_workbench-*.dist-info/RECORD"), None)
    if record is None:
        return {}
    with record.open(newline="", encoding="utf-8") as file:
        installed = {row[0]: row[1] for row in csv.reader(file) if len(row) == 3}
    return installed if "viral_workbench.py" in installed else {}  # an editable install records none of its files


def _hash(file: Path) -> str:
    """The hash of a file as a RECORD writes it, "" where there is no file."""
    try:
        digest = hashlib.sha256(file.read_bytes()).digest()
    except OSError:
        return ""
    return f"sha256={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def _owner(home: Path, file: str) -> str:
    """ ", but belongs to NAME" where another distribution in `home` recorded the file, "" where none did."""
    from importlib.metadata import distributions  # which takes longer to import than all the rest

    for other in distributions(path=[str(home)]):
        name = other.metadata["Name"]
        if name != "viral-workbench" and any(str(entry) == file for entry in other.files or ()):
            return f", but belongs to {name}"
    return ""


def main() -> None:
    """The command `viral`, which runs our packages or none."""
    try:
        if sentence := next(filter(None, (_found_elsewhere(package, HOME) for package in PACKAGES)), ""):
            raise MixedInstallError(sentence)
        check_packages()
    except MixedInstallError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    from workbench.cli import command
    from workbench.commands import main as run

    command(run)
