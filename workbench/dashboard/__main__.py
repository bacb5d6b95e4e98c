"""Serve the dashboard, from a checkout or an installed package.

python -m workbench.dashboard --runs runs
python -m workbench.dashboard --runs runs --port 8502
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from workbench.cli import command, parse
from workbench.errors import ConfigError
from workbench.processes import environment, python


@dataclass(frozen=True)
class Config:
    """The runs that the dashboard shows, and the server's address."""

    runs: Path = Path("runs")
    """Folder of models and stored runs; it may be empty or not exist yet."""
    port: int = 0
    """Port of the server, 1 to 65535; by default 8501, or the next free one."""
    address: str = "127.0.0.1"
    """Address that the server listens on; 127.0.0.1 is reachable from this machine only. With any other address, such
    as 0.0.0.0, the pages start no analysis."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port is {self.port}: expected 1 to 65535, or no port, for the first free one")
        if self.runs.exists() and not self.runs.is_dir():
            raise ConfigError(f"runs is {self.runs}, a file: expected a folder")


def main(argv: list[str]) -> None:
    """Replace this process by the server, which runs until Ctrl-C."""
    config = parse(Config, argv, prog="python -m workbench.dashboard", description=__doc__ or "")
    script = str(resources.files("workbench.dashboard") / "served" / "app.py")
    port = ["--server.port", str(config.port)] if config.port else []
    words = python(
        ["-m", "streamlit", "run", script, *port, "--server.address", config.address, "--", "--runs", str(config.runs)]
    )
    os.execve(words[0], words, environment())


if __name__ == "__main__":
    command(main)
