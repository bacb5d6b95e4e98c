"""A released model that learns from conversations, with images and without, in two processes: the same training as in
one, however the weights are divided."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.conftest import launch
from tests.students import VIRAL, noise_image, rows, write
from tests.tiny import build
from tests.trainer.test_processes import same
from trainer.__main__ import read
from trainer.run import train
from workbench.training_folder import checkpoints

LOSSES = ["lm_loss", "alignment_loss", "loss", "grad_norm", "learning_rate", "epoch"]
LORA = ["--model.train", "lora", "--model.lora.rank", "2"]
MICRO = ["--optim.loss_average", "microbatch", "--model.train_vision_encoder"]
STEPS = ["--optim.steps", "4", "--optim.warmup", "0", "--optim.learning_rate", "5e-4"]
STEPS += [
    "--log_every",
    "1",
    "--eval_every",
    "4",
    "--save_every",
    "2",
    "--seed",
    "1",
    "--optim.batch_size",
    "1",
    "--optim.global_batch",
    "4",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaVA with its tower trained, or LoRA, in one process and in two, and in two that are killed while they
    write the second checkpoint."""
    root = tmp_path_factory.mktemp("students")
    build("llava", root / "llava")
    write(root / "world", rows(8, 6))
    (root / "recipe.yaml").write_text("monitor:\n  k: 3\n  cknna_images: 2\n  permutations: 10\n")
    lines = []
    for n in range(3):
        noise_image(n).save(root / f"{n}.png")
        lines.append(
            json.dumps(
                {
                    "image": f"{n}.png",
                    "question": "what is this ?",
                    "answer": "cat" if n % 2 else "dog",
                    "options": ["cat", "dog"],
                }
            )
        )
    (root / "asked.jsonl").write_text("\n".join(lines))
    train(read(words(root, "one", "--model.train_vision_encoder", "--optim.batch_size", "4")), ["one"])
    train(read(words(root, "one-lora", *LORA, "--optim.batch_size", "4")), ["one"])
    train(read(words(root, "one-micro", *MICRO)), ["one"])
    runs = [
        words(root, "two-lora", *LORA),
        words(root, "two-micro", *MICRO),
        words(root, "two", "--model.train_vision_encoder"),
        words(root, "killed", "--model.train_vision_encoder"),
    ]
    (root / "ddp.json").write_text(json.dumps(runs))
    die = "killed/.unfinished/checkpoint-4/trainer_state.json"
    launch(
        "--config_file",
        "trainer/launch/ddp.yaml",
        "-m",
        "tests.in_processes",
        str(root / "ddp.json"),
        fails=True,
        DIE_AT=die,
    )
    return root


def words(root: Path, name: str, *more: str) -> list[str]:
    """The command line of a run; two of its four steps have no image."""
    data = f"llava_json:{root / 'world' / 'mix.json'}"
    own = [
        "--model.name",
        str(root / "llava"),
        "--data.train",
        data,
        "--data.val",
        data,
        *STEPS,
        *VIRAL,
        "--optim.batch_size",
        "1",
        "--optim.global_batch",
        "4",
    ]
    return [str(root / "recipe.yaml"), *own, *more, "--output_dir", str(root / name)]


@pytest.mark.slow
def test_two_processes_equal_one_and_some_steps_have_no_image(root: Path) -> None:
    same(root / "one", root / "two", within=1e-5, columns=LOSSES)
    same(root / "one-lora", root / "two-lora", within=1e-5, columns=LOSSES)
    # both have micro-batches of one conversation: four in one process, two in each of two
    same(root / "one-micro", root / "two-micro", within=1e-5, columns=LOSSES)
    logs = [pd.read_parquet(root / name / "training.parquet").dropna(subset="lm_loss") for name in ("two", "two-micro")]
    assert (logs[0]["lm_loss"] - logs[1]["lm_loss"]).abs().max() > 1e-3
    log = pd.read_parquet(root / "two" / "training.parquet").dropna(subset="lm_loss")
    assert 0 < log["alignment_loss"].isna().sum() < 4


@pytest.mark.slow
def test_two_processes_killed_and_resumed_are_bitwise_the_uninterrupted_run(root: Path) -> None:
    assert [c.step for c in checkpoints(root / "killed")] == [2]
    assert not (root / "killed" / "training.json").exists()
    launch(
        "--config_file",
        "trainer/launch/ddp.yaml",
        "-m",
        "trainer",
        *words(root, "killed", "--model.train_vision_encoder", "--resume"),
    )
    same(root / "two", root / "killed", columns=LOSSES)


@pytest.mark.slow
def test_fsdp_divides_the_model_and_writes_a_plain_folder(root: Path) -> None:
    """Full and LoRA, interrupted or not, evaluated by its loss or by answers; both kinds in one pass are refused."""
    asked = ["--data.val", f"hf:{root / 'asked.jsonl'}"]
    train(read(words(root, "one-asked", *asked, "--optim.batch_size", "4")), ["one"])
    runs = [
        words(root, "fsdp", "--model.train_vision_encoder"),
        words(root, "fsdp-again", "--model.train_vision_encoder", "--resume"),
        words(root, "fsdp-lora", *LORA),
    ]
    runs += [words(root, "fsdp-asked", *asked), words(root, "none", "--data.no-group")]
    (root / "fsdp.json").write_text(json.dumps(runs))
    stderr = launch(
        "--config_file", "trainer/launch/fsdp.yaml", "-m", "tests.in_processes", str(root / "fsdp.json"), fails=True
    ).stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert (
        len(errors) == 1
        and "data.group is no with fsdp for conversations with and without images: expected yes" in errors[0]
    ), stderr
    assert not (root / "none").exists()
    shards = [
        file.stat().st_size for file in (root / "fsdp" / "checkpoint-2" / "pytorch_model_fsdp_0").glob("*.distcp")
    ]
    assert len(shards) == 2
    assert min(shards) > 0.8 * max(shards)
    same(root / "one", root / "fsdp", within=1e-5, columns=LOSSES)
    same(root / "fsdp", root / "fsdp-again", columns=LOSSES)
    same(root / "one-lora", root / "fsdp-lora", within=1e-5, columns=LOSSES)
    same(root / "one-asked", root / "fsdp-asked", within=1e-5, columns=LOSSES)
    assert AutoModelForImageTextToText.from_pretrained(root / "fsdp").config.architectures == [
        "LlavaForConditionalGeneration"
    ]


@pytest.mark.slow
def test_half_precision_is_autocast_however_the_weights_are_divided(root: Path) -> None:
    """The weights stay float32, and what the log says of the losses is not rounded: FSDP's own mixed precision would
    round both."""
    half = ["--optim.precision", "bfloat16", "--optim.checkpointing", "--model.train_vision_encoder"]
    train(read(words(root, "one-half", *half, "--optim.batch_size", "4")), ["one"])
    launch("--config_file", "trainer/launch/fsdp.yaml", "-m", "trainer", *words(root, "fsdp-half", *half))
    same(root / "one-half", root / "fsdp-half", within=5e-3, columns=["lm_loss", "alignment_loss"])
    losses = torch.tensor(pd.read_parquet(root / "fsdp-half" / "training.parquet")["lm_loss"].dropna().tolist())
    assert not torch.equal(losses, losses.bfloat16().float())
