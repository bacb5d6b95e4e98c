"""The command line of the alignment analysis: python -m analyses.cknna --help."""

from analyses.cknna import ANALYSIS
from workbench.analysis.command import main

if __name__ == "__main__":
    main(ANALYSIS)
