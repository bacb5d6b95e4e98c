"""The trainings of a sweep as Slurm jobs, one job each, through submitit (github.com/facebookincubator/submitit).

The command submits the missing trainings and returns. Run it again to submit those that failed, or with --report for
the comparison. A training that starts from another one (--start) is submitted with a dependency on its job. A job that
is preempted, or reaches its time limit, goes back into the queue and resumes from its newest checkpoint.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm.slurm import SlurmExecutor

from trainer.sweep.runner import is_ready
from trainer.sweep.spec import Job, Sweep, check
from workbench.errors import ConfigError, RunError, UnknownNameError, one_line
from workbench.files import atomic_file
from workbench.processes import environment, python
from workbench.training_folder import RECIPE_FILE

FOLDER = ".slurm"  # in the sweep's output folder: the logs of the jobs, and their numbers by run
NUMBERS = "jobs.json"
IN_QUEUE = ("PENDING", "RUNNING", "REQUEUED", "CONFIGURING", "COMPLETING", "SUSPENDED")
UNSURE = ("UNKNOWN", "PREEMPTED", "NODE_FAIL")  # new to sacct, or of a cluster without accounting; or queued again
DEFAULTS: Mapping[str, Any] = {"time": 24 * 60, "cpus_per_task": 4}
# parameters of submitit that are set here, or that have no meaning for jobs of one training each
NOT_OPTIONS = {"job_name", "dependency", "num_gpus", "setup", "teardown", "additional_parameters", "array_parallelism"}
ONE = ("nodes", "ntasks_per_node")  # every task would train the same model in the same folder
SWITCHES = ("exclusive", "use_srun", "stderr_to_stdout")
YES, NO = ("yes", "true", "1"), ("no", "false", "0")


@dataclass(frozen=True)
class Training:
    """The function of a job, which submitit calls; it calls `checkpoint` before a job loses its node.

    Attributes:
        arguments: what follows `python -m trainer` on the command line.
        folder: output folder of the training.
        processes: number of processes, one for each GPU.
        threads: threads of each process.
    """

    arguments: tuple[str, ...]
    folder: Path
    processes: int
    threads: int

    def __call__(self) -> None:
        """Train, or resume the run in the folder."""
        resume = ["--resume"] if (self.folder / RECIPE_FILE).exists() else []
        launch = ["-m", "trainer"]
        if self.processes > 1:
            launch = ["-m", "accelerate.commands.launch", "--num_processes", str(self.processes), *launch]
        command = python([*launch, *self.arguments, *resume])
        subprocess.run(command, env=environment(OMP_NUM_THREADS=str(self.threads)), check=True)

    def checkpoint(self) -> Any:
        """Return the same training, to be queued again."""
        return submitit.helpers.DelayedSubmission(self)


class Scripts(SlurmExecutor):
    """An executor that makes batch scripts, also on a machine without Slurm, and submits nothing."""

    @classmethod
    def affinity(cls) -> int:
        """Return 1, which means that Slurm is there; this executor never uses it."""
        return 1

    def script(self) -> str:
        """Return the batch script of a job with the executor's parameters."""
        return str(self._make_submission_file_text(self._submitit_command_str, ""))


def options(words: Iterable[str]) -> dict[str, Any]:
    """Parse parameters of sbatch, such as `partition=gpu` and `time=240` (minutes), and add the defaults.

    Raises:
        ConfigError: a word is not NAME=VALUE, or the parameter cannot have this value.
        UnknownNameError: there is no such parameter.
    """
    known = sorted(SlurmExecutor._valid_parameters() - NOT_OPTIONS)
    parameters: dict[str, Any] = dict(DEFAULTS)
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise ConfigError(f"slurm is '{word}': expected NAME=VALUE, such as partition=gpu or time=240")
        if name not in known:
            raise UnknownNameError("slurm parameter", name, known)
        parameters[name] = _value(name, value)
    gpus(parameters)
    return parameters


def _value(name: str, value: str) -> Any:
    """Return the value of a parameter as submitit takes it.

    Raises:
        ConfigError: the parameter cannot have this value.
    """
    if name == "time" and not value.isdecimal():
        raise ConfigError(f"slurm time is '{value}': expected minutes, such as time=240")
    if name == "cpus_per_task" and not value.isdecimal():
        raise ConfigError(f"slurm cpus_per_task is '{value}': expected a whole number")
    if name in ONE and value != "1":
        raise ConfigError(
            f"slurm {name} is '{value}': expected 1, since each job is one training on one node, with a process for"
            " each GPU (gpus_per_node)"
        )
    if name == "srun_args":
        return shlex.split(value)
    if name in SWITCHES and value.lower() in (*YES, *NO):
        return value.lower() in YES
    if name in SWITCHES and name != "exclusive":  # which also takes user and mcs
        raise ConfigError(f"slurm {name} is '{value}': expected yes or no")
    return int(value) if value.isdecimal() and str(int(value)) == value else value  # an account may be 007


