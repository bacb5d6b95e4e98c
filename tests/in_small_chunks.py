"""An analysis in chunks of two images: python -m tests.in_small_chunks NAME, with the options of the analysis."""

from __future__ import annotations

from workbench.analysis import chunks
from workbench.analysis.command import run
from workbench.analysis.discover import load_analysis
from workbench.cli import command

if __name__ == "__main__":
    chunks.SIZE = 2
    command(lambda words: run(load_analysis(words[0]), words[1:]))
