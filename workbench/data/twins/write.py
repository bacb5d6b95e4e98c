"""Writing all twins, each with a file that says that it is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from workbench.data.copies import TWIN
from workbench.data.twins.cv_bench import write_cv_bench
from workbench.data.twins.mme import write_mme
from workbench.data.twins.mmstar import write_mmstar
from workbench.data.twins.mmvp import write_mmvp
from workbench.data.twins.pope import write_pope
from workbench.data.twins.whatsup import write_whatsup
from workbench.data.twins.wordings import Wording
from workbench.errors import ConfigError
from workbench.files import atomic_folder
from workbench.progress import progress_bar

TWINS: dict[str, tuple[str, Callable[[Path, int, Wording], None]]] = {
    "pope": ("photos:test", write_pope),
    "whatsup": ("shapes:test", write_whatsup),
    "mmvp": ("shapes:test", write_mmvp),
    "cv_bench": ("shapes:test", write_cv_bench),
    "mmstar": ("shapes:test", write_mmstar),
    "mme": ("shapes:test", write_mme),
}
"""By benchmark: the data set that its scenes are of, and what writes it: (folder, seed, wording)."""


def write_twins(out: Path, seed: int = 0, wording: Wording = "synthetic") -> None:
    """Write a folder for each benchmark.

    Args:
        out: the folder, which must not exist.
        seed: of the scenes and of the choice of questions.
        wording: whose words the questions have.

    Raises:
        ConfigError: the folder exists, or the seed is negative.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: expected the name of a new folder")
    if seed < 0:
        raise ConfigError(f"seed is {seed}: expected at least 0")
    with atomic_folder(out) as folder:
        for name in progress_bar("twins", list(TWINS), unit="benchmark"):
            write_twin(folder / name, name, seed, wording)


def write_twin(folder: Path, name: str, seed: int = 0, wording: Wording = "synthetic") -> None:
    """Write the twin of one benchmark to a new folder; see `write_twins`."""
    data, write = TWINS[name]
    folder.mkdir(parents=True)
    write(folder, seed, wording)
    about = (
        f"This is not {name}, but a laptop twin of it: its file format, filled with scenes of {data}.\n"
        f"Seed {seed}, {wording} wording. Scores on it say nothing about the benchmark.\n"
    )
    (folder / TWIN).write_text(about, encoding="utf-8")
