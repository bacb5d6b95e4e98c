"""Checkpoints: written to a temporary folder, moved when they are complete, checked before a run is resumed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError, safe_open

from trainer import distributed
from workbench.errors import RunError
from workbench.files import share
from workbench.hashing import libraries
from workbench.training_folder import Checkpoint, best_of, checkpoints

log = logging.getLogger(__name__)
DAMAGED = "%s is damaged (%s) and is skipped"
SOURCES_FILE = "sources.json"  # in every checkpoint: what the run was trained on and began with
FILES_FILE = "files.json"  # in every checkpoint, written last: its files and their sizes in bytes
UNFINISHED = ".unfinished"  # folder of checkpoints that are being written; complete ones are moved out of it


def write_sources(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Store in a checkpoint the fingerprints of the data, models and VFMs of the run, and the versions of libraries."""
    (checkpoint / SOURCES_FILE).write_text(json.dumps(_sources(record) | {"libraries": libraries()}, indent=2))


def check_same_sources(checkpoint: Path, record: Mapping[str, Any], *, repaired: bool = False) -> list[str]:
    """Check that data, models and VFMs are the same as when `checkpoint` was written.

    A checkpoint without SOURCES_FILE, from before it was introduced, is not checked.

    Args:
        record: the training record of the resumed run.
        repaired: allow data sets with another fingerprint.

    Returns:
        Sentences for the record about allowed differences: another `data.max_length`, rows that are left out, repaired
        data, other versions of libraries.

    Raises:
        RunError: something else differs; names the first difference.
    """
    if not (checkpoint / SOURCES_FILE).exists():
        return []
    stored, current = json.loads((checkpoint / SOURCES_FILE).read_text()), _sources(record)
    notes = []
    step = checkpoint.name.removeprefix("checkpoint-")
    if current.get("dropped", 0) > stored.get("dropped", 0):
        left_out = current["dropped"] - stored.get("dropped", 0)
        notes.append(
            f"resumed at step {step} without {left_out} of {current['items']} conversations, each replaced by the next"
            " one"
        )
    if stored.get("max_length") != current.get("max_length"):
        notes.append(
            f"resumed at step {step} with data.max_length {current['max_length']}, which was"
            f" {stored.get('max_length')} before"
        )
    for name, release in stored.pop("libraries", libraries()).items():
        if (installed := libraries().get(name)) != release:
            notes.append(
                f"resumed with {name} {installed}, but {checkpoint} was written with {release}: the run does not equal"
                " an uninterrupted one to the bit"
            )
    for key in sorted((stored.keys() | current.keys()) - {"max_length", "dropped"}):
        if stored.get(key) != current.get(key):
            if key == "items":
                difference = (
                    f"{checkpoint} was trained on {stored.get(key)} items, and there are {current.get(key)} now"
                )
            else:
                difference = (
                    f"{checkpoint} was trained with the {key} fingerprint {stored.get(key)}, and it is"
                    f" {current.get(key)} now"
                )
            is_data = key in ("data", "val", "test")
            if not repaired or not is_data:
                hint = " (if a file of the data was repaired, add --repaired)" if is_data else ""
                raise RunError(
                    f"{difference}: expected the same content, since a resumed run must equal the uninterrupted one"
                    f"{hint}"
                )
            notes.append(f"resumed at step {step} with repaired data: {difference}")
            if key == "val" and (best := best_of(checkpoint.parent)):
                notes.append(
                    f"best/ holds step {best['step']:g}, whose score was measured before the validation data were"
                    " repaired; later scores are compared with it"
                )
    return notes


def _sources(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key.removesuffix("_fingerprint"): value
        for key, value in record.items()
        if key in ("data", "val", "test", "items", "max_length", "dropped") or key.endswith("_fingerprint")
    }


def check_same_launch(checkpoint: Path) -> None:
    """Check that `checkpoint` was written by as many ranks as there are now, with the model sharded in the same way.

    Otherwise sums would be added up in another order, or a rank would not find its state.

    Raises:
        RunError: the number of ranks or the way of sharding differs.
    """
    rng_files = len(list(checkpoint.glob("rng_state_*.pth")))  # one for each of several ranks, none for a single one
    wrote, now = rng_files or 1, distributed.count()
    if wrote != now:
        raise RunError(
            f"{checkpoint} was written by {wrote} processes, and now there are {now}: expected the same number, since a"
            " resumed run equals the uninterrupted one to the bit"
        )
    if list(checkpoint.glob("optimizer_*")):
        strategy = "fsdp"
    elif list(checkpoint.glob("global_step*")):
        strategy = "zero"
    else:
        strategy = "ddp"
    if not distributed.strategy().startswith(strategy):
        raise RunError(
            f"{checkpoint} was written with {strategy}, and this launch is {distributed.strategy()}: expected the same"
            " launch file"
        )


