"""The command line of the linear probes: python -m analyses.linear_probe --help."""

from analyses.linear_probe import ANALYSIS
from workbench.analysis.command import main

if __name__ == "__main__":
    main(ANALYSIS)
