"""The recipes, sweeps and launch files of this package: a table of all, or the path of one, for programs that want a
file.

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
    """Which file."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """A recipe, a sweep or a launch file, as NAME or as recipe/NAME, sweep/NAME or launch/NAME where several have the
    name; by default all of them."""


def main(argv: list[str]) -> None:
    """Print the table, or a line for each name."""
    names = parse(Config, argv, prog="python -m workbench.paths", description=__doc__ or "").names
    if names:
        sys.stdout.write("".join(f"{path_of(name)}\n" for name in names))
        return
    for kind in KINDS:
        sys.stdout.write(
            f"{kind.plural}\n"
            + "".join(f"  {name:<28}{first_sentence(file)}\n" for name, file in kind.files().items())
            + "\n"
        )


def path_of(name: str) -> str:
    """Where a recipe, a sweep or a launch file lies.

    Raises:
        UnknownNameError: nothing has the name.
        ConfigError: files of two kinds have it.
    """
    word, slash, last = name.rpartition("/")
    kinds = [kind for kind in KINDS if not slash or kind.word == word]
    found = {f"{kind.word}/{last}": kind.files()[last] for kind in kinds if last in kind.files()}
    if len(found) > 1:
        raise ConfigError(f"'{name}' is the name of several files: expected one of {', '.join(found)}")
    if not found:
        known = [
            name
            for kind in KINDS
            for name in ([f"{kind.word}/{own}" for own in kind.files()] if slash else kind.files())
        ]
        raise UnknownNameError("recipe, sweep or launch file", name, known)
    return str(next(iter(found.values())))


if __name__ == "__main__":
    command(main)
