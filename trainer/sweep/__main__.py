"""Train several variants with several seeds, and compare their accuracies.

python -m trainer.sweep shapes_seeds
python -m trainer.sweep ablation_layer --seeds 0 1 2
python -m trainer.sweep shapes_seeds --launcher submitit --slurm partition=gpu gpus_per_node=1 time=240
python -m trainer.sweep shapes_seeds --report                         # train nothing, compare the finished runs
python -m trainer.sweep shapes_seeds --report --figures paper         # and its figure as SVG, PDF, CSV, LaTeX ...
python -m trainer.sweep shapes_seeds --export docs/results/seeds      # store each run as a small JSON file
python -m trainer.sweep shapes_seeds --report --exported docs/results/seeds

A sweep is a name (`viral path` lists those in the package) or the path of a YAML file.

Finished runs are skipped and interrupted ones resumed, so the command can be repeated until all runs are finished. A
run that fails is named at the end, and the others continue. SIGTERM and Ctrl-C stop the trainings. The results are
`sweep-NAME.parquet` and `sweep-NAME.html` in the output folder, where NAME is that of the sweep's file.

Intervals are over seeds (Student's t). That of an accuracy has the shape of Wilson's interval, which never leaves 0 to
1. Differences are paired by seed. Their p is exact, from all sign flips, and so at least 2 / 2^S with S seeds; p_holm
is corrected for all variants of a question type (Holm).
"""

from __future__ import annotations

import shlex
import sys

from trainer.sweep.comparison import Runs, notes, report, write, write_figure
from trainer.sweep.results import export, finished
from trainer.sweep.runner import train_all
from trainer.sweep.spec import Sweep, check
from workbench.cli import command, number_text, parse
from workbench.errors import ConfigError, RunError
from workbench.files import check_can_make
from workbench.package_files import SWEEPS


def main(argv: list[str]) -> None:
    """Train the runs that are missing, print and store the comparison, and name the runs that failed."""
    prog = "python -m trainer.sweep SWEEP"
    if argv in (["--help"], ["-h"]):
        parse(Sweep, argv, prog=prog, description=__doc__ or "")
    if not argv or argv[0].startswith("-"):
        raise ConfigError("no sweep given: expected python -m trainer.sweep SWEEP [--option value ...]")
    file = SWEEPS.find(argv[0])
    sweep = parse(Sweep, argv[1:], prog=prog, description=__doc__ or "", recipe=file, called="sweep")
    for folder in filter(None, [sweep.figures, sweep.export]):
        check_can_make(folder)
    if sweep.dry_run:
        _plan(sweep)
        return
    if sweep.launcher == "submitit" and not sweep.report and sweep.export is None:
        _submit(sweep)
        return
    failed = {} if sweep.report or sweep.export else train_all(sweep)
    try:
        runs = finished(sweep)
        if sweep.export is not None:
            export(sweep.export, runs)
            sys.stdout.write(f"{len(runs)} of {len(list(sweep.runs()))} runs are in {sweep.export}\n")
        if sweep.report or sweep.export is None:
            _print(sweep, runs, file.stem)
    except RunError as error:
        if failed:
            raise _failure(failed) from error
        raise
    if failed:
        raise _failure(failed)


def _plan(sweep: Sweep) -> None:
    """Print the commands of the trainings or, for Slurm, their batch scripts."""
    if sweep.launcher == "submitit":
        from trainer.sweep.slurm import scripts

        for job, script in scripts(sweep):
            sys.stdout.write(f"### {job}: python -m trainer {shlex.join(job.arguments)}\n{script}\n")
    else:
        check(sweep)
        for job in sweep.jobs():
            done = "  # finished" if job.finished else ""
            sys.stdout.write(f"python -m trainer {shlex.join(job.arguments)}{done}\n")


def _submit(sweep: Sweep) -> None:
    """Submit the missing trainings as Slurm jobs, and print the numbers of the jobs."""
    from trainer.sweep.slurm import submit_all

    submitted, queued = submit_all(sweep)
    lines = [f"{name}: job {number}" for name, number in submitted.items()]
    lines += [f"{name}: job {number}, already in the queue" for name, number in queued.items()]
    done = sum(job.finished for job in sweep.jobs())
    lines += [f"{len(submitted)} jobs submitted, {len(queued)} in the queue, {done} runs finished"]
    sys.stdout.write("\n".join(lines) + "\n")


def _print(sweep: Sweep, runs: Runs, name: str) -> None:
    """Print and store the comparison of the finished runs."""
    table = report(sweep, runs)
    lines = [
        table.drop(columns="against").to_string(index=False, float_format=number_text, na_rep=""),
        *notes(sweep, runs, table),
        str(write(sweep, runs, table, name)),
    ]
    if sweep.figures is not None:
        lines += write_figure(sweep, runs, table, name, sweep.figures)
    sys.stdout.write("\n".join(lines) + "\n")


def _failure(failed: dict[str, str]) -> RunError:
    """Return the error that names the runs that failed, {run: reason}."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
    return RunError(
        f"{len(failed)} {'run is' if len(failed) == 1 else 'runs are'} missing ({reasons}); the same command tries them"
        " again"
    )


if __name__ == "__main__":
    command(main)
