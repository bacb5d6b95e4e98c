"""The analyses, one file for each; `all` runs them all, `claims` judges the claims ledger by stored runs."""

from viral_workbench import check_packages

check_packages()
