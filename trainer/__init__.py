"""Train multimodal LLMs with and without visual representation alignment."""

from viral_workbench import check_packages

check_packages()
