"""The command line of the dynamics analysis: python -m analyses.dynamics --help."""

from analyses.dynamics import ANALYSIS
from workbench.analysis.command import main

if __name__ == "__main__":
    main(ANALYSIS)
