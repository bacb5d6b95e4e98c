"""The command line of the logit lens: python -m analyses.logit_lens --help."""

from analyses.logit_lens import ANALYSIS
from workbench.analysis.command import main

if __name__ == "__main__":
    main(ANALYSIS)
