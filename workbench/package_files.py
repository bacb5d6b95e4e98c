"""Recipes, sweeps and launch files that lie in the package, found by name wherever the package is installed."""

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
        word, plural: what one of them, and what all are called.
        package, folder: where they lie.
    """

    word: str
    plural: str
    package: str
    folder: str

    def files(self) -> dict[str, Path]:
        """{name: file} of those in the package, sorted."""
        folder = Path(str(resources.files(self.package) / self.folder))
        return {file.stem: file for file in sorted(folder.glob("*.yaml"))}

    def find(self, name: str | Path) -> Path:
        """The file that a word of a command line means: `NAME` is in the package, anything with a slash or a suffix is
        a path.

        A path within the package, such as trainer/recipes/NAME.yaml, means the package's file in every folder that has
        no such path of its own. Any other path is returned as it is, there or not.

        Raises:
            UnknownNameError: no such name in the package, or a NAME.yaml that is not here.
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
    """What a YAML file says of itself: the first sentence of the comment that it begins with, "" where there is
    none."""
    lines = list(takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines()))
    return re.split(r"(?<=\.) ", " ".join(line.lstrip("# ") for line in lines))[0]
