"""A folder of the user's own photographs: no questions, no answers, just images.

sample:  photos/cat.jpg
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from workbench.data.base import DATASETS, Dataset, Sample, content_hash, subset, upright_rgb
from workbench.errors import DataError
from workbench.weights import sha256

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
QUESTION = "what is this ?"


@DATASETS.register("folder")
def folder(path: str, *, limit: int | None = None, seed: int = 0) -> Dataset:
    """Load every picture below `path` in name order; `limit` keeps a random subset drawn with `seed`.

    Raises:
        DataError: no such folder, or no pictures in it.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"folder '{path}' does not exist")
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"folder '{path}' holds no pictures: expected files ending in {', '.join(SUFFIXES)}")
    files = [files[i] for i in subset(len(files), limit, seed)]
    samples = [Sample(str(f.relative_to(root)), str(f.relative_to(root)), partial(read_image, f), question=QUESTION) for f in files]
    return Dataset(f"folder:{path}", samples, content_hash("folder", *(sha256(f) for f in files)))


def read_image(path: Path) -> Image.Image:
    """Read a picture as RGB, turned upright, transparency on white, first frame of an animation.

    Raises:
        DataError: truncated, not a picture, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = Image.open(path)
        with file:
            return upright_rgb(file)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning, DataError) as error:
        raise DataError(f"picture {path} cannot be read ({error})") from error


def file_sizes(root: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes of each file below `root` that is there, by its name; every folder is read once."""
    wanted: dict[str, dict[str, str]] = {}
    for name in names:
        parent, _, last = name.rpartition("/")
        wanted.setdefault(parent, {})[last] = name
    found: dict[str, int] = {}
    for parent, own in wanted.items():
        if (root / parent).is_dir():
            with os.scandir(root / parent) as entries:
                found |= {own[entry.name]: entry.stat().st_size for entry in entries if entry.name in own and entry.is_file()}
    return found


def missing(source: str, root: Path, names: Sequence[str]) -> str:
    """How many images that `source` names are not below `root`, in which folders, and the first of them."""
    folders = Counter(name.rpartition("/")[0] or "." for name in names)
    where = ", ".join(f"{folder} {count}" for folder, count in folders.most_common())
    counted = f"{len(names)} images of {source} are" if len(names) > 1 else f"1 image of {source} is"
    return f"{counted} not below {root} ({where}), first {', '.join(names[:3])}"
