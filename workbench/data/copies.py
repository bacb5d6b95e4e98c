"""Whether the files of a benchmark are those of its authors, by their hashes, or a laptop twin."""

from __future__ import annotations

from collections.abc import Container, Sequence
from hashlib import file_digest
from pathlib import Path

TWIN = "TWIN.md"  # in the folder of a laptop twin
VLMEVALKIT = {  # MD5 sums of its tables (open-compass/VLMEvalKit, e8e78f05)
    "cv_bench": ("a7cff4cc2857cc237ee2b89e62bccb2d", "bb94c0d568d652d15b60e001ac40a170"),
    "mme": ("b36b43c3f09801f5d368627fb92187c3",),
    "mmstar": ("e1ecd2140806c1b1bbf54b43372efb9e",),
    "mmvp": ("8cb732b141a0cba5b42159df2839e557",),
    "pope": ("c12f5acb142f2ef1f85a26ba2fbe41d5",),
}


def label_version(labels: str, files: Sequence[tuple[Path, Container[str]]]) -> str:
    """Return whose labels a data set has, and whether its files are known: the title of its results.

    Args:
        labels: whose labels they are, such as "the authors' labels".
        files: each file or folder that was read, and the hashes of the known versions of it: SHA-256, or MD5 of a TSV.
    """
    if any((folder / TWIN).is_file() for file, _ in files for folder in (file, file.parent)):
        return "a laptop twin, not the benchmark"
    return f"{labels}, {copy_of(files)}"


def copy_of(files: Sequence[tuple[Path, Container[str]]]) -> str:
    """Return "verified copy" if every file has a known hash, else "unknown copy"; the argument is `label_version`'s."""
    verified = bool(files) and all(file.is_file() and _digest(file) in known for file, known in files)
    return f"{'verified' if verified else 'unknown'} copy"


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return file_digest(opened, "md5" if file.suffix == ".tsv" else "sha256").hexdigest()
