"""Several processes, accumulated parts and interrupted runs: all of them are the same training."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from tests.conftest import ROOT, launch, recipe, run
from trainer.__main__ import read
from trainer.alignment_config import AlignmentConfig
from trainer.checks import checked_stages
from trainer.loop import build_trainer
from trainer.model_config import ModelConfig
from trainer.recipe import DataConfig, OptimConfig, Recipe
from trainer.run import train
from trainer.sampling import Stream, shuffled
from trainer.setups.packed import PackedSetup
from workbench.errors import ConfigError, RunError
from workbench.training_folder import checkpoints

STEPS = ["--optim.steps", "4", "--optim.warmup", "0", "--log_every", "1", "--eval_every", "4", "--save_every", "2"]
TINY = [
    recipe("viral"),
    "--stage1",
    "None",
    *STEPS,
    "--data.limit_train",
    "11",
    "--data.limit_val",
    "5",
    "--model.layers",
    "2",
    "--model.width",
    "32",
]
TINY += [
    "--model.ffn",
    "64",
    "--alignment.layer",
    "1",
    "2",
    "--alignment.hidden",
    "16",
    "--optim.batch_size",
    "2",
    "--optim.global_batch",
    "8",
]
LORA = [
    "--model.train",
    "lora",
    "--model.lora.rank",
    "2",
    "--model.lora.dropout",
    "0.1",
    "--alignment.residual",
    "encoder",
    "--optim.batch_size",
    "4",
]
COLUMNS = [
    "lm_loss",
    "alignment_loss",
    "alignment_loss/layer_1/efficientnet-lite0",
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
]


def written(folder: Path) -> tuple[dict[str, torch.Tensor], pd.DataFrame]:
    """All tensors of a finished run, and its training log."""
    tensors = {
        f"{file.name}/{name}": value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()
    }
    return tensors, pd.read_parquet(folder / "training.parquet").dropna(subset=["lm_loss"]).reset_index(drop=True)


def same(one: Path, other: Path, *, within: float = 0.0, columns: Sequence[str] = COLUMNS) -> None:
    """The two runs made the same files, and tensors, logs and answers agree: to the bit, or within so much."""
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    (tensors, log), (others, other_log) = written(one), written(other)
    assert tensors.keys() == others.keys()
    assert len(log) == len(other_log) == 4
    for name, value in tensors.items():
        assert value.dtype == others[name].dtype
        # whose gradient is 0 but for rounding, of which Adam makes a step
        noise = 1e-3 * (within > 0 and name.endswith("k_proj.bias"))
        torch.testing.assert_close(value, others[name], atol=within + noise, rtol=0)
    for column in columns:
        own, others = (torch.tensor(table[column]) for table in (log, other_log))
        torch.testing.assert_close(
            own, others, atol=within, rtol=within, equal_nan=True, msg=lambda m, c=column: f"{c}: {m}"
        )
    answers = [pd.read_parquet(folder / "evaluation.parquet") for folder in (one, other)]
    pd.testing.assert_frame_equal(*answers, check_exact=not within, atol=10 * within, rtol=10 * within)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in one process, in two, and in two killed while they write the second checkpoint; and the same
    with LoRA, resumed."""
    root = tmp_path_factory.mktemp("processes")

    def to(name: str, *more: str) -> list[str]:
        return [*TINY, *more, "--output_dir", str(root / name)]

    train(read(to("one", "--optim.batch_size", "8")), ["one"])
    launch("--num_processes", "2", "-m", "trainer", *to("two"))
    (root / "words.json").write_text(
        json.dumps([to("lora", *LORA), to("lora-again", *LORA, "--resume"), to("two-killed")])
    )
    ddp = ["--config_file", "trainer/launch/ddp.yaml"]
    launch(
        *ddp,
        "-m",
        "tests.in_processes",
        str(root / "words.json"),
        fails=True,
        DIE_AT="two-killed/.unfinished/checkpoint-4/trainer_state.json",
    )
    assert (root / "two-killed" / ".unfinished" / "checkpoint-4" / "optimizer.pt").exists()
    return root


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_global_batch(runs: Path) -> None:
    """Weights, losses, gradient norms and answers; the weights have moved further than they may differ."""
    same(runs / "one", runs / "two", within=1e-5)
    first = load_file(runs / "two" / "checkpoint-2" / "model.safetensors")
    last = load_file(runs / "two" / "model.safetensors")
    assert max(float((last[name] - first[name]).abs().max()) for name in first) > 1e-4
    record = json.loads((runs / "two" / "training.json").read_text())
    assert (record["processes"], record["strategy"], record["global_batch"]) == (2, "ddp", 8)


@pytest.mark.slow
def test_two_processes_killed_while_they_save_and_resumed_are_bitwise_the_uninterrupted_run(runs: Path) -> None:
    killed = runs / "two-killed"
    assert [c.step for c in checkpoints(killed)] == [2]
    assert not (killed / "training.json").exists()
    words = [*TINY, "--output_dir", str(killed), "--resume"]
    with pytest.raises(
        RunError, match="checkpoint-2 was written by 2 processes, and now there are 1: expected the same number"
    ):
        train(read(words), words)
    (killed / "checkpoint-3").mkdir()
    stderr = launch("--config_file", "trainer/launch/ddp.yaml", "-m", "trainer", *words).stderr
    assert "checkpoint-3 is incomplete and is skipped" in stderr
    (killed / "checkpoint-3").rmdir()
    same(runs / "two", killed)


