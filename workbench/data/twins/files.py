"""Writing the files of a twin: images, JSON lines, CSV and parquet, as the benchmarks have them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

QUALITY = 95  # of JPEG, with colors at full resolution: a laptop model's images are small


def save_image(image: Image.Image, file: Path) -> None:
    """Write an image as JPEG or PNG, by the file's ending, and make its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".png":
        image.save(file)
    else:
        image.save(file, "JPEG", quality=QUALITY, subsampling=0)


def encoded(image: Image.Image, path: str) -> dict[str, Any]:
    """Return an image as parquet files of the hub have it: bytes and path."""
    content = BytesIO()
    image.save(content, "PNG")
    return {"bytes": content.getvalue(), "path": path}


def write_lines(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write a CSV file with the columns of the first row."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write a parquet file."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), file)
