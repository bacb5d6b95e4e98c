"""Stored runs."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def environment(argv: list[str]) -> dict[str, object]:
    """What a result depends on besides its config: command, git commit, package versions, platform."""
    packages = {}
    for name in ("torch", "transformers", "timm", "nnsight", "numpy", "pillow", "viral-workbench"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "absent"
    return {"argv": argv, "git": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain")), "packages": packages, "platform": platform.platform()}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else ""
