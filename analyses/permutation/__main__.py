"""The command line of the permutation analysis: python -m analyses.permutation --help."""

from analyses.permutation import ANALYSIS
from workbench.analysis.command import main

if __name__ == "__main__":
    main(ANALYSIS)
