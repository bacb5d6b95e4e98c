"""Commands of the project in a process that has already imported what they need: python -m tests.command_server.

A command in a process of its own spends five to seven seconds on importing torch, transformers and torchvision, which
was half of the suite's time. This process imports them once and forks for each command: the fork has the command's
words, folder, output and exit code. It starts no thread and runs no code of the project before the command does.
Requests and answers are JSON lines on stdin and stdout: {"start": arguments of `execute`} is answered with the process
number, {"wait": number, "block": true or false} with the exit code, or null if the process is still running.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import traceback
import warnings
from typing import NoReturn

# What commands import, but no module that is a command itself: those are executed anew.
MODULES = ("workbench.analysis.command", "workbench.analysis.report", "trainer.run", "trainer.checks", "tyro")


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: int | None = os.fork()
            if answer == 0:
                execute(**request["start"])
        else:
            ended, status = os.waitpid(request["wait"], 0 if request["block"] else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        print(json.dumps(answer), flush=True)


def execute(words: list[str], cwd: str, out: str, err: str, environment: dict[str, str | None]) -> NoReturn:
    """Be `python -m WORDS` in the folder `cwd`, with its output in two files; never returns.

    Args:
        environment: variables that differ from those of this process; None removes one.
    """
    for name, value in environment.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, (path, mode) in enumerate([(os.devnull, os.O_RDONLY), (out, os.O_WRONLY), (err, os.O_WRONLY)]):
        file = os.open(path, mode)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    sys.path[0] = cwd
    sys.argv = [words[0], *words[1:]]
    sys.orig_argv = [sys.executable, "-m", *words]
    warnings.resetwarnings()
    code = 0
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an interpreter that ends frees every object of the imports, which takes seconds


if __name__ == "__main__":
    main()
