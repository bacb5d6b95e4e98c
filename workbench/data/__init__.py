"""Data sets, one file each; importing this package registers them all."""

from importlib import import_module
from pkgutil import iter_modules

from workbench.data.base import DATASETS, Dataset, Object, Sample, asked_object, load_data, named_objects

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["DATASETS", "Dataset", "Object", "Sample", "asked_object", "load_data", "named_objects"]
