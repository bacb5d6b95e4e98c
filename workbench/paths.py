"""List the recipes, sweeps and launch files of this package, or print their paths for other programs.

python -m workbench.paths
python -m workbench.paths ddp
accelerate launch --config_file "$(viral path ddp)" -m trainer shapes_viral
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from workbench.cli import command, parse
from workbench.errors import ConfigError, UnknownNameError
from workbench.package_files import KINDS, first_sentence


@dataclass(frozen=True)
class Config:
    """The files whose paths are printed."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Recipes, sweeps or launch files by name (recipe/NAME, sweep/NAME or launch/NAME if ambiguous); by default all."""


def main(argv: list[str]) -> None:
    """Print the table of all files, or the path of each name on a line."""
    names = parse(Config, argv, prog="python -m workbench.paths", description=__doc__ or "").names
    if names:
        sys.stdout.write("".join(f"{path_of(name)}\n" for name in names))
        return
    for kind in KINDS:
        rows = "".join(f"  {name:<28}{first_sentence(file)}\n" for name, file in kind.files().items())
        sys.stdout.write(f"{kind.plural}\n{rows}\n")


def path_of(name: str) -> str:
    """Return the path of a recipe, a sweep or a launch file.

    Raises:
        UnknownNameError: no file has the name.
        ConfigError: files of several kinds have the name.
    """
    word, slash, last = name.rpartition("/")
    kinds = [kind for kind in KINDS if not slash or kind.word == word]
    matches = {f"{kind.word}/{last}": kind.files()[last] for kind in kinds if last in kind.files()}
    if len(matches) > 1:
        raise ConfigError(f"'{name}' is the name of several files: expected one of {', '.join(matches)}")
    if not matches:
        known = [f"{kind.word}/{file}" if slash else file for kind in KINDS for file in kind.files()]
        raise UnknownNameError("recipe, sweep or launch file", name, known)
    return str(next(iter(matches.values())))


if __name__ == "__main__":
    command(main)
