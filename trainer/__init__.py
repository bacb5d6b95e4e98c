"""Train multimodal LLMs with and without visual representation alignment.

The public names are declared in `__init__.pyi` and imported on first use.
"""

import lazy_loader

from viral_workbench import check_packages

check_packages()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
