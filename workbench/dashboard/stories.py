"""The stories of pairs of models, told once for all sessions and again when a file changes."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.dashboard.site import Site, cached
from workbench.overview.differences import Pair
from workbench.overview.models import STAMPED
from workbench.overview.stored import Stored
from workbench.overview.story import Story, tell
from workbench.training_folder import LOG_FILE


def story_of(site: Site, pair: Pair, layer: int | None = None) -> Story:
    """Return the story of a pair (`workbench.overview.story`)."""
    return _told(pair, site.stored, pair_stamp(site, pair), layer)


@cached
def _told(_pair: Pair, _stored: Stored, stamps: tuple[object, ...], layer: int | None) -> Story:
    return tell(_pair, _stored, layer)


def stamp(site: Site, keys: Sequence[str]) -> tuple[object, ...]:
    """Return what changes when the answers, recipes or stored analyses of these models change."""
    parts: list[object] = [str(site.root)]
    for key in keys:
        stamps = zip(STAMPED, site.models.by_key[key].stamps, strict=False)
        parts.append((key, *(when for name, when in stamps if name != LOG_FILE)))
    return (*parts, *(run.stamp for run in site.stored.runs if run.model in keys))


def pair_stamp(site: Site, pair: Pair) -> tuple[object, ...]:
    """Return what changes when the `stamp` of a pair's models, or the name of one of its groups, changes."""
    return (*stamp(site, pair.keys), *pair.names)
