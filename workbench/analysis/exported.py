"""The figures of an analysis as files for a paper: the option `--export` of every analysis."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.figures.caption import Caption, data_shown, images_counted, images_shown, interval_words, seed_words
from workbench.figures.template import plain_name
from workbench.models import split_name
from workbench.runs import Run
from workbench.training_folder import training_recipe

if TYPE_CHECKING:
    from workbench.analysis.declaration import Analysis
    from workbench.figures.paper import Columns


def export(analysis: Analysis, runs: Mapping[str, Run], folder: Path, columns: Columns | None = None) -> None:
    """Write every figure of an analysis below `folder` in all forms, and print what was written.

    Args:
        runs: {label: run}.
        columns: columns of a page, by default as many as each figure needs.
    """
    from workbench.figures.paper import MISSING
    from workbench.figures.paper import export as write

    figures = analysis.figures({plain_name(label): run for label, run in runs.items()})
    captions = {title: caption_of(title, figure, runs) for title, figure in figures.items()}
    files, missing = write(folder, figures, captions, columns)
    sys.stdout.write(f"{len(figures)} figures in {len(files)} files: {folder}\n")
    if missing:
        sys.stdout.write(f"{MISSING.format(missing)}\n")


def caption_of(title: str, figure: Any, runs: Mapping[str, Run]) -> Caption:
    """Return what a reader has to know of a figure of stored runs."""
    records: list[Mapping[str, Any]] = [run.record for run in runs.values()]
    shown, data = images_shown(figure), data_shown(figure)
    if data is None:
        data = ", ".join(dict.fromkeys(str(record.get("data", "")) for record in records))
    counts = images_counted(figure)
    if counts is None:
        counts = sorted({count for run in runs.values() for count in _images(run)})
    n = f"{' to '.join(map(str, dict.fromkeys([*counts[:1], *counts[-1:]])))} images of {data}" if counts else data
    if shown:
        n = f"{shown} of {n}" if counts else f"{shown} image{'s' * (shown > 1)} of {data}"
    n = n if data else ""
    seeds = {label: _seed(str(run.record.get("model", ""))) for label, run in runs.items()}
    return Caption(title, n, seed_words(seeds), interval_words(figure))


def _images(run: Run) -> set[int]:
    """Return the numbers of images that the scores of a run are over."""
    return {int(n) for table in run.tables.values() if "n_images" in table for n in table["n_images"].dropna().unique()}


def _seed(model: str) -> int | None:
    """Return the seed of a training, None if `model` is not its folder."""
    seed: int | None = training_recipe(Path(split_name(model)[1])).get("seed")
    return seed
