"""One analysis for each file, and commands about all of them in `all` and `claims`."""

from viral_workbench import check_packages

check_packages()
