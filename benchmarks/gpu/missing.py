"""Stand-ins for packages that the product imports but most of the benchmark does not use.

A machine with a card has torch and transformers, but seldom everything that pyproject.toml names. A stand-in can be
imported and its names can stand in annotations; calling one of them raises `ModuleNotFoundError` with the name of the
package, which `Bench.guard` records as "not run".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

OPTIONAL = ("jaxtyping", "lazy_loader", "scipy", "nnsight")


def stand_in() -> list[str]:
    """Let the optional packages that are not installed be imported, and return their names."""
    missing = [name for name in OPTIONAL if find_spec(name) is None]
    sys.meta_path.append(_Finder([name for name in missing if name != "nnsight"]))  # which is imported where it is used
    return missing


class _Finder(MetaPathFinder, Loader):
    """Finds the missing packages and all their submodules."""

    def __init__(self, missing: Sequence[str]) -> None:
        self.missing = missing

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return a specification if the module belongs to a missing package."""
        package = fullname.partition(".")[0]
        return ModuleSpec(fullname, self, is_package=True) if package in self.missing else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the stand-in of a module."""
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave the stand-in as it is."""


class _Module(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _no_public_names if name == "attach_stub" else _Name(self.__name__.partition(".")[0])


class _Name:
    """A name of a missing package: it can be subscripted, as in annotations, but not called."""

    def __init__(self, package: str) -> None:
        self.package = package

    def __getitem__(self, _: object) -> Any:
        return Any

    def __getattr__(self, name: str) -> _Name:
        return self

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise ModuleNotFoundError(f"No module named {self.package!r}", name=self.package)


def _no_public_names(*_: object) -> tuple[Any, Any, list[str]]:
    """What `lazy_loader.attach_stub` returns: the benchmark imports from submodules only."""

    def absent(name: str) -> NoReturn:
        raise AttributeError(name)

    return absent, list, []
