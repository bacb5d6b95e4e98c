"""The command line of the attention analysis: python -m analyses.attention --help."""

from analyses.attention import ANALYSIS
from workbench.analysis.command import main

if __name__ == "__main__":
    main(ANALYSIS)
