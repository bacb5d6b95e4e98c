"""The command line of the tokens analysis: python -m analyses.tokens --help."""

from analyses.tokens import ANALYSIS
from workbench.analysis.command import main

if __name__ == "__main__":
    main(ANALYSIS)