def publish_checkpoint(folder: Path, name: str, keep: int | None) -> None:
    """Move a complete checkpoint from the folder UNFINISHED to its place, and remove all but the newest `keep`.

    Args:
        folder: the output folder of the run.
        name: name of the checkpoint's folder.
        keep: how many checkpoints are kept; all if None.

    Raises:
        RunError: the checkpoint cannot be written.
    """
    try:
        _write_file_list(folder / UNFINISHED / name)
        share(folder / UNFINISHED / name)
        _remove(folder / name)  # a damaged checkpoint of this step, if the run was resumed from an earlier one
        (folder / UNFINISHED / name).rename(folder / name)
        _sync(folder)  # before older checkpoints are removed
        keep_newest(folder, keep)
    except OSError as error:
        raise RunError(f"cannot write checkpoint {folder / name} ({error.strerror or error})") from error


def _write_file_list(checkpoint: Path) -> None:
    """Write the list of a checkpoint's files, after making sure that all of them are on the disk.

    Thus even a power cut leaves either a complete checkpoint or one that is recognized as incomplete.
    """
    sizes = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        _sync(file)
        sizes[str(file.relative_to(checkpoint))] = file.stat().st_size
    (checkpoint / FILES_FILE).write_text(json.dumps(sizes, indent=2))
    for path in (checkpoint / FILES_FILE, *(path for path in checkpoint.rglob("*") if path.is_dir()), checkpoint):
        _sync(path)


def _sync(path: Path) -> None:
    """Wait until the content of a file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def whole_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the complete checkpoints of a run, by step: those whose files all exist and have their full size.

    Others are skipped with a warning.
    """
    whole = []
    for checkpoint in checkpoints(folder):
        if reason := _damage(checkpoint.folder):
            log.warning(DAMAGED, checkpoint.folder, reason)
        else:
            whole.append(checkpoint)
    return whole


def _damage(checkpoint: Path) -> str:
    """Return what is missing of a checkpoint; "" if nothing is."""
    try:
        sizes = json.loads((checkpoint / FILES_FILE).read_text())
    except (OSError, ValueError):
        sizes = None
    if not isinstance(sizes, dict) or not sizes:
        return f"{FILES_FILE} is missing or incomplete"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return ""


def unreadable_file(checkpoint: Path) -> str:
    """Return which file of a checkpoint cannot be read, although it has its full size, and why; "" if all can be read.

    Contents are compared with a checksum only in files that torch wrote, since only they have one.
    """
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".safetensors":
                safe_open(file, framework="pt")
            elif file.suffix in (".pt", ".pth"):
                with ZipFile(file) as archive:
                    if (member := archive.testzip()) is not None:
                        return f"{file.name} does not match its checksum in {member}"
        except (OSError, ValueError, BadZipFile, SafetensorError) as error:
            return f"{file.name} cannot be read ({' '.join(str(error).split())[:80]})"
    return ""


def keep_newest(folder: Path, keep: int | None) -> None:
    """Remove all complete checkpoints except the newest `keep`; none if `keep` is None."""
    for old in whole_checkpoints(folder)[: -keep if keep else 0]:
        _remove(old.folder)


def set_aside_later(folder: Path, checkpoint: Path | None) -> None:
    """Rename all checkpoints of full size after `checkpoint`, or all if it is None, to `damaged-checkpoint-STEP`.

    They are kept, since what could not be read now, such as on a network's disk, may be readable again.
    """
    for later in reversed(whole_checkpoints(folder)):
        if later.folder == checkpoint:
            break
        aside = folder / f"damaged-{later.folder.name}"
        shutil.rmtree(aside, ignore_errors=True)
        later.folder.rename(aside)
        log.warning("%s is kept as %s", later.folder, aside.name)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint in such a way that a run that is killed meanwhile leaves none that looks complete."""
    if checkpoint.exists():
        moved = checkpoint.parent / UNFINISHED / f"old-{checkpoint.name}"
        moved.parent.mkdir(exist_ok=True)
        shutil.rmtree(moved, ignore_errors=True)
        checkpoint.rename(moved)
        shutil.rmtree(moved, ignore_errors=True)
