"""Sweeps as Slurm jobs: the batch scripts, and jobs that really run, under an `sbatch` that keeps them in a folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import submitit

from tests.conftest import SMALL, recipe, refused, run
from tests.stored_runs import store_run
from trainer.sweep.slurm import gpus, options, scripts, submit_all, training_of
from trainer.sweep.spec import Sweep
from workbench.errors import ConfigError, RunError, UnknownNameError, WorkbenchError
from workbench.yaml_config import as_mapping

TINY = [*SMALL, "--optim.steps", "2", "--data.limit_train", "4", "--data.limit_val", "2", "--model.layers", "1"]
LINE = " ".join([recipe("baseline"), "--start {output_dir}/stage1", *TINY, "--alignment.objective none"])
SWEEP = Sweep(
    first=" ".join(["stage1:", recipe("stage1"), *TINY]),
    variants=(f"baseline: {LINE}",),
    seeds=(0, 1),
    launcher="submitit",
    slurm=("partition=gpu", "time=240"),
)
SBATCH = """#!/bin/sh
n=$(ls {queue} | wc -l); cp "$1" {queue}/$n.sh; echo "Submitted batch job $n"
"""
SRUN = """#!/bin/sh
while :; do case $1 in --unbuffered) shift;; --output|--error) shift 2;; *) break;; esac; done
exec "$@"
"""
SACCT = """#!/bin/sh
echo 'JobID|State|NodeList'; while read n state; do echo "$n|$state|here"; done < {states}
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty queue; `states` beside it holds what sacct says."""
    queue, states, bin_ = (tmp_path / name for name in ("queue", "states", "bin"))
    queue.mkdir()
    bin_.mkdir()
    states.touch()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        (bin_ / name).write_text(text.format(queue=queue, states=states))
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    submitit.SlurmJob.watcher.clear()  # it remembers jobs of other tests in this process
    return queue


def test_the_scripts_are_printed_on_a_machine_without_slurm(tmp_path: Path) -> None:
    sweep = replace(SWEEP, output_dir=tmp_path / "runs")
    texts = {str(job): script for job, script in scripts(sweep)}
    assert [*texts] == ["stage1", "baseline-s0", "baseline-s1"]
    assert not sweep.output_dir.exists()
    for name, text in texts.items():
        assert f"#SBATCH --job-name={name}\n" in text
        assert "#SBATCH --partition=gpu\n" in text
        assert "#SBATCH --time=240\n" in text
        assert f"submitit.core._submit {sweep.output_dir}/.slurm" in text
    assert "dependency" not in texts["stage1"]
    assert "#SBATCH --dependency=afterok:stage1\n" in texts["baseline-s1"]


@pytest.mark.slow
def test_by_the_command(tmp_path: Path) -> None:
    words = ["trainer.sweep", "shapes_seeds", "--output_dir", str(tmp_path / "runs"), "--seeds", "3", "--dry_run"]
    printed = run(*words, "--launcher", "submitit", "--slurm", "gpus_per_node=2", "cpus_per_task=16").stdout
    assert "### baseline-s3: python -m trainer " in printed
    assert "#SBATCH --gpus-per-node=2" in printed
    assert run(*words).stdout.count("python -m trainer ") == printed.count("### ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_jobs_train_and_are_submitted_once(tmp_path: Path, cluster: Path) -> None:
    sweep = replace(SWEEP, output_dir=tmp_path / "runs", seeds=(0,))
    assert submit_all(sweep) == ({"stage1": "0", "baseline-s0": "1"}, {})
    assert "--dependency=afterok:0" in (cluster / "1.sh").read_text()
    cluster.with_name("states").write_text("0 COMPLETED\n1 PENDING\n")
    variables = {"SLURM_JOB_ID": "0", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    variables |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "here"}
    done = subprocess.run(["sh", str(cluster / "0.sh")], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((sweep.output_dir / "stage1" / "training.json").read_text())["recipe"]["optim"]["steps"] == 2
    assert submit_all(sweep) == ({}, {"baseline-s0": "1"})  # the other job waits: it is not submitted again
    baseline = next(job for job in sweep.runs() if job.folder.name == "baseline-s0")
    store_run(baseline.folder, 8, recipe=as_mapping(baseline.recipe()))
    assert submit_all(sweep) == ({}, {})


def test_a_job_that_failed_is_submitted_again(tmp_path: Path, cluster: Path) -> None:
    sweep = replace(SWEEP, output_dir=tmp_path / "runs", seeds=(0,))
    submit_all(sweep)
    cluster.with_name("states").write_text("0 FAILED\n1 CANCELLED\n")
    assert submit_all(sweep) == ({"stage1": "2", "baseline-s0": "3"}, {})


def test_a_job_that_sacct_does_not_know_yet_is_not_submitted_again(tmp_path: Path, cluster: Path) -> None:
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text('#!/bin/sh\ntest "$4" = 0 && echo 0\n')
    squeue.chmod(0o755)
    sweep = replace(SWEEP, output_dir=tmp_path / "runs", seeds=(0,))
    submit_all(sweep)
    assert submit_all(sweep) == ({"baseline-s0": "2"}, {"stage1": "0"})
    assert "--dependency=afterok:0" in (cluster / "2.sh").read_text()


def test_a_training_comes_after_the_one_it_starts_from(tmp_path: Path) -> None:
    child = LINE.replace("{output_dir}/stage1", "{output_dir}/parent-s{seed}")
    variants = (f"child: {child}", f"parent: {LINE}", f"baseline: {LINE}")
    sweep = replace(SWEEP, output_dir=tmp_path / "runs", seeds=(0,), variants=variants)
    texts = {str(job): script for job, script in scripts(sweep)}
    assert [*texts] == ["stage1", "parent-s0", "baseline-s0", "child-s0"]
    assert "--dependency=afterok:parent-s0\n" in texts["child-s0"]
    with pytest.raises(RunError, match=f"baseline-s0 starts from {tmp_path}/runs/stage1, which is not the folder"):
        list(scripts(replace(SWEEP, first="", output_dir=tmp_path / "runs")))


def test_numbers_that_cannot_be_read_submit_nothing(tmp_path: Path, cluster: Path) -> None:
    (tmp_path / "runs" / ".slurm").mkdir(parents=True)
    (tmp_path / "runs" / ".slurm" / "jobs.json").write_text("{")
    with pytest.raises(RunError, match=r"jobs\.json is damaged"):
        submit_all(replace(SWEEP, output_dir=tmp_path / "runs"))
    assert not list(cluster.iterdir())


@pytest.mark.parametrize(
    ("word", "count"),
    [
        ("gpus_per_node=4", 4),
        ("gpus_per_node=a100:4", 4),
        ("gpus_per_node=3090:2", 2),
        ("gpus_per_node=a100", 1),
        ("gpus_per_node=0", 1),
        ("gpus_per_task=h100:2", 2),
        ("gres=gpu", 1),
        ("gres=gpu:4", 4),
        ("gres=nvme:3,gpu:a100_80gb:2(S:0-1)", 2),
        ("gres=shard:3", 1),
        ("mem=4", 1),
    ],
)
def test_a_job_has_a_process_for_each_of_its_gpus(word: str, count: int, tmp_path: Path) -> None:
    asked = options([word, "cpus_per_task=12"])
    assert gpus(asked) == count
    (job,) = [job for job in replace(SWEEP, output_dir=tmp_path).jobs() if str(job) == "baseline-s1"]
    assert (training_of(job, asked).processes, training_of(job, asked).threads) == (count, 12 // count)


def test_values_of_slurm_parameters_are_what_submitit_takes(tmp_path: Path) -> None:
    words = ("account=007", "exclusive=yes", "srun_args=--cpu-bind=none -v", "stderr_to_stdout=no", "gres=gpu:a100:2")
    script = next(text for _, text in scripts(replace(SWEEP, output_dir=tmp_path / "my runs", slurm=words)))
    assert "#SBATCH --account=007\n" in script
    assert "#SBATCH --exclusive\n" in script
    assert "#SBATCH --gres=gpu:a100:2\n" in script
    assert "#SBATCH --error=" in script
    assert " --cpu-bind=none -v " in script
    lines = [shlex.split(line) for line in script.splitlines() if "my runs" in line]
    assert all(any("my runs/.slurm" in word for word in line) for line in lines)
    assert "srun" not in next(
        text for _, text in scripts(replace(SWEEP, output_dir=tmp_path / "my runs", slurm=("use_srun=no",)))
    )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nodes=2", "slurm nodes is '2': expected 1"),
        ("ntasks_per_node=4", "slurm ntasks_per_node is '4': expected 1"),
        ("cpus_per_task=many", "slurm cpus_per_task is 'many': expected a whole number"),
        ("use_srun=maybe", "slurm use_srun is 'maybe': expected yes or no"),
        ("gpus_per_node=x:y", "slurm gpus_per_node is 'x:y': expected a number of GPUs"),
        ("gres=gpu:4:a100", "slurm gres is 'gpu:4:a100': expected a number of GPUs"),
        ("additional_parameters=x", "unknown slurm parameter 'additional_parameters'"),
    ],
)
def test_a_slurm_parameter_that_cannot_be_is_one_sentence(word: str, message: str) -> None:
    with pytest.raises(WorkbenchError, match=re.escape(message)):
        options([word])


def test_bad_input_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'partition'"):
        options(["partitoin=gpu"])
    with pytest.raises(ConfigError, match="slurm is 'gpu': expected NAME=VALUE"):
        options(["gpu"])
    with pytest.raises(ConfigError, match="slurm time is '4h': expected minutes"):
        options(["time=4h"])
    said = refused("trainer.sweep", "shapes_seeds", "--output_dir", str(tmp_path / "runs"), "--slurm", "time=1")
    assert "expected it with --launcher submitit" in said
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    with pytest.raises(RunError, match="0 of 3 jobs are submitted, then Slurm fails"):
        submit_all(replace(SWEEP, output_dir=tmp_path / "runs"))
