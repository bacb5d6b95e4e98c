"""The trainings of a sweep as Slurm jobs, one each, through submitit (github.com/facebookincubator/submitit).

The command submits what is missing and returns; run it again to submit what failed, or with --report for the table. A
run that waits for the folder of another (--start) is submitted with a dependency on it. A job that is preempted, or
that comes to its time limit, goes back into the queue and resumes from its newest checkpoint.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm.slurm import SlurmExecutor

from trainer.sweep.spec import Job, Sweep, check
from workbench.errors import ConfigError, RunError, UnknownNameError, one_line
from workbench.files import atomic_file
from workbench.processes import environment, python
from workbench.training_folder import RECIPE_FILE

FOLDER = ".slurm"  # in the sweep's output folder: the logs of the jobs, and their numbers by run
IN_QUEUE = ("PENDING", "RUNNING", "REQUEUED", "CONFIGURING", "COMPLETING", "SUSPENDED")
DEFAULTS: Mapping[str, Any] = {"time": 24 * 60, "cpus_per_task": 4}


@dataclass(frozen=True)
class Training:
    """What a job does; submitit calls it, and calls `checkpoint` before a job loses its node."""

    arguments: tuple[str, ...]
    folder: Path
    processes: int
    threads: int

    def __call__(self) -> None:
        """Train, or go on with the run that is in the folder."""
        resume = ["--resume"] if (self.folder / RECIPE_FILE).exists() else []
        launch = ["-m", "trainer"]
        if self.processes > 1:
            launch = ["-m", "accelerate.commands.launch", "--num_processes", str(self.processes), *launch]
        words = python([*launch, *self.arguments, *resume])
        subprocess.run(words, env=environment(OMP_NUM_THREADS=str(self.threads)), check=True)

    def checkpoint(self) -> Any:
        """Return the same training, to be queued again."""
        return submitit.helpers.DelayedSubmission(self)


class Scripts(SlurmExecutor):
    """Writes the batch scripts of jobs on a machine without Slurm, and submits none."""

    @classmethod
    def affinity(cls) -> int:
        """Claim that there is a Slurm: nothing is asked of it."""
        return 1

    def script(self) -> str:
        """Return the batch script of a job with the executor's parameters."""
        return str(self._make_submission_file_text(self._submitit_command_str, ""))


def options(words: Iterable[str]) -> dict[str, Any]:
    """Return the parameters of sbatch in `words`, such as `partition=gpu` and `time=240` (minutes).

    Raises:
        ConfigError: not NAME=VALUE, or a value that sbatch's parameter cannot have.
        UnknownNameError: sbatch has no such parameter.
    """
    known = sorted(SlurmExecutor._valid_parameters() - {"job_name", "dependency", "num_gpus", "setup", "teardown"})
    parameters: dict[str, Any] = dict(DEFAULTS)
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise ConfigError(f"slurm is '{word}': expected NAME=VALUE, such as partition=gpu or time=240")
        if name not in known:
            raise UnknownNameError("slurm parameter", name, known)
        if name == "time" and not value.isdigit():
            raise ConfigError(f"slurm time is '{value}': expected minutes, such as time=240")
        parameters[name] = int(value) if value.isdigit() else value
    return parameters


def scripts(sweep: Sweep) -> Iterator[tuple[Job, str]]:
    """Yield the batch script of every training that is missing, and submit none; a job that waits for another says so
    with that run's name in place of its number."""
    check(sweep)
    executor = Scripts(sweep.output_dir / FOLDER)
    missing = {job.folder: job for job in sweep.jobs() if not job.finished}
    for job in missing.values():
        parent = missing.get(job.start) if job.start is not None else None
        executor.update_parameters(**_parameters(sweep, job, None if parent is None else str(parent)))
        yield job, executor.script()


def submit_all(sweep: Sweep) -> tuple[dict[str, str], dict[str, str]]:
    """Submit every training that is missing and in no queue.

    Returns:
        The numbers of the jobs submitted now, by run, and of those that were in the queue already.

    Raises:
        RunError: no Slurm on this machine, or it takes a job not.
    """
    check(sweep)
    folder = sweep.output_dir / FOLDER
    numbers: dict[str, str] = json.loads(_numbers(folder).read_text()) if _numbers(folder).exists() else {}
    missing = {job.folder: job for job in sweep.jobs() if not job.finished}
    waiting = {str(job): number for job in missing.values() if (number := _queued(folder, numbers.get(str(job))))}
    submitted: dict[str, str] = {}
    try:
        executor = SlurmExecutor(folder)
        for job in missing.values():
            if str(job) in waiting:
                continue
            parent = missing.get(job.start) if job.start is not None else None
            number = None if parent is None else (submitted | waiting)[str(parent)]
            parameters = _parameters(sweep, job, number)
            executor.update_parameters(**parameters)
            submitted[str(job)] = executor.submit(_training(job, parameters)).job_id
            with atomic_file(_numbers(folder)) as partial:
                partial.write_text(json.dumps(numbers | submitted, indent=2))
    except (
        RuntimeError,
        OSError,
        submitit.core.utils.FailedJobError,
        submitit.core.utils.FailedSubmissionError,
    ) as error:
        raise RunError(
            f"{len(submitted)} of {len(missing) - len(waiting)} jobs are submitted, then Slurm fails"
            f" ({one_line(error, 120)}): expected srun and sbatch on this machine, or --launcher local"
        ) from error
    return submitted, waiting


def _training(job: Job, parameters: Mapping[str, Any]) -> Training:
    processes = int(parameters.get("gpus_per_node", parameters.get("gpus_per_task", 1)))
    threads = max(1, int(parameters.get("cpus_per_task", 1)) // max(1, processes))
    return Training(tuple(job.arguments), job.folder, processes, threads)


def _parameters(sweep: Sweep, job: Job, after: str | None) -> dict[str, Any]:
    """The parameters of one job; `after` is the job whose model it starts from."""
    dependency = {"dependency": f"afterok:{after}", "additional_parameters": {"kill-on-invalid-dep": "yes"}}
    return options(sweep.slurm) | {"job_name": str(job)} | (dependency if after is not None else {"dependency": None})


def _queued(folder: Path, number: str | None) -> str | None:
    """The number of a job if it waits or runs, as far as Slurm knows."""
    if number is None:
        return None
    state = submitit.SlurmJob(folder, number).state
    return number if state.upper() in IN_QUEUE else None


def _numbers(folder: Path) -> Path:
    return folder / "jobs.json"
