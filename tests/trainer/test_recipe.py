"""Recipes: the kind of model, what a run starts from, ranges, old keys, and recipes that were stored under them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tests.conftest import ROOT
from tests.stored_runs import store_run
from trainer.__main__ import read
from trainer.card import card
from trainer.model_config import ModelConfig
from trainer.output.folder import check_same_recipe
from trainer.recipe import Recipe
from trainer.stages import stages
from trainer.sweep.results import export, finished
from trainer.sweep.spec import Sweep
from workbench.claims.rules import Training
from workbench.claims.trained import find_trained
from workbench.cli import parse
from workbench.errors import ConfigError
from workbench.stored_recipe import ADDED, RENAMED, current_recipe
from workbench.training_folder import cknna_log, training_recipe, training_record
from workbench.yaml_config import as_mapping, config_fields

RECIPES = sorted((ROOT / "trainer" / "recipes").glob("*.yaml"))
HUB = {"vision_encoder": "openai/clip", "language": "lmsys/vicuna"}


def test_null_on_the_command_line_is_that_of_yaml() -> None:
    for words in (["--keep_checkpoints", "null"], ["--keep_checkpoints=null"], ["--keep-checkpoints", "None"]):
        assert parse(Recipe, words, prog="trainer").keep_checkpoints is None
    with pytest.raises(ConfigError, match=r"--log_every.*null"):
        parse(Recipe, ["--log_every", "null"], prog="trainer")
    named = parse(Recipe, ["--data.val", "null"], prog="trainer")
    assert named.data.val == "null", "a text of an option that cannot be None stays"


# --- kind of model --------------------------------------------------------------------------------


def test_the_kind_follows_from_the_name_alone_and_is_stored() -> None:
    assert [ModelConfig().kind, ModelConfig(name="a").kind, ModelConfig(name="a/b").kind] == [
        "toy",
        "pretrained",
        "pretrained",
    ]
    assert ModelConfig(**HUB).kind == "toy"  # no guess by a slash
    assert as_mapping(Recipe())["model"]["kind"] == "toy"
    assert as_mapping(Recipe(model=ModelConfig(kind="assembled", **HUB)))["model"]["kind"] == "assembled"
    assert dataclasses.replace(ModelConfig(name="a"), train="lora").kind == "pretrained"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"kind": "toy", "name": "a/b"},
            "model.kind is toy and model.name a/b: expected model.kind pretrained, or no model.name",
        ),
        (
            {"kind": "pretrained"},
            "model.kind is pretrained without a model.name: expected the hub id or folder of a multimodal model",
        ),
        (
            {"kind": "assembled"},
            (
                "model.kind is assembled from model.vision_encoder dinov2-small and model.language None: expected hub"
                " ids or folders of both"
            ),
        ),
        (
            {"kind": "assembled", "vision_encoder": "a/b"},
            "model.vision_encoder a/b and model.language None: expected hub ids or folders of both",
        ),
        (
            {"kind": "assembled", "language": "a/b"},
            "model.vision_encoder dinov2-small and model.language a/b: expected hub ids or folders of both",
        ),
        (
            {"kind": "assembled", "name": "a/b", **HUB},
            "model.kind is assembled and model.name a/b: expected model.kind pretrained, or no model.name",
        ),
        (
            {"kind": "assembled", "revision": "v1", **HUB},
            "model.revision is v1, but model.name is not set: leave model.revision out",
        ),
        (
            {"kind": "assembled", "layers": 3, **HUB},
            "model.layers is 3, but it is for a toy LLaVA only: leave model.layers out",
        ),
        (
            {"name": "a/b", "vision_encoder": "c/d"},
            "model.vision_encoder is c/d, but model.name = a/b already defines the model: leave",
        ),
        (
            {"name": "a/b", "train_vision_encoder": True, "train": "lora"},
            "expected model.train all, since only then the vision encoder can be trained too",
        ),
        (
            {"train_vision_encoder": True},
            "model.train_vision_encoder is yes: expected no, since a toy LLaVA's vision encoder is always frozen",
        ),
        (
            {"language": "smollm2-135m-instruct", "layers": 3},
            "model.layers is 3, but model.language = smollm2-135m-instruct already defines the language model",
        ),
        (
            {"vision_encoder_revision": "v1"},
            "model.vision_encoder_revision is v1, but the revisions of a toy LLaVA's weights are fixed",
        ),
        (
            {"vision_encoder_features": ()},
            "model.vision_encoder_features is empty: expected one or more block numbers from 0",
        ),
    ],
)
def test_a_kind_that_contradicts_the_rest_is_one_sentence(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig(**model)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    for model in (ModelConfig(name="a/b"), ModelConfig(kind="assembled", **HUB)):
        part = "name" if model.name else "vision_encoder"
        revision = "revision" if model.name else "vision_encoder_revision"
        assert getattr(dataclasses.replace(model, **{revision: "v1"}), revision) == "v1"
        with pytest.raises(
            ConfigError, match=rf"model.{revision} is v1, but model.{part} is .*, a folder: leave model.{revision} out"
        ):
            dataclasses.replace(model, **{part: str(tmp_path), revision: "v1"})


@pytest.mark.slow
def test_every_recipe_says_its_kind_where_it_is_not_toy() -> None:
    kinds = {file.stem: read([str(file)]).model.kind for file in RECIPES}
    assert {kind: sum(own == kind for own in kinds.values()) for kind in ("toy", "assembled", "pretrained")} == {
        "toy": 17,
        "assembled": 4,
        "pretrained": 9,
    }
    for file in RECIPES:
        model = yaml.safe_load(file.read_text()).get("model", {})
        assert (
            "name" not in model
            or model.get("kind") == "pretrained"
            or "llava15_7b_baseline" in yaml.safe_load(file.read_text())["base"]
        ), file


# --- what a run starts from -----------------------------------------------------------------------


def test_a_recipe_under_start_is_an_error_that_names_stage1(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("start: first.yaml\n")
    for words in ([str(tmp_path / "mine.yaml")], [str(RECIPES[0]), "--start", "first.yml"]):
        with pytest.raises(
            ConfigError,
            match=(
                r"start is first\.ya?ml, a recipe: expected the folder of a finished training, or the recipe as the"
                r" value of stage1"
            ),
        ):
            read(words)


def test_stage1_becomes_a_recipe_of_its_own_and_the_folder_that_the_run_starts_from() -> None:
    viral = read(
        [
            str(ROOT / "trainer" / "recipes" / "shapes_viral.yaml"),
            "--seed",
            "3",
            "--data.limit_train",
            "24",
            "--output_dir",
            "out/viral",
            "--model.width",
            "64",
        ]
    )
    assert viral.start is None
    assert viral.stage1 == ROOT / "trainer" / "recipes" / "shapes_stage1.yaml"
    first, own = stages(viral)
    alone = read([str(viral.stage1)])
    assert (own.start, own.stage1, first.output_dir, first.seed) == (
        Path("out/stage1-s3"),
        None,
        Path("out/stage1-s3"),
        3,
    )
    assert (first.data, first.model.width, first.optim, first.alignment) == (
        viral.data,
        64,
        alone.optim,
        alone.alignment,
    )
    assert dataclasses.replace(own, start=None) == dataclasses.replace(viral, stage1=None)
    assert stages(own) == [own]
    assert stages(first) == [first]


def test_a_folder_takes_the_place_of_stage1() -> None:
    own = read([str(ROOT / "trainer" / "recipes" / "shapes_viral.yaml"), "--start", "runs/stage1-s0"])
    assert (own.start, own.stage1) == (Path("runs/stage1-s0"), None)
    assert stages(own) == [own]


def test_a_stage1_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(
        ConfigError,
        match=r"no recipe .*shapes_stage2\.yaml: expected a YAML file; did you mean '.*shapes_stage1\.yaml'",
    ):
        stages(read([str(ROOT / "trainer" / "recipes" / "shapes_viral.yaml"), "--stage1", "shapes_stage2.yaml"]))


# --- old keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_is_an_error_that_names_the_new_one(old: str, new: str, tmp_path: Path) -> None:
    assert new in dict(config_fields(Recipe))
    assert old not in dict(config_fields(Recipe))
    section, key = old.split(".")
    (tmp_path / "old.yaml").write_text(f"{section}:\n  {key}: 1\n")
    with pytest.raises(ConfigError, match=rf"unknown key '{old}' in .*old\.yaml: it is called '{new}' now"):
        read([str(tmp_path / "old.yaml")])
    with pytest.raises(ConfigError, match=f"unknown option '--{old}': it is called '--{new}' now"):
        read([str(RECIPES[0]), f"--{old}", "1"])


def old_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as it was stored before the keys had their names of today."""
    old = json.loads(json.dumps(recipe))
    names = {new: key.rpartition(".")[2] for key, new in RENAMED.items()}
    for section in ("model", "alignment"):
        old[section] = {
            names.get(f"{section}.{key}", key): value
            for key, value in old[section].items()
            if (section, key) != ("model", "kind")
        }
    old["alignment"] |= {"layer": old["alignment"]["layer"][0], "vfm": old["alignment"]["vfm"][0]}  # plain values once
    del old["stage1"]
    for section, keys in ADDED.items():
        for key, value in keys.items():
            assert old[section].pop(key) == value, f"{section}.{key}"
    return old


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(),
        ModelConfig(name="a"),
        ModelConfig(kind="assembled", vision_encoder="a/clip", language="b/lm"),
        ModelConfig(language="smollm2-135m-instruct"),
    ],
)
def test_a_stored_recipe_is_read_with_the_keys_of_today(model: ModelConfig) -> None:
    recipe = as_mapping(Recipe(model=model))
    old = old_recipe(recipe)
    assert {"tower", "tower_features"} <= old["model"].keys()
    assert "kind" not in old["model"]
    assert "centre" in old["alignment"]
    before = json.dumps(old)
    assert current_recipe(old) == recipe == current_recipe(recipe)
    assert json.dumps(old) == before
    assert current_recipe({"seed": 1, "model": {"kind": "toy"}}) == {"seed": 1, "model": {"kind": "toy"}}


