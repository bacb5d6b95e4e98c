"""The table of analyses.

python -m analyses
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import analyses
from workbench.config import command


def main(argv: list[str]) -> None:
    """Print the name, title and command of every analysis in this package."""
    for module in iter_modules(analyses.__path__):
        if module.name != "__main__":
            found = import_module(f"analyses.{module.name}").ANALYSIS
            print(f"{found.name:<16} {found.title}\n{'':<16} python -m analyses.{found.name} --model A B --help")


if __name__ == "__main__":
    command(main)
