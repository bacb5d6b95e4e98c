"""Checkpoints: written aside, published whole, checked before a run goes on from one."""

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
from workbench.training_folder import Checkpoint, checkpoints

log = logging.getLogger(__name__)
DAMAGED = "%s is damaged (%s) and is skipped"
SOURCES_FILE = "sources.json"  # in every checkpoint
FILES_FILE = "files.json"  # in every checkpoint, written last: its files and their bytes
UNFINISHED = ".unfinished"  # checkpoints that are being written; whole ones are moved out of it


def write_sources(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Keep in a checkpoint the fingerprints of what the run learns from and began with."""
    (checkpoint / SOURCES_FILE).write_text(json.dumps(_sources(record) | {"libraries": libraries()}, indent=2))


def check_same_sources(checkpoint: Path, record: Mapping[str, Any], *, repaired: bool = False) -> list[str]:
    """See that data, models and VFMs are those that `checkpoint` was trained with (one of before they were kept there
    says nothing).

    Returns:
        What the record is to say: another max_length, rows that are left out, data that were repaired, other releases
            of libraries.

    Args:
        repaired: data of another fingerprint goes on.

    Raises:
        RunError: names the first that differs.
    """
    if not (checkpoint / SOURCES_FILE).exists():
        return []
    stored, own, said = json.loads((checkpoint / SOURCES_FILE).read_text()), _sources(record), []
    step = checkpoint.name.removeprefix("checkpoint-")
    if own.get("dropped", 0) > stored.get("dropped", 0):
        left_out = own["dropped"] - stored.get("dropped", 0)
        said.append(
            f"resumed at step {step} without {left_out} of {own['items']} conversations, in whose place the next ones"
            " come"
        )
    if stored.get("max_length") != own.get("max_length"):
        said.append(
            f"resumed at step {step} with data.max_length {own['max_length']}, which was {stored.get('max_length')}"
            " before"
        )
    for name, release in stored.pop("libraries", libraries()).items():
        if (here := libraries().get(name)) != release:
            said.append(
                f"resumed with {name} {here}, and {checkpoint} was written with {release}: the run is not to the bit"
                " the uninterrupted one"
            )
    for key in sorted((stored.keys() | own.keys()) - {"max_length", "dropped"}):
        if stored.get(key) != own.get(key):
            differs = (
                f"{checkpoint} was trained with the {key} {'' if key == 'items' else 'fingerprint '}{stored.get(key)},"
                f" and it is {own.get(key)} now"
            )
            if not repaired or key not in ("data", "val", "test"):
                more = (
                    " (for data with a file that was repaired, say --repaired)"
                    if key in ("data", "val", "test")
                    else ""
                )
                raise RunError(
                    f"{differs}: expected the same content, since a resumed run is the uninterrupted one{more}"
                )
            said.append(f"resumed at step {step} with repaired data: {differs}")
    return said


def _sources(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key.removesuffix("_fingerprint"): value
        for key, value in record.items()
        if key in ("data", "val", "test", "items", "max_length", "dropped") or key.endswith("_fingerprint")
    }


def check_same_launch(checkpoint: Path) -> None:
    """See that as many processes go on as wrote `checkpoint`, and with their model divided alike: others would add up
    in another order, or find no state."""
    parts = len(list(checkpoint.glob("rng_state_*.pth")))  # one in each of several processes
    wrote, own = parts or 1, distributed.count()
    if wrote != own:
        raise RunError(
            f"{checkpoint} was written by {wrote} processes, and these are {own}: expected as many, since a resumed run"
            " continues to the bit"
        )
    divided = (
        "fsdp" if list(checkpoint.glob("optimizer_*")) else "zero" if list(checkpoint.glob("global_step*")) else "ddp"
    )
    if not distributed.strategy().startswith(divided):
        raise RunError(
            f"{checkpoint} was written with {divided}, and this launch is {distributed.strategy()}: expected the same"
            " launch file"
        )


def publish_checkpoint(folder: Path, name: str, keep: int | None) -> None:
    """Move a checkpoint that was written to its end to where it is found, and remove all but the newest `keep`.

    Raises:
        RunError: the disk refuses.
    """
    try:
        _write_files(folder / UNFINISHED / name)
        share(folder / UNFINISHED / name)
        _remove(folder / name)  # a damaged one, before which the run was resumed
        (folder / UNFINISHED / name).rename(folder / name)
        _on_disk(folder)  # before older ones go
        keep_newest(folder, keep)
    except OSError as error:
        raise RunError(f"cannot write checkpoint {folder / name} ({error.strerror or error})") from error


def _write_files(checkpoint: Path) -> None:
    """List what a checkpoint holds, all of it on the disk by then: a power cut, too, leaves a whole checkpoint or one
    that is seen to be none."""
    sizes = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        _on_disk(file)
        sizes[str(file.relative_to(checkpoint))] = file.stat().st_size
    (checkpoint / FILES_FILE).write_text(json.dumps(sizes, indent=2))
    for path in (checkpoint / FILES_FILE, *(path for path in checkpoint.rglob("*") if path.is_dir()), checkpoint):
        _on_disk(path)


def _on_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlive a power cut."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def whole_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints by step that a run can be resumed from: those whose files are all there, in their whole
    length."""
    found = []
    for checkpoint in checkpoints(folder):
        if why := _damage(checkpoint.folder):
            log.warning(DAMAGED, checkpoint.folder, why)
        else:
            found.append(checkpoint)
    return found


def _damage(checkpoint: Path) -> str:
    try:
        sizes = json.loads((checkpoint / FILES_FILE).read_text())
    except (OSError, ValueError):
        sizes = None
    if not isinstance(sizes, dict) or not sizes:
        return f"{FILES_FILE} is not there or not whole"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is not there"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return ""


def unreadable_file(checkpoint: Path) -> str:
    """Which of the files that a run would be resumed from cannot be read, though they have their length; only what
    torch wrote has checksums within."""
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".safetensors":
                safe_open(file, framework="pt")
            elif file.suffix in (".pt", ".pth"):
                with ZipFile(file) as archive:
                    if (part := archive.testzip()) is not None:
                        return f"{file.name} does not match its checksum in {part}"
        except (OSError, ValueError, BadZipFile, SafetensorError) as error:
            return f"{file.name} cannot be read ({' '.join(str(error).split())[:80]})"
    return ""


def keep_newest(folder: Path, keep: int | None) -> None:
    """Remove all whole checkpoints but the newest `keep`."""
    for old in whole_checkpoints(folder)[: -keep if keep else 0]:
        _remove(old.folder)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; killed meanwhile, it leaves none that looks whole."""
    if checkpoint.exists():
        aside = checkpoint.parent / UNFINISHED / f"old-{checkpoint.name}"
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
