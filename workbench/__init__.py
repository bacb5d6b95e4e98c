"""The library behind the trainer, the analyses and the dashboard. The public names are imported on first use, so that a
part is quick to import."""

from importlib import import_module
from typing import Any

from viral_workbench import check_packages

check_packages()

_HOME = {
    "cknna": "workbench.metrics",
    "cka": "workbench.metrics",
    "mutual_knn": "workbench.metrics",
    "svcca": "workbench.metrics",
    "rsa": "workbench.metrics",
    "alignment_matrix": "workbench.metrics",
    "permutation_null": "workbench.stats",
    "bootstrap_ci": "workbench.stats",
    "mean_interval": "workbench.stats",
    "paired_test": "workbench.stats",
    "load_data": "workbench.data",
    "load_vfm": "workbench.vfm",
    "MLLM": "workbench.mllm",
    "read": "workbench.capture",
    "attention": "workbench.capture",
    "edit": "workbench.capture",
    "run_analysis": "workbench.analysis.api",
    "compare": "workbench.analysis.api",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'workbench' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
