"""Find the recipes, sweeps and launch files of this package by name, wherever the package is installed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from itertools import takewhile
from pathlib import Path

from workbench.errors import UnknownNameError

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Kind:
    """One kind of YAML file in the package.

    Attributes:
        word, plural: what one file and several files are called.
        package, folder: the Python package and its folder that hold them.
    """

    word: str
    plural: str
    package: str
    folder: str

    def files(self) -> dict[str, Path]:
        """Return {name: path} of the files in the package, sorted by name."""
        folder = Path(str(resources.files(self.package) / self.folder))
        return {file.stem: file for file in sorted(folder.glob("*.yaml"))}

    def find(self, name: str | Path) -> Path:
        """Return the path of the file that a word of a command line means.

        A plain NAME is a file of the package; a word with a slash, or with a suffix if the file exists, is a path. A
        path such as trainer/recipes/NAME.yaml means the file of the package if the current folder has no
        trainer/recipes. Any other path is returned unchanged, whether it exists or not.

        Raises:
            UnknownNameError: the package has no file of that name, or there is no NAME.yaml in the current folder.
        """
        path = Path(name)
        if path.is_file() and (path.suffix in SUFFIXES or "/" in str(name)):
            return path
        if "/" not in str(name):
            known = self.files()
            if path.name in known:
                return known[path.name]
            here = [file.name for suffix in SUFFIXES for file in Path().glob(f"*{suffix}")]
            raise UnknownNameError(self.word, str(name), [*known, *here], also="or the path of a YAML file")
        if path.parent == Path(self.package, self.folder) and not path.parent.is_dir():
            known = self.files()
            if path.stem not in known:
                raise UnknownNameError(self.word, path.stem, known, also="or the path of a YAML file")
            return known[path.stem]
        return path


RECIPES = Kind("recipe", "recipes", "trainer", "recipes")
SWEEPS = Kind("sweep", "sweeps", "trainer", "sweeps")
LAUNCH_FILES = Kind("launch", "launch files", "trainer", "launch")
KINDS = (RECIPES, SWEEPS, LAUNCH_FILES)


def first_sentence(file: Path) -> str:
    """Return the first sentence of the comment at the beginning of a YAML file, "" if there is none."""
    lines = list(takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines()))
    return re.split(r"(?<=\.) ", " ".join(line.lstrip("# ") for line in lines))[0]
