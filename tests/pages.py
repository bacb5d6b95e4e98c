"""The README and the pages of docs/ as tests read them."""

from __future__ import annotations

import re

from tests.conftest import ROOT

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


def commands(page: str) -> list[str]:
    """The lines of a page's `bash` blocks."""
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]
