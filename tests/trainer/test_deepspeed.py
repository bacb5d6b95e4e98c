"""DeepSpeed ZeRO-2 and ZeRO-3 in two processes: the same training as in one. Runs where DeepSpeed is installed; it is
no dependency."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.conftest import run
from tests.in_processes import interrupted
from tests.students import VIRAL, rows, write
from tests.tiny import build
from tests.trainer.test_processes import TINY, same
from tests.trainer.test_student_processes import LORA, LOSSES, STEPS
from trainer.__main__ import read
from trainer.run import train

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")

ZERO = pytest.mark.parametrize("stage", ["zero2", "zero3"])


def launcher(stage: str, words: list[str]) -> list[str]:
    """The command that trains with DeepSpeed, up to the output folder."""
    launch = ["accelerate.commands.launch", "--config_file", f"trainer/launch/{stage}.yaml"]
    return [*launch, "-m", "trainer", *words, "--output_dir"]


def divided(stage: str, words: list[str], folder: Path) -> None:
    """Train in two processes, to `folder`-two; to `folder`-two-again, which goes on from the first one's checkpoint;
    and only finish `folder`-two-last."""
    two, again, last = (folder.with_name(f"{folder.name}-two{end}") for end in ("", "-again", "-last"))
    start = launcher(stage, words)
    run(*start, str(two))  # DeepSpeed takes one run per process
    interrupted(again)
    run(*start, str(again), "--resume")
    last.mkdir()
    shutil.copy(two / "recipe.yaml", last)
    for checkpoint in two.glob("checkpoint-*"):
        shutil.copytree(checkpoint, last / checkpoint.name)
    run(*start, str(last), "--resume")


@ZERO
def test_a_small_llava(stage: str, tmp_path: Path) -> None:
    one, two, again, last = (tmp_path / name for name in ("one", "one-two", "one-two-again", "one-two-last"))
    train(read([*TINY, "--output_dir", str(one), "--optim.batch_size", "8"]), ["one"])
    divided(stage, TINY, one)
    same(one, two, within=1e-5)
    same(two, again)
    same(two, last)


@ZERO
@pytest.mark.parametrize("flags", [["--model.train_vision_encoder"], LORA], ids=["full", "lora"])
def test_conversations(stage: str, flags: list[str], tmp_path: Path) -> None:
    """With and without images for ZeRO-2, which keeps the weights whole; ZeRO-3 takes those with images, and no
    LoRA."""
    if stage == "zero3" and flags == LORA:
        pytest.skip("refused: tests/trainer/test_student.py")
    one, two, again, last = (tmp_path / name for name in ("one", "one-two", "one-two-again", "one-two-last"))
    model = build("llava", tmp_path / "llava")
    data = f"llava_json:{write(tmp_path / 'world', rows(8, 6 if stage == 'zero2' else 0))}"
    (tmp_path / "recipe.yaml").write_text("monitor:\n  k: 3\n  cknna_images: 2\n  permutations: 10\n")
    words = [
        str(tmp_path / "recipe.yaml"),
        "--model.name",
        str(model),
        "--data.train",
        data,
        "--data.val",
        data,
        *STEPS,
        *VIRAL,
        *flags,
    ]
    words += ["--optim.batch_size", "1", "--optim.global_batch", "4"]
    train(read([*words, "--output_dir", str(one), "--optim.batch_size", "4"]), ["one"])
    divided(stage, words, one)
    same(one, two, within=1e-5, columns=LOSSES)
    same(two, again, columns=LOSSES)
    same(two, last, columns=LOSSES)


@ZERO
def test_half_precision_is_autocast(stage: str, tmp_path: Path) -> None:
    """As in one process: float32 weights, of which the frozen ones keep every bit, and losses that are not rounded."""
    half, one, two = ["--optim.precision", "bfloat16"], tmp_path / "one", tmp_path / "two"
    train(read([*TINY, *half, "--output_dir", str(one), "--optim.batch_size", "8"]), ["one"])
    start = launcher(stage, [*TINY, *half])
    run(*start, str(two))
    same(one, two, within=5e-3, columns=["lm_loss", "alignment_loss"])
    interrupted(tmp_path / "two-again")
    run(*start, str(tmp_path / "two-again"), "--resume")
    same(two, tmp_path / "two-again")
    losses = torch.tensor(pd.read_parquet(two / "training.parquet")["lm_loss"].dropna().tolist())
    assert not torch.equal(losses, losses.bfloat16().float())
