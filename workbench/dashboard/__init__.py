"""The dashboard's pages.

They read files below the runs folder only. Numbers are computed in `workbench` and `analyses`, never here.
"""
