"""The stories of pairs of models, told once for all sessions and again when a file changes."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.dashboard.site import Site, cached
from workbench.overview.differences import Pair
from workbench.overview.stored import Stored
from workbench.overview.story import Story, tell
from workbench.training_folder import EVALUATION_FILE


def story_of(site: Site, pair: Pair, layer: int | None = None) -> Story:
    """Return the story of a pair (`workbench.overview.story`)."""
    return _told(pair, site.stored, (str(site.root), *stamp(site, pair.keys)), layer)


@cached
def _told(_pair: Pair, _stored: Stored, stamps: tuple[object, ...], layer: int | None) -> Story:
    return tell(_pair, _stored, layer)


def stamp(site: Site, keys: Sequence[str]) -> tuple[object, ...]:
    """Return what changes when anything that is shown of these models changes: their files and their runs."""
    parts: list[object] = []
    for key in keys:
        folder = site.models.by_key[key].folder
        file = folder / EVALUATION_FILE if folder is not None else None
        parts.append((key, file.stat().st_mtime_ns if file is not None and file.exists() else 0))
    return (*parts, *(run.folder.name for run in site.stored.runs if run.model in keys))
