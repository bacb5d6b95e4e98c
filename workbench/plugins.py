"""What other packages add by entry points: model families, VFMs, metrics, data sets and analyses, without a fork.

A package that is installed beside this one names them in its pyproject.toml (docs/howto/plugins.md):

    [project.entry-points."viral_workbench.metrics"]
    angle = "acme.metrics:ANGLE"

The name is what a command calls it, and the value is what the package itself would register under it. A plugin that
cannot be loaded is one sentence, and the rest works. What a plugin computes is known by its package, the version, and
the content of its code.
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
        package, version: of the distribution that has it.
        also: other packages that give the same name to something else.
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
        """Import it.

        Args:
            kind: what it must be; None for anything that can be called.

        Raises:
            PluginError: it cannot be imported, is something else, has another name than its entry point, or two
                packages have that name.
        """
        if self.also:
            raise PluginError(
                f"{self} is also one of {', '.join(self.also)}: expected one package to have that name; uninstall the"
                " other"
            )
        try:
            item = self.point.load()
        except Exception as error:  # whatever a module of somebody else's does
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
        """What decides its numbers: package, version, and the content of the package's Python files (of the module,
        where it is a single file)."""
        return f"{self.package} {self.version} {_code_hash(self.point.module)}"

    def __str__(self) -> str:
        return f"plugin '{self.name}' ({self.group}) of {self.package} {self.version}"


@cache
def plugins(group: str) -> Mapping[str, Plugin]:
    """{name: plugin} of a group, in the order of their packages; nothing is imported."""
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
    """`Plugin.identity` of a name, "" where no plugin has it."""
    plugin = plugins(group).get(name)
    return plugin.identity() if plugin is not None else ""


def identities(analysis: str, config: Mapping[str, Any]) -> dict[str, str]:
    """{name: identity} of every plugin that an analysis and the values of its options name."""
    words = {word for value in config.values() for word in _words(value)}
    found = {
        name: identity(group, name) for group in ("vfms", "metrics", "data") for name in plugins(group) if name in words
    }
    return found | ({analysis: own} if (own := identity("analyses", analysis)) else {})


def _words(value: Any) -> Iterator[str]:
    """The names that an option may have: its words, and what stands before the colon of a data set's spec."""
    for word in value if isinstance(value, list | tuple) else [value]:
        if isinstance(word, str):
            yield from (word, word.partition(":")[0])


def installed_packages() -> dict[str, str]:
    """{package: version} of every package that has plugins."""
    return {plugin.package: plugin.version for group in GROUPS for plugin in plugins(group).values()}


@cache
def _code_hash(module: str) -> str:
    """Hash of the files of the top-level package that a module belongs to, 12 hex digits."""
    top = module.partition(".")[0]
    try:
        spec = getattr(sys.modules.get(top), "__spec__", None) or _find(top)
        places: Iterable[str] = spec.submodule_search_locations or [spec.origin or ""]
    except (ImportError, ValueError, AttributeError):
        return "unknown"
    digest = hashlib.sha256()
    for place in sorted(map(Path, places)):
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{file.relative_to(place) if place.is_dir() else file.name}|".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _find(top: str) -> Any:
    from importlib.util import find_spec

    return find_spec(top)
