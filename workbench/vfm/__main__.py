"""Print the catalogue of vision foundation models: architecture, license, and what was checked with real weights.

python -m workbench.vfm [NAME ...]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from workbench.cli import command, parse
from workbench.vfm.base import CATALOGUE, CLIP, HALF, IMAGENET, VFMEntry
from workbench.vfm.find import find_vfm
from workbench.weights.catalogue import CATALOGUE as WEIGHTS
from workbench.weights.fetch import available_without_hub, source

NORMS = {IMAGENET: "ImageNet", HALF: "0.5", CLIP: "CLIP"}


@dataclass(frozen=True)
class Config:
    """Which entries to show."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Entries to show in full (catalogue names, hf:ID, timm:NAME, folders); by default a table of the catalogue."""


def row(entry: VFMEntry) -> dict[str, str]:
    """Return one row of the table, all values as text."""
    weights = WEIGHTS.get(entry.weights)
    sources = [weights.package.requirement if weights.package else "", weights.hub, str(weights.folder or "")]
    return {
        "name": entry.name,
        "architecture": entry.architecture,
        "license": weights.licence,
        "stride": str(entry.stride),
        "dim": str(entry.dim),
        "grid": "{} x {}".format(*entry.default_grid),
        "mean/std": NORMS.get((entry.mean, entry.std), f"{entry.mean} / {entry.std}"),
        "source": ", ".join(filter(None, sources)),
        "without hub": "yes" if available_without_hub(entry.weights) else "no",
        "checked": entry.checked,
        "note": entry.note,
    }


def main(argv: list[str]) -> None:
    """Print the table, or the named entries with the fingerprints of their weights."""
    names = parse(Config, argv, prog="python -m workbench.vfm", description="Vision foundation models.").names
    if names:
        for entry in map(find_vfm, names):
            local = available_without_hub(entry.weights)
            shown = source(entry.weights)["fingerprint"] if local else "unknown, the weights are not downloaded yet"
            lines = row(entry) | {"fingerprint": shown}
            print("\n".join(f"{key:<14}{value}" for key, value in lines.items()), end="\n\n")
        return
    rows = [row(CATALOGUE.get(name)) for name in CATALOGUE]
    widths = {key: max(len(key), *(len(line[key]) for line in rows)) for key in rows[0]}
    for line in ({key: key for key in widths}, *rows):
        print("  ".join(f"{line[key]:<{width}}" for key, width in widths.items()).rstrip())
    print("\nAlso: hf:ID (transformers), timm:NAME, or a folder with config.json and model.safetensors.")


if __name__ == "__main__":
    command(main)
