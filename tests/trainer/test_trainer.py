"""The trainer: packing is exact, both losses train what they should and nothing else, resume is bitwise, bad recipes
are one sentence."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from tests.conftest import ROOT, SMALL, SMALL_VIRAL, recipe, refused, run, start
from trainer.alignment_config import AlignmentConfig
from trainer.build.toy_llava import encoder_config
from trainer.checks import checked_stages
from trainer.dry_run.plan import plan
from trainer.model_config import ModelConfig
from trainer.objectives import AlignmentHead, cosine_loss
from trainer.output.checkpoints import check_same_sources, publish_checkpoint, write_sources
from trainer.output.folder import check_output, write_recipe
from trainer.recipe import DataConfig, Recipe
from trainer.run import train
from trainer.sampling import shuffled
from trainer.setups.packed import PackedSetup
from trainer.setups.packed_data import collate
from workbench.cli import parse
from workbench.data import load_data
from workbench.errors import ConfigError, DataError, RunError, WeightsError
from workbench.files import UMASK
from workbench.hashing import saved_tensors
from workbench.mllm import MLLM
from workbench.training_folder import BEST_FILE
from workbench.weights.fetch import check_unchanged, load_weights

TINY = Recipe(
    model=ModelConfig(layers=3, width=32, ffn=64),
    data=DataConfig(limit_train=24, limit_val=8),
    alignment=AlignmentConfig(objective="cosine", layer=(2,), hidden=16),
)


@pytest.fixture(scope="module")
def prepared():
    return PackedSetup.from_recipe(TINY)


def test_cosine_loss_equals_its_formula_and_spares_the_target() -> None:
    torch.manual_seed(0)
    student, target = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 5, 7, requires_grad=True)
    loss = cosine_loss(student, target)
    a, b = student.detach().double(), target.detach().double()
    assert loss.item() == pytest.approx(-float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()), abs=1e-6)
    loss.backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert target.grad is None
    assert cosine_loss(3 * b, b).item() == pytest.approx(-1)


@pytest.mark.slow
def test_packed_questions_are_answered_as_if_alone(runs_folder: Path) -> None:
    """Packed logits from cached features equal the plain processor-to-logits path, question by question."""
    mllm = MLLM.load(str(runs_folder / "viral"))
    from dataclasses import replace

    ready = PackedSetup.from_recipe(replace(TINY, start=runs_folder / "viral"))
    ready.model.eval()
    data = load_data("shapes:val", limit=3)
    with torch.inference_mode():
        batch = collate([ready.val[i] for i in range(3)])
        packed = ready.model(**{k: v for k, v in batch.items() if k != "targets"}).logits
        for row, scene in enumerate(data.scenes):
            for number, sample in enumerate(scene, start=1):
                plain = mllm.model(**mllm.encode([sample.image], [sample.question]).inputs).logits[0, -1]
                of_question = batch["labels"][row].ne(-100) & (batch["segments"][row] == number)
                assert torch.allclose(packed[0], plain, atol=2e-4)  # of the answer's first token
                packed = packed[int(of_question.sum()) :]
        assert not len(packed)


@pytest.mark.slow
def test_one_step_moves_head_connector_and_language_model_and_not_the_tower(prepared) -> None:
    model = prepared.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = collate([prepared.train[i] for i in range(4)])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    output = model(**batch)
    (output.lm_loss + 0.5 * output.alignment_loss).backward()
    assert batch["targets"]["efficientnet-lite0"].grad is None
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    for part in (
        "alignment.heads.0.0.weight",
        "alignment.heads.0.4.weight",
        "linear_1.weight",
        "layers.0.self_attn.q_proj.weight",
        "layers.2.mlp.up_proj.weight",
    ):
        assert any(part in name for name in moved), part
    assert not any("vision_tower" in name for name in moved)
    check_unchanged("dinov2-small", saved_tensors(model.base.model.vision_tower), load_weights("dinov2-small"))
    model.load_state_dict(before)


def test_the_alignment_gradient_stops_at_its_layer(prepared) -> None:
    model = prepared.model.train()
    model.zero_grad()
    model(**collate([prepared.train[0]])).alignment_loss.backward()
    touched = {
        name.split("layers.")[1][0]
        for name, p in model.named_parameters()
        if p.grad is not None and "language_model.layers." in name and p.grad.abs().sum() > 0
    }
    assert touched == {"0", "1"}
    model.zero_grad()


@pytest.mark.slow
def test_controls_change_the_target_only() -> None:
    from dataclasses import replace

    plain = PackedSetup.from_recipe(TINY)
    others = PackedSetup.from_recipe(replace(TINY, alignment=replace(TINY.alignment, images="others")))
    centred = PackedSetup.from_recipe(replace(TINY, alignment=replace(TINY.alignment, center=True)))
    for a, b in zip(plain.model.state_dict().values(), others.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    same, exchanged, without = (ready.train.targets["efficientnet-lite0"] for ready in (plain, others, centred))
    assert all(not torch.equal(same[i], exchanged[i]) for i in range(24))
    assert torch.equal(*(features.rows(range(24)).sum((1, 2)).sort().values for features in (same, exchanged)))
    assert without.mean().abs().max() < 1e-4
    baseline = PackedSetup.from_recipe(replace(TINY, alignment=AlignmentConfig()))
    assert baseline.model.alignment is None
    assert all(torch.equal(v, plain.model.base.state_dict()[k]) for k, v in baseline.model.base.state_dict().items())


def test_the_folder_is_plain_transformers_and_the_log_has_both_losses(runs_folder: Path) -> None:
    LlavaForConditionalGeneration.from_pretrained(runs_folder / "viral")
    assert {file.stat().st_mode & 0o777 for file in (runs_folder / "viral").rglob("*") if file.is_file()} == {
        0o666 & ~UMASK
    }
    head = AlignmentHead(32, 16, 112)
    head.load_state_dict(load_file(runs_folder / "viral" / "alignment_head.safetensors"))
    assert not (runs_folder / "baseline" / "alignment_head.safetensors").exists()
    log = pd.read_parquet(runs_folder / "viral" / "training.parquet")
    assert log["alignment_loss"].dropna().between(-1, 1).all()
    assert len(log["lm_loss"].dropna()) == 6
    assert {"accuracy/count", "accuracy/relation_x", "accuracy/mean"} <= set(log.columns)
    assert log["lm_loss"].dropna().iloc[-1] < log["lm_loss"].dropna().iloc[0]
    evaluation = pd.read_parquet(runs_folder / "viral" / "evaluation.parquet")
    assert set(evaluation["id"]) == {s.id for s in load_data("shapes:val", limit=8)}
    record = json.loads((runs_folder / "viral" / "training.json").read_text())
    assert record["tower_fingerprint"]
    assert record["vfm_fingerprint"]
    assert record["recipe"]["alignment"]["layer"] == [2]
    assert record["packages"]["torch"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | {
        f"head.{k}": v for k, v in load_file(folder / "alignment_head.safetensors").items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", ["1", "2"])
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path: Path, accumulation: str) -> None:
    """SIGKILL after the first checkpoint, then --resume: the model, the head, and every row of the log are the same to
    the bit, and nothing is left over."""
    words = [recipe("viral"), "--stage1", "None", *SMALL_VIRAL, "--optim.accumulation", accumulation]
    run("trainer", *words, "--output_dir", str(tmp_path / "whole"))
    process = start("trainer", *words, "--output_dir", str(tmp_path / "killed"))
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed" / "checkpoint-6" / "trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run ended or hung before its first checkpoint"
        )
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "training.json").exists()
    # what a kill leaves a little later
    for half in (".training.parquet.123", ".final.a1b2_3c4/model.safetensors", "final/config.json"):
        (tmp_path / "killed" / half).parent.mkdir(exist_ok=True)
        (tmp_path / "killed" / half).write_text("half")
    run("trainer", *words, "--output_dir", str(tmp_path / "killed"), "--resume")
    names = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("whole", "killed")]
    assert names[0] == names[1]
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    pd.testing.assert_frame_equal(
        *(pd.read_parquet(tmp_path / name / "training.parquet").drop(columns="seconds") for name in ("whole", "killed"))
    )


def test_tensorboard_has_the_same_numbers_as_the_log(runs_folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (runs_folder / "viral").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events))
    board.Reload()
    log = pd.read_parquet(runs_folder / "viral" / "training.parquet")
    for measure in ("lm_loss", "alignment_loss", "accuracy/mean"):
        (tag,) = [t for t in board.Tags()["scalars"] if t.removeprefix("eval/").removeprefix("train/") == measure]
        rows = log.dropna(subset=[measure]).drop_duplicates("step")
        assert {e.step: e.value for e in board.Scalars(tag)} == pytest.approx(
            dict(zip(rows["step"], rows[measure], strict=True)), rel=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_that_died_after_its_last_step_is_only_finished(tmp_path: Path, precision: str) -> None:
    words = [
        recipe("viral"),
        "--stage1",
        "None",
        *SMALL_VIRAL,
        "--optim.steps",
        "6",
        "--optim.precision",
        precision,
        "--output_dir",
        str(tmp_path / "out"),
    ]
    run("trainer", *words)
    before, log = tensors(tmp_path / "out"), pd.read_parquet(tmp_path / "out" / "training.parquet")
    sources = json.loads((tmp_path / "out" / "checkpoint-6" / "sources.json").read_text())
    assert sources.keys() == {"data", "val", "tower", "processor", "vfm", "vfm_settings", "items", "libraries"}
    assert all(sources.values())
    for name in ("training.json", "model.safetensors", "accuracy.parquet"):
        (tmp_path / "out" / name).unlink()
    run("trainer", *words, "--resume")
    after, again = tensors(tmp_path / "out"), pd.read_parquet(tmp_path / "out" / "training.parquet")
    assert all(torch.equal(before[k], after[k]) for k in before)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), log.drop(columns="seconds"))
    assert json.loads((tmp_path / "out" / "training.json").read_text())["seconds"] > 0


@pytest.mark.slow
def test_a_run_is_resumed_from_the_newest_checkpoint_that_is_whole(tmp_path: Path) -> None:
    """After a power cut, a full quota or half a copy, which a rename does not rule out."""
    words = [
        recipe("viral"),
        "--stage1",
        "None",
        *SMALL_VIRAL,
        "--optim.steps",
        "6",
        "--save_every",
        "2",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    run("trainer", *words, "--keep_checkpoints", "None")
    before = tensors(tmp_path / "out")
    (tmp_path / "out" / "training.json").unlink()
    with (tmp_path / "out" / "checkpoint-6" / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    (tmp_path / "out" / "checkpoint-4" / "scheduler.pt").unlink()
    done = run("trainer", *words, "--resume", "--keep_checkpoints", "2")
    assert re.search(r"checkpoint-6 is damaged \(optimizer.pt has 100 of \d+ bytes\) and is skipped", done.stderr)
    assert "checkpoint-4 is damaged (scheduler.pt is missing) and is skipped" in done.stderr
    after = tensors(tmp_path / "out")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_only_what_began_a_run_continues_it(tmp_path: Path) -> None:
    """A checkpoint knows the content of its data and weights, since a folder or a file of the same name may hold
    others."""
    record = {"data": "1f6a", "tower_fingerprint": "abc", "vfm_fingerprint": ["d", "e"], "tower": "a name"}
    check_same_sources(tmp_path, record)  # of before there were fingerprints
    write_sources(tmp_path, record)
    check_same_sources(tmp_path, record | {"tower": "another name"})
    for change, message in (
        ({"data": "9161"}, "the data fingerprint 1f6a, and it is 9161 now"),
        ({"vfm_fingerprint": ["d"]}, "the vfm fingerprint"),
    ):
        with pytest.raises(RunError, match=message):
            check_same_sources(tmp_path, record | change)
    for part in ("processor", "vfm_settings"):
        write_sources(tmp_path, record | {f"{part}_fingerprint": "abc"})
        with pytest.raises(RunError, match=f"the {part} fingerprint abc, and it is abd now"):
            check_same_sources(tmp_path, record | {f"{part}_fingerprint": "abd"}, repaired=True)
    write_sources(tmp_path, record | {"items": 8})
    (said,) = check_same_sources(tmp_path, record | {"data": "9161", "items": 8}, repaired=True)
    assert said.startswith("resumed at step ")
    assert " with repaired data: " in said
    assert "the data fingerprint 1f6a, and it is 9161 now" in said
    write_sources(tmp_path, record | {"items": 8})
    for change, message in (
        ({"data": "9161", "items": 7}, "trained on 8 items, and there are 7 now"),
        ({"vfm_fingerprint": ["d"]}, "the vfm fingerprint"),
    ):
        with pytest.raises(RunError, match=message):
            check_same_sources(tmp_path, record | {"items": 8} | change, repaired=True)


def test_a_best_model_of_validation_data_before_a_repair_is_named(tmp_path: Path) -> None:
    checkpoint, best = tmp_path / "checkpoint-8", tmp_path / "best"
    for folder in (checkpoint, best):
        folder.mkdir()
    write_sources(checkpoint, {"data": "1f6a", "val": "77"})
    (best / BEST_FILE).write_text('{"step": 4, "score": 0.5}')
    assert len(check_same_sources(checkpoint, {"data": "9161", "val": "77"}, repaired=True)) == 1
    _, said = check_same_sources(checkpoint, {"data": "1f6a", "val": "78"}, repaired=True)
    assert said.startswith("best/ holds step 4, whose score was measured before the validation data were repaired")


def test_a_run_resumed_with_other_libraries_says_so(tmp_path: Path) -> None:
    write_sources(tmp_path, {"data": "1f6a"})
    assert check_same_sources(tmp_path, {"data": "1f6a"}) == []
    stored = json.loads((tmp_path / "sources.json").read_text())
    (tmp_path / "sources.json").write_text(json.dumps(stored | {"libraries": stored["libraries"] | {"torch": "2.3"}}))
    (said,) = check_same_sources(tmp_path, {"data": "1f6a"})
    assert said.startswith("resumed with torch 2.")
    assert "was written with 2.3" in said


def test_a_run_that_died_writing_its_recipe_is_started_anew(tmp_path: Path) -> None:
    """A folder that holds nothing but half a file is free, and nothing to resume."""
    (tmp_path / ".recipe.yaml.123").write_text("half")
    assert check_output(tmp_path, Recipe()) is None
    with pytest.raises(RunError, match="start it without --resume"):
        check_output(tmp_path, Recipe(resume=True))
    (tmp_path / ".gitignore").write_text("*")
    with pytest.raises(RunError, match="is not empty"):
        check_output(tmp_path, Recipe())
    write_recipe(tmp_path, Recipe(), None)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".gitignore", "recipe.yaml"]
    for step in (2, 4, 10):  # killed when the third was in its place and the first not yet removed
        (tmp_path / ".unfinished" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / ".unfinished" / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        publish_checkpoint(tmp_path, f"checkpoint-{step}", None)
    write_recipe(tmp_path, Recipe(keep_checkpoints=2), tmp_path / "checkpoint-10")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        ".gitignore",
        "checkpoint-10",
        "checkpoint-4",
        "recipe.yaml",
    ]
    (tmp_path / "checkpoint-10" / "files.json").unlink()
    write_recipe(tmp_path, Recipe(keep_checkpoints=1), tmp_path / "checkpoint-4")  # it stays
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        ".gitignore",
        "checkpoint-10",
        "checkpoint-4",
        "recipe.yaml",
    ]
    words = Recipe(resume=True, keep_checkpoints=1)
    assert check_output(tmp_path, words) == tmp_path / "checkpoint-4"


def test_a_damaged_checkpoint_takes_the_place_of_no_good_one(tmp_path: Path) -> None:
    """The newest has its full size and cannot be read: the one before is resumed from, and stays until the next."""
    write_recipe(tmp_path, Recipe(), None)
    for step in (4, 8):
        (tmp_path / ".unfinished" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / ".unfinished" / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        publish_checkpoint(tmp_path, f"checkpoint-{step}", None)
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text("{,")
    (tmp_path / "checkpoint-8" / "files.json").write_text('{"trainer_state.json": 2}')
    words = Recipe(resume=True, keep_checkpoints=1)
    resumed = check_output(tmp_path, words)
    assert resumed == tmp_path / "checkpoint-4"
    write_recipe(tmp_path, words, resumed)
    assert sorted(file.name for file in tmp_path.glob("*checkpoint-*")) == ["checkpoint-4", "damaged-checkpoint-8"]
    assert check_output(tmp_path, words) == tmp_path / "checkpoint-4"


@pytest.mark.slow
def test_another_first_stage_is_not_taken_for_ours(tmp_path: Path) -> None:
    stage = tmp_path / "tiny_stage1.yaml"
    stage.write_text(
        f"base: {recipe('stage1')}\noptim:\n  steps: 2\n  batch_size: 4\nlog_every: 2\nsave_every: 2\neval_every: 2\n"
    )
    words = [recipe("baseline"), *SMALL, "--optim.steps", "2", "--stage1", str(stage)]
    run("trainer", *words, "--output_dir", str(tmp_path / "one"))
    assert (tmp_path / "stage1-s0" / "training.json").exists()
    assert "stage1-s0 was started with data" in refused(
        "trainer", *words, "--data.limit_train", "16", "--output_dir", str(tmp_path / "two")
    )
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
def test_passes_of_a_seed_are_its_own_and_the_last_step_is_logged(tmp_path: Path) -> None:
    orders = [tuple(shuffled(50, seed, epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16
    assert all(sorted(order) == list(range(50)) for order in orders)
    run(
        "trainer",
        recipe("stage1"),
        *SMALL,
        "--optim.learning_rate",
        "1e-3",
        "--optim.final_rate",
        "0.2",
        "--optim.warmup",
        "2",
        "--optim.steps",
        "5",
        "--log_every",
        "3",
        "--save_every",
        "3",
        "--output_dir",
        str(tmp_path / "out"),
    )
    log = pd.read_parquet(tmp_path / "out" / "training.parquet")
    trained = log[log["lm_loss"].notna()]
    assert trained["step"].tolist() == [3, 5]
    # of the recipe, not of the projector, whose rate fits its inputs; two thirds of the cosine are over at step 5
    assert trained["learning_rate"].tolist() == pytest.approx([1e-3, 1e-3 * (0.2 + 0.8 * 0.25)])


def test_a_question_without_words_is_refused(prepared: PackedSetup) -> None:
    """As in captions, whose question is the image alone: labels and tokens would not have the same length."""
    sample = prepared.train.data.scenes[0][0]
    packed = prepared.train.packer([sample])
    assert len(packed.labels) == len(packed.input_ids) == len(packed.segments)
    with pytest.raises(DataError, match=rf"^question {sample.id} .* has no words: expected some"):
        prepared.train.packer([sample, replace(sample, question=" ")])


@pytest.mark.slow
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    """A file size limit of 4 MB stands for the full disk: the checkpoint does not fit."""
    words = [
        sys.executable,
        "-m",
        "trainer",
        recipe("stage1"),
        *SMALL,
        "--save_every",
        "2",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 4000; exec {shlex.join(words)}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: cannot write checkpoint")
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert not (tmp_path / "out" / "training.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no recipe given"),
        (["trainer/recipes/shapes_virl.yaml"], "did you mean 'trainer/recipes/shapes_viral.yaml'"),
        (
            [recipe("viral"), "--alignment.layr", "3"],
            "unknown option '--alignment.layr': did you mean '--alignment.layer'",
        ),
        ([recipe("viral"), "--alignment.layer", "three"], "alignment.layer"),
        ([recipe("viral"), "--alignment.layer", "9"], "alignment.layer is 9: expected 1 to 6"),
        ([recipe("viral"), "--alignment.weight", "-1"], "alignment.weight is -1.0: expected at least 0"),
        ([recipe("viral"), "--optim.steps", "0"], "optim.steps is 0: expected at least 1"),
        ([recipe("viral"), "--alignment.objective", "cosin"], "cosin"),
        (
            [recipe("viral"), "--alignment.vfm", "dinov3", *SMALL],
            "unknown VFM 'dinov3': expected one of dinov3-base, dinov3-large, dinov3-small, ...",
        ),
        ([recipe("viral"), "--alignment.teacher_norm", "students", *SMALL], "students"),
        ([recipe("viral"), "--stage1", "None", "--data.train", "shape:train"], "unknown data set 'shape'"),
        ([recipe("viral"), "--stage1", "None", "--data.train", "shapes:trian"], "did you mean 'train'"),
        (
            [recipe("viral"), "--start", "nowhere", *SMALL],
            "start is nowhere: expected the folder of a finished training",
        ),
        ([recipe("stage1"), "--model.vision_encoder", "dinov2-smal"], "did you mean 'dinov2-small'"),
        ([recipe("stage1"), "--model.vision_encoder_features", "13", *SMALL], "expected 0 to 12"),
        ([recipe("stage1"), "--model.image_size", "100", *SMALL], "expected a multiple of 14"),
        (
            [recipe("stage1"), "--model.image_size", "28", *SMALL, "--dry_run"],
            "model.image_size is 28, 2 x 2 patches: expected at least 42",
        ),
        ([recipe("stage1"), "--resume"], "no run in"),
        ([recipe("stage1"), "--report_to", "tensorbord"], "tensorbord"),
        ([recipe("stage1"), "--optim.beta2", "1.5"], "optim.beta2 is 1.5: expected at least 0 and below 1"),
        ([recipe("stage1"), "--optim.global_batch", "-8"], "optim.global_batch is -8: expected at least 1"),
        (
            [recipe("stage1"), "--optim.learning_rate", "inf"],
            "optim.learning_rate is inf: expected at least 0, and finite",
        ),
        ([recipe("stage1"), "--seed", "4294967296"], "seed is 4294967296: expected 0 to 4294967295"),
        ([recipe("stage1"), "--model.init", "-1"], "model.init is -1.0: expected at least 0"),
        (
            [recipe("stage1"), "--model.width", "36", "--model.heads", "12"],
            "model.width is 36: expected a multiple of 24 = 2 x model.heads",
        ),
        (
            [recipe("stage1"), "--data.weights", "0.5"],
            "data.weights is 0.5, but a toy LLaVA is trained on one data set",
        ),
        (
            [recipe("viral"), "--stage1", "None", *SMALL, "--alignment.images", "others", "--data.limit_train", "1"],
            "but 1 of the 1 training images are the same image: expected at most half of them",
        ),
        (
            [recipe("viral"), "--alignment.schedule", "linear", "--alignment.warmup", "9", "--optim.steps", "9"],
            "alignment.warmup is 9: expected less than optim.steps = 9",
        ),
    ],
)
def test_bad_recipes_are_one_sentence_and_write_nothing(tmp_path: Path, words: list[str], message: str) -> None:
    target = [] if not words else ["--output_dir", str(tmp_path / "out")]
    assert message in refused("trainer", *words, *target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"optim: {steps: 5}\noptim: {batch_size: 2}\n",
            r"mine.yaml is not valid YAML \(key 'optim' appears twice in .*line 2",
        ),
        (b"optim:\n  steps: 5\n  steps: 6\n", "key 'steps' appears twice"),
        (b"output_dir: null\n", "key 'output_dir' in .*mine.yaml is null: expected a value"),
        (b"base: mine.yaml\n", "mine.yaml has the base mine.yaml, which extends it in turn"),
        (b"base: other.yaml\n", "other.yaml has the base mine.yaml, which extends it in turn"),
        (b"base: 3\n", "key 'base' in .*mine.yaml is 3: expected the name of a recipe"),
        (b"output_dir: \xff\n", "mine.yaml is not valid YAML"),
        (b"output_dir: {{x}}\n", r"mine.yaml is not valid YAML \(a key is a list or a mapping"),
        (b"optim.steps: 9\noptim: {steps: 8}\n", "key 'optim' appears twice in .*mine.yaml"),
        (b"optim:\n", "key 'optim' in .*mine.yaml is None: expected a section with keys and values"),
        (b"alignment: {objective: off}\n", "key 'alignment.objective' in .*mine.yaml is False: expected another value"),
        (b"report_to: yes\n", "key 'report_to' in .*mine.yaml is True: expected another value"),
        (b"resume: 1\n", "key 'resume' in .*mine.yaml is 1: expected yes or no"),
        (b"model: {layers: [1, 2]}\n", r"key 'model.layers' in .*mine.yaml is \[1, 2\]: expected one value"),
        (
            b"data: {weights: [0.5, --seed, 5]}\n",
            "key 'data.weights' in .*mine.yaml has --seed: expected a number, or a word",
        ),
        (b"model: {name: {}}\n", "key 'model.name' in .*mine.yaml"),
    ],
)
def test_a_recipe_that_says_two_things_or_nothing_is_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    (tmp_path / "other.yaml").write_text("base: mine.yaml\n")
    with pytest.raises(ConfigError, match=message):
        parse(Recipe, [], prog="test", recipe=tmp_path / "mine.yaml")


@pytest.mark.slow
def test_weights_that_are_no_tower_and_a_first_stage_in_the_same_folder(tmp_path: Path) -> None:
    for name in ("efficientnet-lite0", "smollm2-135m-instruct"):
        with pytest.raises(
            ConfigError,
            match=f"model.vision_encoder is {name}: expected the weights of a vision transformer, such as dinov2-small",
        ):
            encoder_config(ModelConfig(vision_encoder=name))
    folder, stage1 = tmp_path / "stage1-s0", ROOT / "trainer" / "recipes" / "shapes_stage1.yaml"
    for own in (Recipe(start=folder, output_dir=folder), Recipe(stage1=stage1, output_dir=folder)):
        with pytest.raises(
            ConfigError, match="stage1-s0, the folder that the run starts from: expected another folder"
        ):
            checked_stages(own)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "all"])
def test_what_is_frozen_and_the_vfm_are_checked_at_the_end(mode: Literal["lora", "all"]) -> None:
    ready = PackedSetup.from_recipe(replace(TINY, model=replace(TINY.model, train=mode)))
    student = ready.model.base
    ready.check_frozen(student.state_dict())
    frozen = [p for n, p in student.named_parameters() if not p.requires_grad and ("language" in n or mode == "all")]
    before = frozen[0].clone()
    with torch.no_grad():
        frozen[0].add_(1)
        with pytest.raises(WeightsError, match="a frozen part of the model changed while it was trained"):
            ready.check_frozen(student.state_dict())
        frozen[0].copy_(before)
        next(ready.vfms[0].network.parameters()).add_(1)
    with pytest.raises(WeightsError, match="efficientnet-lite0 changed while the model was trained"):
        ready.check_frozen(student.state_dict())


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_value_that_cannot_be_read_is_said_on_any_terminal(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(ConfigError, match=r"^--optim.steps is x: expected a whole number$"):
        parse(Recipe, ["--optim.steps", "x"], prog="test")


def test_bad_yaml_keys_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {recipe('viral')}\nalignment:\n  layr: 3\n")
    assert "unknown key 'alignment.layr' in " in refused("trainer", str(file))
    file.write_text("- 1\n")
    assert "holds list: expected a mapping" in refused("trainer", str(file))


def test_an_output_folder_is_never_overwritten(runs_folder: Path, tmp_path: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in (runs_folder / "viral").rglob("*")}
    words = [recipe("viral"), *SMALL_VIRAL, "--output_dir", str(runs_folder / "viral")]
    assert "is not empty" in refused("trainer", *words)
    assert "is finished: nothing to resume" in refused("trainer", *words, "--resume")
    assert before == {f: f.stat().st_mtime_ns for f in (runs_folder / "viral").rglob("*")}
    (tmp_path / "file").write_text("")
    assert "cannot make folder" in refused(
        "trainer", recipe("stage1"), *SMALL, "--output_dir", str(tmp_path / "file" / "out")
    )


@pytest.mark.slow
def test_ctrl_c_exits_with_130(tmp_path: Path) -> None:
    words = [recipe("stage1"), *SMALL, "--optim.steps", "5000", "--output_dir", str(tmp_path / "out")]
    process = start("trainer", *words)
    while "step 4/" not in process.err:
        assert process.poll() is None, process.err
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert process.err.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in process.err
    assert not (tmp_path / "out" / "training.json").exists()


def test_files_that_are_not_a_runs_own_are_left_alone(tmp_path: Path) -> None:
    """A name that looks like a temporary one is not enough to be taken for what a killed run left."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".notes.2024").write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        train(replace(TINY, output_dir=tmp_path / "out"), ["test"])
    assert (tmp_path / "out" / ".notes.2024").read_text() == "mine"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run with checkpoints of steps 2 and 4 that is not finished."""
    own = replace(
        TINY,
        output_dir=tmp_path_factory.mktemp("interrupted") / "run",
        save_every=2,
        log_every=2,
        optim=replace(TINY.optim, steps=4, warmup=0),
    )
    train(own, ["test"])
    (own.output_dir / "training.json").unlink()
    return own


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "trainer_state.json",
        "config.json",
        "sources.json",
        "optimizer.pt",
        "rng_state.pth",
        "files.json",
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_skipped(name: str, interrupted: Recipe, tmp_path: Path) -> None:
    """Its length is right and its content is not: the run goes on from the one before."""
    folder = shutil.copytree(interrupted.output_dir, tmp_path / "run")
    again = replace(interrupted, output_dir=folder, resume=True)
    assert check_output(folder, again) == folder / "checkpoint-4"
    file = folder / "checkpoint-4" / name
    content = bytearray(file.read_bytes())
    content[: min(300, len(content))] = bytes(min(300, len(content)))
    file.write_bytes(content)
    assert check_output(folder, again) == folder / "checkpoint-2"


@pytest.mark.slow
def test_a_start_without_its_tokenizer_is_one_sentence(interrupted: Recipe, tmp_path: Path) -> None:
    folder = shutil.copytree(
        interrupted.output_dir, tmp_path / "start", ignore=shutil.ignore_patterns("checkpoint-*", "tokenizer*")
    )
    with pytest.raises(ConfigError, match=r"start is .*, whose configuration or tokenizer cannot be read"):
        PackedSetup.from_recipe(replace(TINY, start=folder))


@pytest.mark.slow
def test_a_start_that_does_not_fit_is_refused_by_the_dry_run_too(interrupted: Recipe, tmp_path: Path) -> None:
    other = replace(TINY, start=interrupted.output_dir, model=replace(TINY.model, ffn=128), output_dir=tmp_path / "out")
    for check in (PackedSetup.from_recipe, plan):
        with pytest.raises(ConfigError, match=r"start is .*, whose tensor '.*mlp.* does not fit the model"):
            check(other)


@pytest.mark.slow
def test_a_start_that_lacks_a_tensor_is_not_filled_up(interrupted: Recipe, tmp_path: Path) -> None:
    folder = shutil.copytree(interrupted.output_dir, tmp_path / "start", ignore=shutil.ignore_patterns("checkpoint-*"))
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if "mlp" in name and "language" in name)
    save_file(
        {name: value for name, value in tensors.items() if name != gone},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ConfigError, match=r"start is .*, whose model.safetensors lacks '.*mlp"):
        PackedSetup.from_recipe(replace(TINY, start=folder))


def test_a_recipe_wins_over_its_base_however_its_keys_are_written(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data.limit_train: 4\noptim: {steps: 3}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\ndata: {limit_train: 7}\noptim.steps: 9\n")
    own = parse(Recipe, [], prog="test", recipe=tmp_path / "mine.yaml")
    assert (own.data.limit_train, own.optim.steps) == (7, 9)
