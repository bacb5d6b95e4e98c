"""The library behind the trainer, the analyses and the dashboard.

The public names are declared in `__init__.pyi`, where editors and type checkers see them, and imported on first use, so
that a part is quick to import.
"""

import lazy_loader

from viral_workbench import check_packages

check_packages()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
