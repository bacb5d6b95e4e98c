"""Several processes as one training run: who writes, who waits, and how the error of one process stops all of them with
one sentence.

`accelerate launch` starts the processes and says through the environment how the model is divided; with one process
nothing here does anything.
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

# while one process writes, checks or sends a large model; one that is killed is noticed at once, whatever this is
PATIENCE = timedelta(hours=3)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Strategy = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]


class ElsewhereError(RunError):
    """Another process says what went wrong; this one only stops."""


def count() -> int:
    """Processes of this run, over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes for all."""
    return rank() == 0


def strategy() -> Strategy:
    """How `accelerate launch` was asked to divide the work; `ddp` keeps the whole model in every process."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "fsdp"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return {"1": "zero1", "2": "zero2", "3": "zero3"}[stage]  # type: ignore[return-value]
    return "ddp"


def divided() -> bool:
    """Whether every process holds a part of the weights: all must then run the same modules in every pass, since a
    module's weights are gathered from all."""
    return strategy() in ("fsdp", "zero3")


def own_part(parameter: Tensor) -> Tensor:
    """This process's part of a parameter that FSDP divides; the whole of any other."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def start() -> None:
    """Connect the processes that `accelerate launch` started, with gloo where there is no GPU.

    Raises:
        ConfigError: accelerate was asked for several processes and started one, as it does where it sees no GPU, and
            how many is not to be found out.
    """
    if count() == 1:
        _start_again()
        return
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    cpu = not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    # accelerate would ignore FSDP there and run DDP without a word; its FSDP2 code itself runs on a CPU
    if cpu and strategy() == "fsdp":
        state.distributed_type = DistributedType.MULTI_GPU
    if cpu and strategy().startswith("zero"):
        state.distributed_type = DistributedType.DEEPSPEED


def stop() -> None:
    """Disconnect, in a run that ended well."""
    if count() > 1:
        import torch

        torch.distributed.destroy_process_group()


def program(main: Callable[[], None]) -> None:
    """Run a whole program, and let each of several processes leave without Python's own end but for its exit functions.

    Gloo's threads outlive the connection where something still refers to it, as FSDP does, or another process was lost;
    and one that lets go of its last tensor while Python ends aborts the process, also in a run that ended well.
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


def lost(error: RuntimeError) -> bool:
    """Whether `error` is that the process at the other end of a connection is gone (gloo)."""
    return count() > 1 and any(
        words in str(error) for words in ("Connection reset by peer", "Connection closed by peer", "Broken pipe")
    )


def _start_again() -> None:
    """Start the processes that `accelerate launch --num_processes N` was asked for; without a GPU it starts one,
    leaving nothing but an address."""
    if "WORLD_SIZE" in os.environ or "MASTER_ADDR" not in os.environ or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return
    import psutil

    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--num_processes", "--num-processes", type=int, default=0)
    number = asked.parse_known_args(psutil.Process(os.getppid()).cmdline())[0].num_processes
    if number < 2:
        raise ConfigError(
            "accelerate started one process of several: expected accelerate launch --multi_gpu --num_processes N, which"
            " works without GPUs too"
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
    """Where this process computes: a GPU of its own in each of several processes."""
    import torch

    if count() == 1:
        return "cuda" if torch.cuda.is_available() else "cpu"
    from accelerate import PartialState

    return str(PartialState().device)


def together(action: Callable[Arguments, Result], *args: Arguments.args, **options: Arguments.kwargs) -> Result:
    """Run `action(*args, **options)` in every process and wait for all; if it fails in one, every process stops, and
    only one says why.

    Raises:
        WorkbenchError, OSError: in the main process, its own or what happened in another one.
        ElsewhereError: in the others.
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
    """Run `action(*args, **options)` in the main process while the others wait; all get its result, which must be
    picklable, or stop with its error."""
    result = together(lambda: action(*args, **options) if is_main() else None)
    return next(value for value in gathered([result]))  # type: ignore[return-value]


def gathered(values: Sequence[Any]) -> list[Any]:
    """The values of all processes, those of process 0 first; in every process."""
    if count() == 1:
        return list(values)
    from accelerate.utils import gather_object

    return list(gather_object(list(values)))