def test_a_folder_from_before_the_new_keys_is_read_everywhere(runs_folder: Path, tmp_path: Path) -> None:
    """By its record, its recipe, the card and a run that goes on or starts from it; its files stay as they are."""
    folder = tmp_path / "viral"
    shutil.copytree(runs_folder / "viral", folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    new = training_record(folder)
    record = json.loads((folder / "training.json").read_text())
    record["recipe"] = old_recipe(record["recipe"])
    for origin in record["origins"]:
        origin["part"] = origin["part"].replace("vision encoder", "vision tower")
    (folder / "training.json").write_text(json.dumps(record))
    stored = old_recipe(yaml.safe_load((folder / "recipe.yaml").read_text()))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(stored))
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert training_record(folder) == new
    assert training_recipe(folder) == new["recipe"]
    recipe = parse(Recipe, [], prog="test", recipe=runs_folder / "viral" / "recipe.yaml")
    check_same_recipe(folder, dataclasses.replace(recipe, output_dir=folder))
    with pytest.raises(ConfigError, match=r"was started with model\.vision_encoder_features"):
        check_same_recipe(
            folder, dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vision_encoder_features=(0, 7)))
        )
    texts = [
        card(own, pd.read_parquet(folder / "evaluation.parquet"), cknna_log(folder))
        for own in (training_record(folder), new)
    ]
    assert sorted(texts[0].splitlines()) == sorted(texts[1].splitlines())  # added keys come last
    assert "| vision encoder | dinov2-small |" in texts[0]
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == files
    stored["model"]["towr"] = 1
    (folder / "recipe.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(ConfigError, match=r"unknown key 'model\.towr' in .*recipe\.yaml"):
        check_same_recipe(folder, recipe)


def test_sweeps_exports_and_the_ledger_read_a_run_from_before_the_new_keys(tmp_path: Path) -> None:
    sweep = Sweep(
        output_dir=tmp_path / "out", seeds=(0,), variants=(f"baseline: {RECIPES[-1].with_name('shapes_stage1.yaml')}",)
    )
    (job,) = sweep.runs()
    recipe = as_mapping(job.recipe())
    store_run(job.folder, 8, recipe=old_recipe(recipe))
    runs = finished(sweep)
    export(tmp_path / "kept", runs)
    (file,) = (tmp_path / "kept").iterdir()
    content = json.loads(file.read_text())
    assert content["recipe"]["model"] == recipe["model"]
    file.write_text(json.dumps(content | {"recipe": old_recipe(content["recipe"])}))
    assert finished(dataclasses.replace(sweep, exported=tmp_path / "kept", report=True)) == runs
    for root in (sweep.output_dir, tmp_path / "kept"):
        trained = find_trained(root, "baseline", Training("baseline-s{seed}", "", ""), 0)
        assert trained is not None
        assert trained.record["recipe"]["model"] == recipe["model"]
