"""Real weights on both sides: DINOv2-S and SmolLM2-135M-Instruct around a connector that the trainer's own command line
trains, at toy size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from skimage import data as photographs
from transformers import AutoTokenizer

from analyses import cknna
from tests.conftest import ROOT, run
from trainer.aligned_model import AlignedForConditionalGeneration
from trainer.alignment_config import AlignmentConfig
from trainer.build.language import IMAGE, append_mean_rows, check_language, language_config
from trainer.build.toy_llava import connector_inputs
from trainer.model_config import ModelConfig
from trainer.output.folder import check_same_recipe, write_recipe
from trainer.recipe import DataConfig, Recipe
from trainer.run import train
from trainer.setups.packed_data import PackedDataset, Packer, collate, first_questions
from trainer.targets.feature_store import ComputedFeatures
from workbench.analysis.declaration import Context
from workbench.capture.hidden_states import read
from workbench.cli import parse
from workbench.data import load_data
from workbench.errors import ConfigError, UnknownNameError, WeightsError
from workbench.hashing import saved_tensors
from workbench.mllm import MLLM
from workbench.weights.fetch import check_unchanged, load_weights, weights_folder

NAME = "smollm2-135m-instruct"
RECIPE = str(ROOT / "trainer" / "recipes" / "smol_viral.yaml")
TOY = [
    "--model.image_size",
    "56",
    "--data.limit_train",
    "4",
    "--data.limit_val",
    "2",
    "--data.questions",
    "2",
    "--optim.steps",
    "2",
    "--optim.batch_size",
    "2",
]
TOY += ["--log_every", "1", "--save_every", "1", "--eval_every", "2", "--alignment.hidden", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model after two steps of VIRAL, with both checkpoints; half a gigabyte each, so none of it is left behind."""
    root = tmp_path_factory.mktemp("smol")
    run("trainer", RECIPE, *TOY, "--output_dir", str(root / "smol"))
    yield root / "smol"
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def language() -> Path:
    return weights_folder(NAME)


@pytest.fixture(scope="module")
def mllm(folder: Path) -> MLLM:
    return MLLM.load(str(folder))