def gpus(parameters: Mapping[str, Any]) -> int:
    """Return the number of GPUs of a job, 1 if its parameters name none; a type, as in a100:4, may come first.

    Raises:
        ConfigError: the number cannot be read.
    """
    name = next((name for name in ("gpus_per_node", "gpus_per_task", "gres") if name in parameters), None)
    if name is None:
        return 1
    count = 0
    for part in re.sub(r"\([^)]*\)", "", str(parameters[name])).split(","):  # without sockets, as in gpu:2(S:0-1)
        kind, _, rest = part.partition(":") if name == "gres" else ("gpu", ":", part)
        if kind != "gpu":
            continue
        match = re.fullmatch(r"(?:[\w.-]+:)?(\d+)|[\w.-]*", rest)
        if match is None:
            raise ConfigError(f"slurm {name} is '{parameters[name]}': expected a number of GPUs, such as 4 or a100:4")
        count += int(match[1] or 1)
    return max(1, count)


def scripts(sweep: Sweep) -> Iterator[tuple[Job, str]]:
    """Yield every missing training with its batch script, and submit nothing.

    A script that depends on another job has the name of that training instead of a job number.
    """
    check(sweep)
    executor = Scripts(sweep.output_dir / FOLDER)
    for job, parent in _missing(sweep):
        executor.update_parameters(**_parameters(sweep, job, None if parent is None else str(parent)))
        yield job, executor.script()


def submit_all(sweep: Sweep) -> tuple[dict[str, str], dict[str, str]]:
    """Submit every missing training that is not in the queue.

    Returns:
        The numbers of the jobs that were submitted, and of those that were already in the queue, by run.

    Raises:
        RunError: there is no Slurm on this machine, or it refuses a job.
    """
    check(sweep)
    folder = sweep.output_dir / FOLDER
    numbers, missing = _numbers(folder), _missing(sweep)
    queued = {str(job): number for job, _ in missing if (number := _queued(folder, numbers.get(str(job))))}
    submitted: dict[str, str] = {}
    try:
        executor = SlurmExecutor(folder)
        for job, parent in missing:
            if str(job) in queued:
                continue
            number = None if parent is None else (submitted | queued)[str(parent)]
            parameters = _parameters(sweep, job, number)
            executor.update_parameters(**parameters)
            submitted[str(job)] = executor.submit(training_of(job, parameters)).job_id
            with atomic_file(folder / NUMBERS) as partial:
                partial.write_text(json.dumps(numbers | submitted, indent=2))
    except (
        RuntimeError,
        OSError,
        submitit.core.utils.FailedJobError,
        submitit.core.utils.FailedSubmissionError,
    ) as error:
        raise RunError(
            f"{len(submitted)} of {len(missing) - len(queued)} jobs are submitted, then Slurm fails"
            f" ({one_line(error, 120)}): expected srun and sbatch on this machine, or --launcher local"
        ) from error
    return submitted, queued


def _missing(sweep: Sweep) -> list[tuple[Job, Job | None]]:
    """List the missing trainings, each after the one whose model it starts from, and with that one if it is missing.

    Raises:
        RunError: a training starts from a folder that is not finished and that no other one trains.
    """
    waiting = {job.folder: job for job in sweep.jobs() if not job.finished}
    ordered: dict[Path, tuple[Job, Job | None]] = {}
    while waiting:
        ready = [job for job in waiting.values() if is_ready(job) or job.start in ordered]
        if not ready:
            job = next(iter(waiting.values()))
            raise RunError(
                f"{job} starts from {job.start}, which is not the folder of a finished training and which no other run"
                " of the sweep trains: train it first"
            )
        for job in ready:
            parent = ordered.get(job.start) if job.start is not None else None
            ordered[job.folder] = job, parent[0] if parent is not None else None
            del waiting[job.folder]
    return list(ordered.values())


def training_of(job: Job, parameters: Mapping[str, Any]) -> Training:
    """Return the function of a job: one process for each GPU, which share the CPUs."""
    processes = gpus(parameters)
    threads = max(1, int(parameters["cpus_per_task"]) // processes)
    return Training(tuple(job.arguments), job.folder, processes, threads)


def _parameters(sweep: Sweep, job: Job, after: str | None) -> dict[str, Any]:
    """Return the parameters of a job; `after` is the number of the job that it depends on, if any."""
    dependency = {"dependency": f"afterok:{after}", "additional_parameters": {"kill-on-invalid-dep": "yes"}}
    return options(sweep.slurm) | {"job_name": str(job)} | (dependency if after is not None else {"dependency": None})


def _queued(folder: Path, number: str | None) -> str | None:
    """Return the number of a job if Slurm says that it waits or runs, else None."""
    if number is None:
        return None
    state = submitit.SlurmJob(folder, number).state.upper()
    return number if state in IN_QUEUE or (state in UNSURE and _in_squeue(number)) else None


def _in_squeue(number: str) -> bool:
    """Return whether squeue, which needs no accounting and knows a job at once, lists a job."""
    words = ["squeue", "--noheader", "--format=%i", "--jobs", number]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.returncode == 0 and bool(done.stdout.strip())  # it refuses numbers of jobs that have long ended


def _numbers(folder: Path) -> dict[str, str]:
    """Return the numbers of the jobs that were submitted before, by run.

    Raises:
        RunError: their file is damaged.
    """
    file = folder / NUMBERS
    try:
        numbers: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise RunError(
            f"{file} is damaged ({one_line(error, 100)}): delete it when no job of this sweep is in the queue"
        ) from error
    return numbers
