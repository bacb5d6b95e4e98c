"""Train several recipes, one after another, in the processes that `accelerate launch` started: -m tests.in_processes WORDS.json, a list of command lines."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from trainer import processes
from trainer.__main__ import read
from trainer.loop import train
from workbench.config import command


def main(argv: list[str]) -> None:
    processes.start()
    for words in json.loads(Path(argv[0]).read_text()):
        config = processes.together(lambda words=words: read(words))
        if config.resume:
            processes.on_main(lambda folder=config.output_dir: interrupted(folder))
        try:
            train(config, words)
        except processes.ElsewhereError:
            sys.exit(2)
    processes.stop()


def interrupted(folder: Path) -> None:
    """Make `X-again` of `X`: its recipe and its first checkpoint, which is what is left of a run that is killed after it."""
    whole = folder.with_name(folder.name.removesuffix("-again"))
    folder.mkdir()
    shutil.copy(whole / "recipe.yaml", folder)
    shutil.copytree(whole / "checkpoint-2", folder / "checkpoint-2")


if __name__ == "__main__":
    command(main)