@pytest.mark.slow
def test_only_the_connector_is_trained(folder: Path, mllm: MLLM, language: Path) -> None:
    """Tower and language model hold the pretrained values to the bit; each step moves both layers of the connector."""
    fingerprint = check_language(mllm.model, language)
    tower = check_unchanged("dinov2-small", saved_tensors(mllm.model.model.vision_tower), load_weights("dinov2-small"))
    record = json.loads((folder / "training.json").read_text())
    assert (record["language_fingerprint"], record["tower_fingerprint"]) == (fingerprint, tower)
    rows = mllm.model.get_input_embeddings().weight
    assert len(rows) == 49153
    assert torch.equal(rows, append_mean_rows(rows[:-1], 49153))
    assert mllm.processor.image_token_id == 49152

    def tensors(path: Path) -> dict[str, torch.Tensor]:
        with safe_open(path / "model.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if "projector" in name}  # noqa: SIM118  (a handle, not a mapping)

    first, last = tensors(folder / "checkpoint-1"), tensors(folder)
    assert len(first) == 4
    assert all(not torch.equal(first[name], last[name]) for name in first)
    log = pd.read_parquet(folder / "training.parquet")
    assert log["lm_loss"].dropna().gt(0).all()
    assert log["alignment_loss"].dropna().between(-1, 1).all()
    assert len(log["lm_loss"].dropna()) == 2


@pytest.mark.slow
def test_the_prompt_is_the_language_models_own_chat_format(mllm: MLLM, language: Path) -> None:
    text = mllm.prompt("any red star ?")
    assert text.endswith(f"<|im_start|>user\n{IMAGE}\nany red star ?<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\n")
    plain = [{"role": "user", "content": f"{IMAGE}\nany red star ?"}]
    assert text == AutoTokenizer.from_pretrained(language).apply_chat_template(
        plain, add_generation_prompt=True, tokenize=False
    )


@pytest.mark.slow
def test_packed_questions_are_answered_as_if_alone(mllm: MLLM) -> None:
    """Packed logits equal those of the plain processor-to-logits path, for every answer token of every question."""
    data = first_questions(load_data("shapes:val", limit=2), 3)
    assert [len(scene) for scene in data.scenes] == [3, 3]
    assert data.scenes[0] == load_data("shapes:val", limit=2).scenes[0][:3]
    inputs = ComputedFeatures(data, partial(connector_inputs, mllm.model, mllm.processor))
    batch = collate([*PackedDataset(data, Packer(mllm.processor, inputs.shape[1]), inputs)])
    end = mllm.processor.tokenizer.eos_token_id
    with torch.inference_mode():
        packed = AlignedForConditionalGeneration(mllm.model, None, None).eval()(**batch).logits
        for row, scene in enumerate(data.scenes):
            for number, sample in enumerate(scene, start=1):
                at = (batch["labels"][row].ne(-100) & (batch["segments"][row] == number)).nonzero().flatten()
                plain = mllm.encode([sample.image], [sample.question]).inputs
                answer = mllm.processor.tokenizer(sample.answer)["input_ids"]
                assert batch["labels"][row][at].tolist() == [*answer, end]
                plain["input_ids"] = torch.cat([plain["input_ids"], torch.tensor([answer])], dim=1)
                plain["attention_mask"] = torch.ones_like(plain["input_ids"])
                logits = mllm.model(**plain).logits[0, -len(at) :]
                own, packed = packed[: len(at)], packed[len(at) :]
                assert torch.allclose(own, logits, atol=2e-3)
        assert not len(packed)


@pytest.mark.slow
def test_the_probe_reads_photographs_and_it_answers(mllm: MLLM, tmp_path: Path) -> None:
    for name in ("chelsea", "coffee"):
        Image.fromarray(getattr(photographs, name)()).save(tmp_path / f"{name}.png")
    config = cknna.Config(vfm=("dinov2-small", "efficientnet-lite0"), layers=(0, 30), k=5, null=10)
    scores = cknna.run(config, Context(mllm, load_data(f"folder:{tmp_path}"), 2)).tables["scores"]
    assert scores["layer"].tolist() == [0, 0, 30, 30]
    assert (scores["n"] == 16).all()
    assert scores["score"].between(0, 1).all()
    assert scores["score"][0] > scores["null_q95"][0]  # the connector of a DINOv2 tower keeps DINOv2's neighbourhoods
    sample = load_data("shapes:val", limit=1)[0]
    batch = mllm.encode([sample.image], [sample.question])
    (activations,) = read(mllm, batch, layers=[0, 15, 30])
    assert activations.values.shape == (3, 16, 576)
    assert activations.values.isfinite().all()
    assert isinstance(mllm.generate(batch, max_new_tokens=2)[0], str)


def test_the_pair_differs_in_its_alignment_only() -> None:
    baseline, viral = (
        parse(Recipe, [], prog="trainer", recipe=Path(RECIPE.replace("viral", name))) for name in ("baseline", "viral")
    )
    assert baseline == replace(viral, alignment=AlignmentConfig(), output_dir=Path("runs/smol-baseline"))
    assert baseline.model.language == NAME


def test_grown_rows_are_the_mean() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert append_mean_rows(rows, 4).tolist() == [[1, 2], [3, 6], [2, 4], [2, 4]]
    assert append_mean_rows(rows, 2).tolist() == rows.tolist()


@pytest.mark.slow
def test_a_changed_language_model_is_noticed(mllm: MLLM, language: Path) -> None:
    weight = mllm.model.model.language_model.norm.weight.data
    weight[0] += 1
    with pytest.raises(
        WeightsError, match=r"tensor 'model.norm.weight' of the built model differs from the pretrained one"
    ):
        check_language(mllm.model, language)
    weight[0] -= 1


def test_bad_recipes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"model\.layers is 4, but model\.language = smollm2-135m-instruct already defines",
    ):
        ModelConfig(language=NAME, layers=4)
    with pytest.raises(ConfigError, match=r"data\.questions is 0: expected at least 1"):
        DataConfig(questions=0)
    for other in ("dinov2-small", "efficientnet-lite0"):
        with pytest.raises(ConfigError, match=f"model.language is {other}: expected the weights of a language model"):
            language_config(weights_folder(other))
    with pytest.raises(UnknownNameError, match="unknown weights 'smollm2'"):
        train(Recipe(model=ModelConfig(language="smollm2"), output_dir=tmp_path / "out"), [])
    assert not (tmp_path / "out").exists()


def test_a_layer_the_language_model_does_not_have_is_refused() -> None:
    recipe = Recipe(model=ModelConfig(language=NAME), alignment=AlignmentConfig(objective="cosine", layer=(31,)))
    with pytest.raises(ConfigError, match=r"alignment\.layer is 31: expected 1 to 30"):
        recipe.alignment.check_layers(30)


def test_a_recipe_stored_before_a_key_existed_is_still_the_same_recipe(tmp_path: Path) -> None:
    write_recipe(tmp_path, Recipe(), None)
    stored = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    del stored["model"]["language"], stored["model"]["train"], stored["data"]["questions"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(stored))
    check_same_recipe(tmp_path, Recipe())
    with pytest.raises(ConfigError, match="was started with model"):
        check_same_recipe(tmp_path, replace(Recipe(), model=ModelConfig(train="connector")))
