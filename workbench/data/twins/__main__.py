"""Write laptop twins of six benchmarks: files in the benchmarks' formats, with scenes of our synthetic data sets.

    python -m workbench.data.twins twins

The loaders, prompts, scorers and interventions run on a twin as on the benchmark, and a model that was trained here can
answer it. Its scores say nothing about the benchmark. POPE is made of `photos:test`, What's Up, MMVP, CV-Bench (two
dimensions only), MMStar and MME of `shapes:test`; no image is one of a training split.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from workbench.cli import command, parse
from workbench.data.twins.wordings import Wording
from workbench.data.twins.write import TWINS, write_twins


@dataclass(frozen=True)
class Options:
    """Where and how the twins are written."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write; it must not exist."""
    seed: int = 0
    """Seed of the scenes and of the choice of questions."""
    wording: Wording = "synthetic"
    """Words of the questions: those that the laptop models were trained on, or the benchmarks' own."""


def main(argv: list[str]) -> None:
    """Write the twins and print what was written."""
    options = parse(Options, argv, prog="python -m workbench.data.twins", description=__doc__ or "")
    write_twins(options.out, options.seed, options.wording)
    print(f"{options.out}: {', '.join(TWINS)}")


if __name__ == "__main__":
    command(main)
