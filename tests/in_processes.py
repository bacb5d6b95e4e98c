"""Train several recipes, one after another, in the processes that `accelerate launch` started: -m tests.in_processes
WORDS.json, a list of command lines.

$DIE_AT is the end of a path: the process that opens such a file kills itself there and then.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from trainer import distributed
from trainer.__main__ import read
from trainer.run import train
from workbench.cli import command


def main(argv: list[str]) -> None:
    sys.addaudithook(die)
    distributed.start()
    for words in json.loads(Path(argv[0]).read_text()):
        config = distributed.together(lambda words=words: read(words))
        if config.resume:
            distributed.on_main(lambda folder=config.output_dir: interrupted(folder))
        try:
            train(config, words)
        except distributed.ElsewhereError:
            sys.exit(2)
    distributed.stop()


def die(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and "DIE_AT" in os.environ and str(arguments[0]).endswith(os.environ["DIE_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)


def interrupted(folder: Path) -> None:
    """Make `X-again` of `X`: its recipe and its first checkpoint, which is what is left of a run that is killed after
    it."""
    whole = folder.with_name(folder.name.removesuffix("-again"))
    folder.mkdir()
    shutil.copy(whole / "recipe.yaml", folder)
    shutil.copytree(whole / "checkpoint-2", folder / "checkpoint-2")


if __name__ == "__main__":
    distributed.program(lambda: command(main))
