"""The alignment analysis in chunks of two images: python -m tests.in_small_chunks, with the options of the command."""

from __future__ import annotations

from analyses.cknna import ANALYSIS
from workbench.analysis import chunks
from workbench.analysis.command import main

if __name__ == "__main__":
    chunks.SIZE = 2
    main(ANALYSIS)
