"""How many bytes a run will write, and whether its disks have room for them."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainer.dry_run.plan import Plan
from trainer.dry_run.sizes import FLOAT, gigabytes
from workbench.errors import RunError
from workbench.files import cache_folder


def check_disk(plan: Plan) -> None:
    """Check that checkpoints, the result and the frozen features fit on their disks.

    Raises:
        RunError: they do not; the message has the sizes that are needed and free.
    """
    recipe = plan.recipe
    saves = -(-recipe.optim.steps // recipe.save_every)  # including the one of the last step
    # the oldest checkpoint is removed only after the newest one is complete
    at_once = saves if recipe.keep_checkpoints is None else min(saves, recipe.keep_checkpoints + 1)
    models = 3 if recipe.keep_best else 1  # the old best model is removed only after the new one is complete
    output = at_once * plan.checkpoint + models * FLOAT * plan.sizes.total
    needs = {"checkpoints and result": (_nearest_existing(recipe.output_dir), output)}
    if plan.features:
        needs["frozen features"] = (_nearest_existing(cache_folder("features")), plan.features)
    for folder, _ in needs.values():
        device = folder.stat().st_dev
        on_this_disk = {what: size for what, (other, size) in needs.items() if other.stat().st_dev == device}
        needed, free = sum(on_this_disk.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise RunError(
                f"{', '.join(on_this_disk)} need about {gigabytes(needed)} in {folder}, where {gigabytes(free)} are"
                " free: make room, or choose another folder"
            )


def _nearest_existing(folder: Path) -> Path:
    """Return the folder itself or its nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
