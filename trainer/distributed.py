"""Several processes (ranks) as one training run: who writes, who waits, and how an error in one of them stops them all.

`accelerate launch` starts the processes and sets environment variables that say how the model is sharded. In a single
process these functions only call what they are given.
"""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from workbench.errors import ConfigError, RunError, WorkbenchError

if TYPE_CHECKING:
    from torch import Tensor

# How long the others wait while one process writes, checks or uploads a large model. A process that is killed is
# noticed at once, however long this is.
PATIENCE = timedelta(hours=3)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Strategy = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]


class ElsewhereError(RunError):
    """An error in another process, which also reports it; this process only stops."""


def count() -> int:
    """Return the number of processes of this run, over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Return whether this process is rank 0, which writes all files."""
    return rank() == 0


def strategy() -> Strategy:
    """Return how `accelerate launch` shards the training; `ddp` keeps the whole model in every process."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "fsdp"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return {"1": "zero1", "2": "zero2", "3": "zero3"}[stage]  # type: ignore[return-value]
    return "ddp"


def is_sharded() -> bool:
    """Return whether the weights are sharded, so that each process stores a part of them.

    All processes must then run the same modules in every pass, because the weights of a module are gathered from all.
    """
    return strategy() in ("fsdp", "zero3")


def local_part(parameter: Tensor) -> Tensor:
    """Return this process's part of a parameter that FSDP shards, or the whole of any other parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def start() -> None:
    """Connect the processes that `accelerate launch` started, with gloo where there is no GPU.

    Without a GPU, `accelerate launch --num_processes N` starts only one process; this function then starts all N.

    Raises:
        ConfigError: accelerate started one process without a GPU, and its command line does not say how many were
            meant.
    """
    if count() == 1:
        _start_again()
        return
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    cpu = not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    # without a GPU accelerate silently runs DDP instead of FSDP, although its FSDP2 code works on CPUs too
    if cpu and strategy() == "fsdp":
        state.distributed_type = DistributedType.MULTI_GPU
    if cpu and strategy().startswith("zero"):
        state.distributed_type = DistributedType.DEEPSPEED


def stop() -> None:
    """Disconnect the processes at the end of a run without errors."""
    if count() > 1:
        import torch

        torch.distributed.destroy_process_group()


def program(main: Callable[[], None]) -> None:
    """Run a whole program; where there are several processes, end each with `os._exit` after its exit functions.

    Gloo's threads keep running while something refers to the connection (FSDP does) or after another process was lost.
    If such a thread frees its last tensor while the Python interpreter shuts down, it aborts the process, even at the
    end of a run without errors.
    """
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    if count() > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether `error` means that another process ended and closed its connection (gloo)."""
    messages = ("Connection reset by peer", "Connection closed by peer", "Broken pipe")
    return count() > 1 and any(message in str(error) for message in messages)


def _start_again() -> None:
    """Start the N processes of `accelerate launch --num_processes N` where it started only one, because it saw no GPU.

    In that case accelerate sets an address in the environment but no number of processes; N is in its command line.
    """
    if "WORLD_SIZE" in os.environ or "MASTER_ADDR" not in os.environ or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return
    import psutil

    launch_options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launch_options.add_argument("--num_processes", "--num-processes", type=int, default=0)
    number = launch_options.parse_known_args(psutil.Process(os.getppid()).cmdline())[0].num_processes
    if number < 2:
        raise ConfigError(
            "accelerate started only one process, since it sees no GPU: expected accelerate launch --multi_gpu"
            " --num_processes N, which works without GPUs too"
        )
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(number),
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
    ]
    launch += ["--mixed_precision", os.environ["ACCELERATE_MIXED_PRECISION"], "--dynamo_backend", "no", "-m", "trainer"]
    del os.environ["MASTER_ADDR"]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*launch, *sys.argv[1:]])


def device() -> str:
    """Return the device of this process, such as `cuda:1`; each of several processes has its own GPU."""
    import torch

    if count() == 1:
        return "cuda" if torch.cuda.is_available() else "cpu"
    from accelerate import PartialState

    return str(PartialState().device)


def together(action: Callable[Arguments, Result], *args: Arguments.args, **options: Arguments.kwargs) -> Result:
    """Run `action(*args, **options)` in every process and return its result once all have finished.

    If it fails in one process, all of them raise, and only the main one reports the reason.

    Raises:
        WorkbenchError, OSError: in the main process: its own error, or a RunError with the message of another process.
        ElsewhereError: in the other processes.
    """
    if count() == 1:
        return action(*args, **options)
    result, error = None, None
    try:
        result = action(*args, **options)
    except (WorkbenchError, OSError) as caught:
        error = caught
    messages = gathered([None if error is None else str(error)])
    if any(message is not None for message in messages):
        if not is_main():
            raise ElsewhereError(next(message for message in messages if message is not None))
        if error is not None:
            raise error
        number = next(i for i, message in enumerate(messages) if message is not None)
        raise RunError(f"process {number}: {messages[number]}")
    return result  # type: ignore[return-value]


def on_main(action: Callable[Arguments, Result], *args: Arguments.args, **options: Arguments.kwargs) -> Result:
    """Run `action(*args, **options)` in the main process while the others wait, and return its result in all of them.

    The result must be picklable. If the action fails, all processes raise as in `together`.
    """
    result = together(lambda: action(*args, **options) if is_main() else None)
    return next(value for value in gathered([result]))  # type: ignore[return-value]


def gathered(values: Sequence[Any]) -> list[Any]:
    """Return, in every process, the values of all processes in the order of their ranks."""
    if count() == 1:
        return list(values)
    from accelerate.utils import gather_object

    return list(gather_object(list(values)))
