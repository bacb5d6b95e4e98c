"""Plugins: model families, VFMs, metrics, data sets and analyses that other packages add by entry points.

A package that is installed beside this one names them in its pyproject.toml (docs/howto/plugins.md):

    [project.entry-points."viral_workbench.metrics"]
    angle = "acme.metrics:ANGLE"

Commands refer to the plugin by the name before the equals sign; the value is the object that this package would
register under that name. A plugin that cannot be loaded causes a one-sentence message, and everything else still works.
Stored results depend on the plugin's package, its version and the content of its code.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from workbench.errors import PluginError, one_line

PREFIX = "viral_workbench."
GROUPS = ("families", "vfms", "metrics", "data", "analyses")


@dataclass(frozen=True)
class Plugin:
    """One entry point of another package.

    Attributes:
        group: one of GROUPS.
        point: the entry point.
        package, version: name and version of the distribution that defines the entry point.
        also: other packages that define a different object under the same name.
    """

    group: str
    point: EntryPoint
    package: str
    version: str
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.point.name

    def load(self, kind: type[object] | None = None) -> Any:
        """Import the plugin and return its object.

        Args:
            kind: the class that the object must have; None if it only needs to be callable.

        Raises:
            PluginError: it cannot be imported or has another class, its name is not that of its entry point, or several
                packages use that name.
        """
        if self.also:
            raise PluginError(
                f"{self} is also one of {', '.join(self.also)}: expected one package with that name; uninstall the"
                " other"
            )
        try:
            item = self.point.load()
        except Exception as error:  # a module of another package may raise anything
            reason = f"{type(error).__name__}: {one_line(error, 90)}"
            raise PluginError(f"{self} cannot be loaded ({reason}): expected to import {self.point.value}") from error
        if not (callable(item) if kind is None else isinstance(item, kind)):
            expected = "a function" if kind is None else f"a {kind.__module__}.{kind.__name__}"
            raise PluginError(f"{self} is a {type(item).__name__}: expected {expected} at {self.point.value}")
        called = getattr(item, "name", self.name)
        if kind is not None and called != self.name:
            raise PluginError(f"{self} calls itself '{called}': expected the name of its entry point")
        return item

    def identity(self) -> str:
        """Return what its results depend on: the package, its version and the hash of the package's Python files."""
        return f"{self.package} {self.version} {_code_hash(self.point.module)}"

    def __str__(self) -> str:
        return f"plugin '{self.name}' ({self.group}) of {self.package} {self.version}"


@cache
def plugins(group: str) -> Mapping[str, Plugin]:
    """Return {name: plugin} of a group, in the order of the packages' names; no plugin is imported."""
    named: dict[str, Plugin] = {}
    points = [
        (point.dist.name, point.dist.version, point)
        for point in entry_points(group=PREFIX + group)
        if point.dist is not None
    ]
    for package, version, point in sorted(points, key=lambda entry: entry[0]):
        first = named.get(point.name)
        if first is None:
            named[point.name] = Plugin(group, point, package, version)
        elif point.value != first.point.value:
            named[point.name] = Plugin(group, first.point, first.package, first.version, (*first.also, package))
    return named


def identity(group: str, name: str) -> str:
    """Return `Plugin.identity` of the plugin called `name`, "" if there is none."""
    plugin = plugins(group).get(name)
    return plugin.identity() if plugin is not None else ""


def identities(analysis: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Return {name: identity} of the plugins that an analysis uses: itself, and those that its options name."""
    words = {word for value in config.values() for word in _words(value)}
    in_options = {
        name: identity(group, name) for group in ("vfms", "metrics", "data") for name in plugins(group) if name in words
    }
    of_analysis = identity("analyses", analysis)
    return in_options | ({analysis: of_analysis} if of_analysis else {})


def _words(value: Any) -> Iterator[str]:
    """Yield the names that the value of an option may contain: each word, and the part before its first colon.

    The latter is the name of a data set in a spec such as shapes:val.
    """
    for word in value if isinstance(value, list | tuple) else [value]:
        if isinstance(word, str):
            yield from (word, word.partition(":")[0])


def installed_packages() -> dict[str, str]:
    """Return {package: version} of every package that has plugins."""
    return {plugin.package: plugin.version for group in GROUPS for plugin in plugins(group).values()}


@cache
def _code_hash(module: str) -> str:
    """Hash the Python files of the top-level package (or the single file) of a module to 12 hex digits."""
    top = module.partition(".")[0]
    try:
        spec = getattr(sys.modules.get(top), "__spec__", None) or _find(top)
        locations: Iterable[str] = spec.submodule_search_locations or [spec.origin or ""]
    except (ImportError, ValueError, AttributeError):
        return "unknown"
    digest = hashlib.sha256()
    for location in sorted(map(Path, locations)):
        for file in sorted(location.rglob("*.py")) if location.is_dir() else [location]:
            name = file.relative_to(location) if location.is_dir() else file.name
            digest.update(f"{name}|".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _find(top: str) -> Any:
    from importlib.util import find_spec

    return find_spec(top)
