"""Declare and run analyses; the command line, page, cache key and stored record of an analysis follow from one object.

    ANALYSIS = Analysis("cknna", "Alignment by layer", Config, run, figures, summary, version=1)

`python -m analyses.<name> --model A B` then runs the analysis on each model, or loads the stored run. The figure
function of an analysis takes {label: Run}, so that it draws one model or compares several.
"""
