"""The command `viral`, and the check that no other distribution has replaced one of our packages.

`workbench`, `trainer` and `analyses` are common names, and other distributions install packages with the same names.
Each of our three packages calls `check_packages` when it is imported, so that a mixed installation is noticed before
it computes anything. This module uses only the standard library.
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
HOME = Path(__file__).resolve().parent  # the folder that also holds the three packages


class MixedInstallError(ImportError):
    """One of our packages is not the one that viral-workbench installed."""


@cache
def check_packages(home: Path = HOME) -> None:
    """Warn if one of our packages is imported from elsewhere or shares its folder with another distribution.

    Args:
        home: the folder that viral-workbench was installed into.

    Raises:
        MixedInstallError: another distribution has overwritten a package's `__init__.py`.
    """
    installed = _installed_files(home)
    for package in PACKAGES:
        if problem := _replaced(package, home, installed):
            raise MixedInstallError(problem)
        if problem := _imported_from_elsewhere(package, home) or _shared(package, home, installed):
            warnings.warn(problem, RuntimeWarning, stacklevel=3)


def _replaced(package: str, home: Path, installed: Mapping[str, str]) -> str:
    """Return an error sentence if the `__init__.py` of a package is no longer ours, else ""."""
    init = f"{package}/__init__.py"
    if init not in installed or _hash(home / init) == installed[init]:
        return ""
    return (
        f"{home / init} is not what viral-workbench installed{_owner(home, init)}: expected an environment without"
        f" another package '{package}'; uninstall the other one, then run `pip install --force-reinstall --no-deps"
        " viral-workbench`"
    )


def _imported_from_elsewhere(package: str, home: Path) -> str:
    """Return an error sentence if `import package` would find a folder that is not ours, else ""."""
    try:
        spec = find_spec(package)
    except ValueError:  # sys.modules holds a module without a __spec__
        return ""
    if spec is None or spec.origin is None or Path(spec.origin).resolve().parent == home / package:
        return ""
    return (
        f"the package '{package}' of viral-workbench is in {home}, but an import finds {spec.origin}: expected no other"
        f" package '{package}' before it on sys.path"
    )


def _shared(package: str, home: Path, installed: Mapping[str, str]) -> str:
    """Return a warning sentence if another distribution has files in the folder of a package, else ""."""
    names = [f"{package}/{path.name}" for path in sorted((home / package).glob("*.py"))] if installed else []
    stranger = next((name for name in names if name not in installed), "")
    owner = _owner(home, stranger) if stranger else ""
    if not owner:
        return ""
    return (
        f"{home / stranger} is in a package of viral-workbench{owner}: expected an environment without another"
        f" package '{package}'"
    )


def _installed_files(home: Path) -> dict[str, str]:
    """Return {file: hash} of everything that an installer put into `home` for viral-workbench.

    The result is {} in a checkout, in an editable installation and where there is no RECORD file.
    """
    record = next(home.glob("viral_workbench-*.dist-info/RECORD"), None)
    if record is None:
        return {}
    with record.open(newline="", encoding="utf-8") as file:
        installed = {row[0]: row[1] for row in csv.reader(file) if len(row) == 3}
    return installed if "viral_workbench.py" in installed else {}  # an editable installation records none of its files


def _hash(file: Path) -> str:
    """Return the hash of a file in the format of a RECORD file, or "" if the file cannot be read."""
    try:
        digest = hashlib.sha256(file.read_bytes()).digest()
    except OSError:
        return ""
    return f"sha256={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def _owner(home: Path, file: str) -> str:
    """Return ", but belongs to NAME" if another distribution in `home` recorded the file, else ""."""
    from importlib.metadata import distributions  # imported here because it is slow to import

    for other in distributions(path=[str(home)]):
        name = other.metadata["Name"]
        if name != "viral-workbench" and any(str(entry) == file for entry in other.files or ()):
            return f", but belongs to {name}"
    return ""


def main() -> None:
    """Run the command `viral`, after checking that an import finds our packages and no others."""
    try:
        if problem := next(filter(None, (_imported_from_elsewhere(package, HOME) for package in PACKAGES)), ""):
            raise MixedInstallError(problem)
        check_packages()
    except MixedInstallError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    from workbench.cli import command
    from workbench.commands import main as run

    command(run)
