"""Write the short report of two groups of models, from stored results; the dashboard's page Evidence offers the same.

    python -m workbench.overview runs
    python -m workbench.overview runs --baseline baseline --models viral shuffled --out short.html

A name is a model's folder in the runs folder, or a variant, which stands for all its seeds. Without names, the models
are those that the dashboard shows first. The summary is about the baseline and the first of the others; the tables have
all models. The page is one file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from workbench.cli import command, parse
from workbench.errors import ConfigError, UnknownNameError
from workbench.files import atomic_file, check_can_make
from workbench.overview.charts import colors_of
from workbench.overview.differences import pairs_of
from workbench.overview.models import Models, read_models, with_variants
from workbench.overview.report import selection_report
from workbench.overview.stored import read_stored


@dataclass(frozen=True)
class Options:
    """Which models are reported."""

    runs: Annotated[Path, tyro.conf.Positional]
    """Folder of runs."""
    baseline: str | None = None
    """Model or variant that the others are compared with."""
    models: tuple[str, ...] = ()
    """Models or variants that are compared with it."""
    out: Path = Path("short.html")
    """File to write; an existing one is replaced."""


def main(argv: list[str]) -> None:
    """Read the folder and write the page."""
    options = parse(Options, argv, prog="python -m workbench.overview", description=__doc__ or "")
    if not options.runs.is_dir():
        raise ConfigError(f"runs is {options.runs}: expected a folder of runs")
    if (options.baseline is None) != (not options.models):
        raise ConfigError(
            f"baseline is {options.baseline} and models is {' '.join(options.models) or 'empty'}: expected both or"
            " neither"
        )
    check_can_make(options.out.parent)
    stored = read_stored(options.runs)
    models = read_models(options.runs, stored.runs)
    stored = with_variants(stored, models)
    named = [options.baseline, *options.models] if options.baseline else models.default()
    keys = list(dict.fromkeys(key for name in named for key in _keys(models, name)))
    pairs = pairs_of(models, keys[0], keys[1:]) if keys else []
    if not pairs:
        raise ConfigError(
            f"{options.runs} has {' and '.join(keys) if keys else 'no model'} to report: expected at least two models"
        )
    page = selection_report(options.runs, stored, models, pairs[0], keys, colors_of(models))
    with atomic_file(options.out) as file:
        file.write_text(page, encoding="utf-8")
    first, second = pairs[0].names
    print(f"{options.out}: {second} against {first}, {len(keys)} models, {options.out.stat().st_size / 1e6:.1f} MB")


def _keys(models: Models, name: str) -> list[str]:
    """Return the keys of the models that a name stands for.

    Raises:
        UnknownNameError: it is neither a model nor a variant.
    """
    if name in models.by_key:
        return [name]
    if name not in models.variants:
        raise UnknownNameError("model or variant", name, [*models.by_key, *models.variants])
    return [model.key for model in models.variants[name]]


if __name__ == "__main__":
    command(main)
