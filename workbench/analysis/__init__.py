"""An analysis is declared once; its command line, its page, its cache key and its stored record follow from that.

    ANALYSIS = Analysis("cknna", "Alignment by layer", Config, run, figures, version=1)

`python -m analyses.<name> --model A B` then runs it on each model (or finds the stored run), and figures take {label:
Run}, so comparing is plotting.
"""