def test_lora_with_dropout_in_two_processes_resumes_bitwise(runs: Path) -> None:
    same(runs / "lora", runs / "lora-again")
    own = [
        torch.load(runs / "lora" / "checkpoint-2" / f"rng_state_{rank}.pth", weights_only=False)["cpu"]
        for rank in (0, 1)
    ]
    assert not torch.equal(*own)  # two processes drop out other units


@pytest.mark.slow
def test_fsdp_divides_the_model_and_writes_the_same_folder(runs: Path) -> None:
    """Full and LoRA, interrupted or not; fewer images than processes are refused in one sentence, by one process."""
    both = [["fsdp"], ["fsdp-again", "--resume"], ["fsdp-lora", *LORA], ["none", "--data.limit_train", "1"]]
    words = [[*TINY, *more, "--output_dir", str(runs / name)] for name, *more in both]
    (runs / "fsdp.json").write_text(json.dumps(words))
    stderr = launch(
        "--config_file", "trainer/launch/fsdp.yaml", "-m", "tests.in_processes", str(runs / "fsdp.json"), fails=True
    ).stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: 2 processes for 1 training images: expected at most as many processes as images"], stderr
    assert not (runs / "none").exists()
    shards = [
        file.stat().st_size for file in (runs / "fsdp" / "checkpoint-2" / "pytorch_model_fsdp_0").glob("*.distcp")
    ]
    assert len(shards) == 2
    assert min(shards) > 0.8 * max(shards)
    same(runs / "one", runs / "fsdp", within=1e-5)
    same(runs / "fsdp", runs / "fsdp-again")
    same(runs / "lora", runs / "fsdp-lora", within=1e-5)


SLOW_END = """
import atexit, time
import torch.distributed as td
from torch import ones
from trainer import distributed
class Slow:
    def __del__(self): time.sleep(4)
slow = Slow()
def main():
    global group
    distributed.start()
    group = td.group.WORLD
    atexit.register(lambda: open(f"{__file__}.{distributed.rank()}", "w").close())
    time.sleep(2 * distributed.rank())
    td.all_reduce(ones(1), async_op=True)
    distributed.stop()
distributed.program(main)
"""


@pytest.mark.slow
def test_a_thread_that_works_while_a_process_ends_does_not_abort_it(tmp_path: Path) -> None:
    """Python ends slowly in process 0, and only then is the sum complete whose tensor is gloo's alone."""
    (tmp_path / "slow_end.py").write_text(SLOW_END)
    ddp = ["--config_file", str(ROOT / "trainer/launch/ddp.yaml")]
    run("accelerate.commands.launch", *ddp, str(tmp_path / "slow_end.py"), PYTHONPATH=str(ROOT))
    # the exit functions have run
    assert {file.name for file in tmp_path.iterdir()} == {"slow_end.py", "slow_end.py.0", "slow_end.py.1"}


