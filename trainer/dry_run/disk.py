"""How much a run will write, and whether there is room for it."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainer.dry_run.plan import Plan
from trainer.dry_run.sizes import FLOAT, gigabytes
from workbench.errors import RunError
from workbench.files import cache_folder


def check_disk(found: Plan) -> None:
    """See that checkpoints, the result and the frozen features fit on their disks.

    Raises:
        RunError: says how much is needed and how much is free.
    """
    recipe = found.recipe
    saves = -(-recipe.optim.steps // recipe.save_every)  # the last step is always kept
    # the next one is whole before the oldest goes
    kept = min(saves, saves if recipe.keep_checkpoints is None else recipe.keep_checkpoints + 1)
    need = {
        "checkpoints and result": (_standing(recipe.output_dir), kept * found.checkpoint + FLOAT * found.sizes.total)
    }
    if found.features:
        need["frozen features"] = (_standing(cache_folder("features")), found.features)
    for folder, _ in need.values():
        same = {what: size for what, (other, size) in need.items() if other.stat().st_dev == folder.stat().st_dev}
        free = shutil.disk_usage(folder).free
        if sum(same.values()) > free:
            raise RunError(
                f"{', '.join(same)} need about {gigabytes(sum(same.values()))} in {folder}, where {gigabytes(free)} are"
                " free"
            )


def _standing(folder: Path) -> Path:
    """The nearest folder that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
