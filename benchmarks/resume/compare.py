"""Compare two training folders, to the bit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader

WALL_CLOCK = {"seconds", "steps_per_second", "created"}
# keys that may differ between two equal runs: wall-clock values, and what names a folder, the command or the commit
OF_THIS_RUN = WALL_CLOCK | {"argv", "output_dir", "resume", "start", "git", "dirty"}


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between two folders: missing or additional files, and differing contents.

    Wall-clock values and the names of folders are ignored.
    """
    names = [{str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} for folder in (one, other)]
    # links to the shared cache, and locks, which are free when their process is dead
    ignored = re.compile(r"^cache/(?!features)|\.lock$")
    names = [{name for name in of_folder if not ignored.search(name)} for of_folder in names]
    wrong = [f"{name} is {'missing' if name in names[0] else 'left over'}" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        first, second = (content(folder / name) for folder in (one, other))
        wrong += [f"{name}: {why}" for why in unequal(first, second)][:4]
    return wrong


def content(file: Path) -> Any:
    """Return the content of a file as nested dicts and lists of tensors and plain values."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            return {"metadata": tensors.metadata(), **{name: tensors.get_tensor(name) for name in tensors.keys()}}  # noqa: SIM118
    if file.suffix in (".pt", ".pth"):
        return plain(torch.load(file, weights_only=False))
    # metadata of a sharded checkpoint; its folder and the number of the save may differ between runs
    if file.name == ".metadata":
        parts = FileSystemReader(file.parent).read_metadata()
        return {"tensors": parts.state_dict_metadata, "places": parts.storage_data}
    if file.suffix == ".parquet":
        table = pd.read_parquet(file)
        columns = {name: table[name].tolist() for name in table.columns}
        return plain({"columns": list(table.columns), "rows": len(table), **columns})
    if file.name == "files.json":  # its sizes are not compared: some of the files hold wall-clock values
        return sorted(json.loads(file.read_text()))
    if file.suffix in (".json", ".yaml"):
        return plain(yaml.safe_load(file.read_text()) if file.suffix == ".yaml" else json.loads(file.read_text()))
    if file.name == "README.md":
        return file.read_text().rpartition(", ")[0]  # its last word is the date
    return file.read_bytes()


def plain(value: Any) -> Any:
    """Return `value` without the keys that may differ between any two runs."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if key not in OF_THIS_RUN}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def unequal(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Yield where two contents differ, to the bit; NaN equals NaN."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            if key not in one or key not in other:
                yield f"{where}{key} is in one of them only"
            else:
                yield from unequal(one[key], other[key], f"{where}{key}/")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from unequal(*pair, f"{where}{number}/")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield f"{where[:-1]} differs"
    elif one != other and not (one != one and other != other):
        yield f"{where[:-1]} is {str(other)[:60]} and should be {str(one)[:60]}"
