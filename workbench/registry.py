"""Registries of families, VFMs, metrics and data sets: `register` adds an entry by name, `get` returns it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from workbench.errors import PluginError, UnknownNameError
from workbench.plugins import plugins

T = TypeVar("T")
log = logging.getLogger(__name__)


class Registry(Generic[T]):
    """A mapping from names to entries of one kind.

    Args:
        kind: the word for an entry in error messages, such as "metric".
        group: the group of entry points (`workbench.plugins`) with which other packages add entries; they are loaded
            when an unknown name or the list of names is first requested.
        of: the class that an entry of a plugin must have; None for functions.
    """

    def __init__(self, kind: str, group: str = "", of: type[object] | None = None) -> None:
        self.kind, self.group, self.of = kind, group, of
        self._items: dict[str, T] = {}
        self._broken: dict[str, PluginError] = {}
        self._loaded = not group

    def add(self, name: str, item: T) -> T:
        """Register `item` under `name` and return it.

        Raises:
            ValueError: the name is already registered.
        """
        if name in self._items:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._items[name] = item
        return item

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds what it decorates under `name`."""
        return lambda item: self.add(name, item)

    def get(self, name: str) -> T:
        """Return the item called `name`.

        Raises:
            UnknownNameError: no entry has this name; the message has the nearest valid name.
            PluginError: the plugin of that name cannot be loaded.
        """
        if name not in self._items:
            self._load()
        if name in self._broken:
            raise self._broken[name]
        try:
            return self._items[name]
        except KeyError:
            raise UnknownNameError(self.kind, name, self._items) from None

    def names(self) -> list[str]:
        """Return all names, those of plugins last; a plugin that cannot be loaded is left out with a warning."""
        self._load()
        return list(self._items)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def _load(self) -> None:
        """Register the entries of plugins, once; a plugin cannot replace an entry of ours."""
        if self._loaded:
            return
        self._loaded = True
        for name, plugin in plugins(self.group).items():
            try:
                if name in self._items:
                    raise PluginError(
                        f"{plugin} has the name of a {self.kind} of viral-workbench: expected another name; it is left"
                        " out"
                    )
                self._items[name] = plugin.load(self.of)
            except PluginError as error:
                log.warning("%s", error)
                if name not in self._items:
                    self._broken[name] = error