SMALL = Recipe(
    model=ModelConfig(layers=2, width=32, ffn=64),
    data=DataConfig(limit_train=11, limit_val=4),
    optim=OptimConfig(steps=1, batch_size=4, warmup=0, max_grad_norm=0.0),
    log_every=1,
    save_every=1,
)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["cosine", "relation"])
def test_one_image_four_times_has_the_gradients_of_four_images_at_once(tmp_path: Path, objective: str) -> None:
    """Every gradient of the first step, unclipped."""

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
            found.append(
                {name: p.grad.clone() for name, p in trainer.setup.model.named_parameters() if p.grad is not None}
            )

    found: list[dict[str, torch.Tensor]] = []
    alignment = AlignmentConfig(objective=objective, layer=(1,), hidden=16, weight=5.0)  # type: ignore[arg-type]
    for size in (4, 1):
        own = replace(
            SMALL,
            alignment=alignment,
            output_dir=tmp_path / str(size),
            optim=replace(SMALL.optim, batch_size=size, global_batch=4),
        )
        trainer = build_trainer(own, PackedSetup.from_recipe(own))
        trainer.add_callback(Keep())
        trainer.run()
    once, parts = found
    assert once.keys() == parts.keys()
    assert any("alignment" in name for name in once)
    for name, value in once.items():
        torch.testing.assert_close(parts[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_process_that_is_left_alone_stops_with_one_sentence() -> None:
    """Of two connected processes one is killed: the other has no traceback, and does not wait."""
    code = """
import os, signal, sys, torch
from trainer import __main__ as command, distributed
from workbench.cli import command as run
def read(argv):
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1))
command.read = read
distributed.program(lambda: run(command.main))
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=shared | rank, stderr=subprocess.PIPE, text=True)
        for rank in ranks
    ]
    left, killed = [(process.communicate(timeout=300)[1], process.returncode) for process in both]
    assert killed[1] == -signal.SIGKILL
    assert left[1] == 2
    assert "Traceback" not in left[0]
    assert left[0].strip().splitlines()[-1].startswith("error: process 0 stops, since another process ended"), left[0]


def test_the_stream_is_the_passes_one_after_another_whatever_is_read_at_once() -> None:
    stream = list(Stream(5, 12, seed=3))
    assert sorted(stream[:5]) == sorted(stream[5:10]) == list(range(5))
    assert stream[:5] != stream[5:10]
    assert len(stream) == len(Stream(5, 12, seed=3)) == 12
    assert stream[:7] == list(Stream(5, 7, seed=3))
    assert stream != list(Stream(5, 12, seed=4))
    assert stream[:5] == torch.randperm(5, generator=torch.Generator().manual_seed(3)).tolist()
    assert stream[5:10] == shuffled(5, 3, 1)


@pytest.mark.slow
def test_one_process_that_sees_several_gpus_uses_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers would take four times the batch and divide it, and the step would be another than the recipe's."""
    made = TrainingArguments.__post_init__

    def sees_four(self: TrainingArguments) -> None:
        made(self)
        assert self.device.type == "cpu"
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", sees_four)
    recipe = replace(SMALL, output_dir=tmp_path / "run")
    trainer = build_trainer(recipe, PackedSetup.from_recipe(recipe))
    assert len(next(iter(trainer.get_train_dataloader()))["labels"]) == recipe.optim.batch_size
    assert not isinstance(trainer._wrap_model(trainer.model), torch.nn.DataParallel)


@pytest.mark.parametrize(
    ("launch", "more", "message"),
    [
        (
            "DEEPSPEED",
            [],
            "stage1-s0 yet, and with zero2 a process can train only one stage: train stage 1 first",
        ),
        (
            "FSDP",
            ["--stage1", "None", "--data.features", "compute"],
            "data.features is compute with fsdp, but a toy LLaVA's vision encoder cannot compute features",
        ),
    ],
)
def test_what_a_launch_file_cannot_do_is_one_sentence(
    launch: str, more: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{launch}", "true")
    with pytest.raises(ConfigError, match=message):
        checked_stages(read([recipe("viral"), *more, "--output_dir", str(tmp_path / "run")]))


def test_a_first_stage_of_another_precision_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """accelerate fixes the precision of several processes once and for all."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    own = replace(
        SMALL,
        stage1=Path(recipe("stage1")),
        output_dir=tmp_path / "run",
        optim=replace(SMALL.optim, precision="bfloat16"),
    )
    with pytest.raises(
        ConfigError, match=r"optim.precision is bfloat16, and float32 in stage1: expected the same in several processes"
    ):
        checked_stages(own)


def test_the_global_batch_stays_whatever_the_number_of_processes() -> None:
    optim = OptimConfig(batch_size=4, global_batch=128)
    assert [optim.accumulated(processes) for processes in (1, 2, 4, 8, 32)] == [32, 16, 8, 4, 1]
    assert {optim.images(processes) for processes in (1, 2, 4, 8, 32)} == {128}
    assert OptimConfig(batch_size=4, accumulation=3).images(2) == 24
    assert [(optim.at_once(processes), optim.accumulated(processes)) for processes in (64, 128)] == [(2, 1), (1, 1)]
    assert (
        OptimConfig(batch_size=16, global_batch=12).at_once(2),
        OptimConfig(batch_size=4, global_batch=10).accumulated(1),
    ) == (6, 5)
    for processes in (3, 256):
        with pytest.raises(
            ConfigError,
            match=f"optim.global_batch is 128: expected a multiple of {processes}, the processes that share it",
        ):
            optim.at_once(processes)
    with pytest.raises(ConfigError, match=r"optim.accumulation is 2, but it follows from optim.global_batch = 8"):
        OptimConfig(batch_size=4, global_batch=8, accumulation=2)


def test_the_commands_of_the_page_are_launch_files_that_accelerate_reads_and_recipes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parsed by accelerate's own command line, and the rest by the trainer's; the runs above start the same."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    page = (ROOT / "docs" / "howto" / "cluster.md").read_text()
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", page, re.S)
        for line in block.splitlines()
        if line.startswith("accelerate launch")
    ]
    files = sorted((ROOT / "trainer" / "launch").glob("*.yaml"))
    assert len(lines) == 3
    assert [f.stem for f in files] == ["ddp", "fsdp", "zero2", "zero3"]
    assert all(f.name in page for f in files)
    monkeypatch.chdir(ROOT)
    for line in [*lines, *(f"accelerate launch --config_file {file} -m trainer {recipe('viral')}" for file in files)]:
        given = launch_command_parser().parse_args(line.split()[2:])
        args, _, _ = _validate_launch_command(given)
        assert args.num_processes == 2
        assert args.module
        assert args.training_script == "trainer"
        assert read(args.training_script_args).optim.accumulated(2) == 1
        if "zero" in line:
            assert args.use_deepspeed
            assert f"zero{args.zero_stage}.yaml" in line
        if "fsdp" in line:
            assert args.use_fsdp
            assert args.fsdp_version == 2
