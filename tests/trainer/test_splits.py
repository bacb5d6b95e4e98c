"""What a run learns from, is watched on and is evaluated on: nested subsets by seed, losses on the validation split,
the best checkpoint, the test split."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from tests.conftest import ROOT, launch, refused, run
from trainer.alignment_config import AlignmentConfig
from trainer.model_config import ModelConfig
from trainer.recipe import DataConfig, OptimConfig, Recipe
from trainer.run import train
from trainer.setups.packed import PackedSetup
from trainer.setups.packed_data import collate, load_questions, load_training
from workbench.data import load_data
from workbench.errors import ConfigError
from workbench.mllm.conversation import IGNORED
from workbench.training_folder import training_record

TINY = Recipe(
    model=ModelConfig(layers=2, width=32, ffn=64),
    data=DataConfig(limit_train=16, limit_val=10, test="shapes:test", limit_test=6),
    optim=OptimConfig(steps=6, batch_size=4, warmup=2),
    alignment=AlignmentConfig(objective="cosine", layer=(1,), hidden=16),
    log_every=2,
    eval_every=2,
    save_every=2,
    keep_best=True,
)


def images(spec: str, limit: int, seed: int) -> list[str]:
    return [scene[0].image_id for scene in load_training(spec, limit, seed).scenes]


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["shapes:train", "photos:train", "easy_vqa:train"])
def test_a_limit_draws_a_nested_subset_by_the_seed(spec: str) -> None:
    few, more, other = images(spec, 8, 3), images(spec, 24, 3), images(spec, 8, 4)
    assert len(few) == 8
    assert set(few) < set(more)
    assert few == images(spec, 8, 3)
    assert set(few) != set(other)
    assert few != [scene[0].image_id for scene in load_data(spec, limit=8).scenes]
    assert load_training(spec, 8, 3).fingerprint != load_training(spec, 8, 4).fingerprint
    assert load_training("shapes:train", None, 3).fingerprint == load_data("shapes:train").fingerprint


def test_variants_of_a_seed_share_their_images_and_evaluations_do_not_depend_on_it() -> None:
    first, second = (load_questions(TINY.data, seed) for seed in (10, 11))
    assert first.train.fingerprint != second.train.fingerprint
    assert first.val.fingerprint == second.val.fingerprint == load_data("shapes:val", limit=10).fingerprint
    assert first.test is not None
    assert first.test.fingerprint == load_data("shapes:test", limit=6).fingerprint


@pytest.mark.slow
def test_a_limit_beyond_the_data_says_how_many_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.limit_train is 5000: expected at most 4000, the images of shapes:train"
    ):
        load_training("shapes:train", 5000, 0)
    message = refused(
        "trainer", str(ROOT / "trainer" / "recipes" / "shapes_stage1.yaml"), "--data.limit_test", "3", "--dry_run"
    )
    assert "data.limit_test is 3, but there is no data.test" in message


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"target": "projector"}, {"target": "encoder"}, {"center": True}])
def test_validation_losses_are_means_over_tokens(settings: dict[str, object]) -> None:
    ready = PackedSetup.from_recipe(replace(TINY, alignment=replace(TINY.alignment, **settings)))
    evaluation = ready.evaluate()  # 10 images: batches of unlike sizes
    ready.model.eval()
    with torch.inference_mode():
        each = [ready.model(**collate([ready.val[i]])) for i in range(10)]
        tokens = [int((ready.val.packed[i].labels != IGNORED).sum()) for i in range(10)]
    lm_loss = sum(float(one.lm_loss) * count for one, count in zip(each, tokens, strict=True)) / sum(tokens)
    assert evaluation.losses["lm_loss"] == pytest.approx(lm_loss, abs=1e-5)
    assert evaluation.losses["alignment_loss"] == pytest.approx(
        sum(float(one.alignment_loss) for one in each) / 10, abs=1e-5
    )


@pytest.mark.slow
def test_validation_targets_are_controlled_as_in_training() -> None:
    centered = PackedSetup.from_recipe(replace(TINY, alignment=replace(TINY.alignment, center=True)))
    plain = PackedSetup.from_recipe(TINY)
    name = "efficientnet-lite0"
    mean = plain.train.targets[name].mean()
    assert torch.allclose(centered.val.targets[name][3], plain.val.targets[name][3] - mean, atol=1e-5)
    others = PackedSetup.from_recipe(replace(TINY, alignment=replace(TINY.alignment, images="others")))
    assert all(not torch.equal(others.val.targets[name][i], plain.val.targets[name][i]) for i in range(10))


@pytest.mark.slow
def test_the_best_model_by_validation_is_kept_and_evaluated_on_the_test_split(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    table = train(replace(TINY, output_dir=folder, optim=replace(TINY.optim, learning_rate=3e-3)), ["test"])
    log = pd.read_parquet(folder / "training.parquet")
    scores = log[log["accuracy/mean"].notna()].set_index("step")["accuracy/mean"]
    best = json.loads((folder / "best" / "best.json").read_text())
    assert sorted(scores.index) == [2, 4, 6]
    assert best["score"] == pytest.approx(scores.max())
    assert best["step"] == scores.idxmax()
    assert log["val_lm_loss"].notna().sum() == 3 == log["val_alignment_loss"].notna().sum()
    record = training_record(folder)
    assert record["best"] == best
    assert record["test"] == load_data("shapes:test", limit=6).fingerprint
    asked = {sample.id for sample in load_data("shapes:test", limit=6)}
    assert set(table["id"]) == asked == set(pd.read_parquet(folder / "best" / "evaluation.parquet")["id"])
    LlavaForConditionalGeneration.from_pretrained(folder / "best")
    from trainer.output.model_folder import load_model

    ready = PackedSetup.from_recipe(TINY)
    for part in (folder, folder / "best"):
        load_model(ready.model, part)
        assert ready.evaluate(final=True).table.equals(pd.read_parquet(part / "evaluation.parquet"))
    assert "test" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_a_resumed_run_keeps_the_best_of_before(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = replace(TINY, optim=replace(TINY.optim, learning_rate=3e-3, steps=8), keep_checkpoints=None)
    train(replace(settings, output_dir=whole), ["test"])
    shutil.copytree(whole, stopped)
    for name in ("checkpoint-8", "checkpoint-6"):
        shutil.rmtree(stopped / name)
    for name in ("training.json", "model.safetensors"):
        (stopped / name).unlink()
    train(replace(settings, output_dir=stopped, resume=True), ["test"])
    for name in ("model.safetensors", "best/model.safetensors", "best/best.json"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name
    for name in ("evaluation.parquet", "best/evaluation.parquet"):
        assert pd.read_parquet(whole / name).equals(pd.read_parquet(stopped / name))


def test_rows_that_are_left_out_are_warned_of(tmp_path: Path) -> None:
    """In each split, as for conversations."""
    specs = []
    for split, broken in (("train", 1), ("val", 2), ("test", 3)):
        rows = [{"image": f"{n}.png", "question": "what ?", "answer": "a", "options": ["a", "b"]} for n in range(4)]
        rows += [{"image": "0.png", "question": "what ?", "answer": "c", "options": ["a", "b"]}] * broken
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        specs.append(f"hf:{tmp_path / split}.jsonl?images={tmp_path}&broken=skip")
    for n in range(4):
        Image.new("RGB", (16, 16), (60 * n, 0, 0)).save(tmp_path / f"{n}.png")
    ready = PackedSetup.from_recipe(replace(TINY, data=DataConfig(train=(specs[0],), val=specs[1], test=specs[2])))
    warnings = ready.warnings(1)
    assert warnings == ready.record["left_out"]
    assert len(warnings) == 3
    for sentence, left_out in zip(
        warnings, ("1 broken row of 5", "2 broken rows of 6", "3 broken rows of 7"), strict=True
    ):
        assert left_out in sentence


@pytest.mark.slow
def test_a_best_model_of_a_later_step_is_not_that_of_the_resumed_run(tmp_path: Path) -> None:
    """As where a resumed run does not repeat the interrupted one to the bit, such as with other libraries."""
    folder = tmp_path / "run"
    settings = replace(TINY, optim=replace(TINY.optim, steps=6), keep_checkpoints=None, output_dir=folder)
    train(settings, ["test"])
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "training.json").unlink()
    (folder / "best" / "best.json").write_text(json.dumps({"step": 6, "score": 2.0}))
    state = folder / "checkpoint-4" / "trainer_state.json"
    content = json.loads(state.read_text())
    next(row for row in content["log_history"] if row["step"] == 2 and "accuracy/mean" in row)["accuracy/mean"] = 1.5
    state.write_text(json.dumps(content))
    sizes = folder / "checkpoint-4" / "files.json"
    sizes.write_text(json.dumps(json.loads(sizes.read_text()) | {state.name: state.stat().st_size}))
    train(replace(settings, resume=True), ["test"])
    log = pd.read_parquet(folder / "training.parquet")
    last = log[log["accuracy/mean"].notna() & (log["step"] == 6)].iloc[0]
    record = json.loads((folder / "training.json").read_text())
    assert record["best"] == {"step": 6, "score": pytest.approx(last["accuracy/mean"])}
    assert (folder / "best/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    lost = "best/ holds step 6, but step 2 had the higher score 1.5"
    assert [sentence for sentence in record["warnings"] if lost in sentence]


@pytest.mark.slow
def test_two_processes_choose_the_best_model_that_one_does(tmp_path: Path) -> None:
    words = [
        "--optim.steps",
        "4",
        "--optim.global_batch",
        "4",
        "--data.limit_train",
        "8",
        "--data.limit_val",
        "6",
        "--data.test",
        "shapes:test",
    ]
    words += [
        "--data.limit_test",
        "5",
        "--model.layers",
        "2",
        "--model.width",
        "32",
        "--model.ffn",
        "64",
        "--alignment.layer",
        "1",
        "--alignment.hidden",
        "16",
    ]
    words += ["--log_every", "2", "--eval_every", "2", "--save_every", "2", "--keep_best", "--stage1", "None"]
    command = ["trainer", str(ROOT / "trainer" / "recipes" / "shapes_viral.yaml"), *words]
    run(*command, "--output_dir", str(tmp_path / "one"))
    launch("--num_processes", "2", "-m", *command, "--output_dir", str(tmp_path / "two"))
    one, two = (json.loads((tmp_path / name / "best" / "best.json").read_text()) for name in ("one", "two"))
    assert one == pytest.approx(two)
    assert pd.read_parquet(tmp_path / "two" / "evaluation.parquet")["id"].nunique() == len(
        load_data("shapes:test", limit=5)
    )
