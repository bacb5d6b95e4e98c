"""Frozen matrices in bfloat16: what is trained stays float32, training and resuming are the same to the bit as with
float32 storage, the stored model is exact, and the dry run counts it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText

from tests.students import VIRAL, noise_image, world
from trainer.build.frozen_precision import halve_frozen
from trainer.checks import check_launch
from trainer.dry_run.plan import plan
from trainer.head_choice import choose_heads
from trainer.output.model_folder import LORA_FILE
from trainer.recipe import Recipe
from trainer.run import train
from trainer.setups.conversation import ConversationSetup
from workbench.cli import parse
from workbench.errors import ConfigError
from workbench.mllm import MLLM

AUTOCAST = ["--optim.precision", "bfloat16", "--optim.steps", "4", "--optim.accumulation", "2", "--seed", "1"]
LORA = ["--model.train", "lora", "--model.lora.rank", "2", "--model.lora.dropout", "0.3", "--optim.checkpointing"]
HALF = ["--optim.frozen_precision", "bfloat16"]


def recipe_of(flags: list[str]) -> Recipe:
    return parse(Recipe, flags, prog="trainer")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    flags = world(tmp_path_factory.mktemp("llava"))[1]
    return [*flags, *VIRAL, *AUTOCAST, *LORA, "--keep_checkpoints", "None"]


@pytest.fixture(scope="module")
def runs(llava: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training with both ways of storage."""
    root = tmp_path_factory.mktemp("runs")
    for name, more in (("single", []), ("half", HALF)):
        train(recipe_of([*llava, *more, "--output_dir", str(root / name)]), [])
    return root


def test_matrices_of_frozen_linear_layers_are_halved_and_nothing_else(llava: list[str]) -> None:
    setup = ConversationSetup.from_recipe(recipe_of([*llava, *HALF]))
    matrices = {
        id(module.weight): name for name, module in setup.model.named_modules() if isinstance(module, nn.Linear)
    }
    halved = set()
    for name, p in setup.model.named_parameters():
        if p.requires_grad:
            assert p.dtype == torch.float32, name
        elif p.dtype == torch.bfloat16:
            assert id(p) in matrices, name
            halved.add(name)
        else:
            assert p.dtype == torch.float32
            assert id(p) not in matrices, name
    trained = {name for name, p in setup.model.named_parameters() if p.requires_grad}
    parts = ("lora_A", "lora_B", "multi_modal_projector", "alignment.heads")
    assert all(any(part in name for name in trained) for part in parts)
    assert any("vision_tower" in name for name in halved)
    assert any("base_layer" in name for name in halved)
    assert any("lm_head" in name for name in halved)
    assert sum(p.numel() * p.element_size() for p in setup.model.parameters()) == plan(setup.recipe).sizes.weights


def test_a_matrix_that_is_also_an_embedding_stays_float32() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "head": nn.Linear(4, 7), "other": nn.Linear(4, 4)})
    model["head"].weight = model["embedding"].weight
    model.requires_grad_(False)
    model["trained"] = nn.Linear(4, 4)
    halve_frozen(model)
    assert {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16} == {"other.weight"}


@pytest.mark.slow
def test_training_is_the_same_to_the_bit_as_with_float32_storage(runs: Path) -> None:
    logs = [pd.read_parquet(runs / name / "training.parquet") for name in ("single", "half")]
    columns = ["step", "lm_loss", "alignment_loss", "grad_norm", "loss"]
    pd.testing.assert_frame_equal(*(log[columns].dropna() for log in logs), check_exact=True)
    single, half = (load_file(runs / name / "checkpoint-4" / LORA_FILE) for name in ("single", "half"))
    assert single.keys() == half.keys()
    assert all(torch.equal(value, half[name]) for name, value in single.items())
    assert any(value.any() for name, value in half.items() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["", "checkpoint-4"])
def test_the_stored_model_is_the_rounded_matrix_plus_the_adapter_in_float32(runs: Path, folder: str) -> None:
    stored = AutoModelForImageTextToText.from_pretrained(runs / "half" / folder)  # in the dtype that its config names
    tensors = stored.state_dict()
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    recipe = recipe_of(["--model.name", str(json.loads((runs / "half" / "training.json").read_text())["model"])])
    original = MLLM.load(str(recipe.model.name), dtype="float32", validate=False).model.state_dict()
    adapters = load_file(runs / "half" / "checkpoint-4" / LORA_FILE)
    checked = 0
    for key, factor in adapters.items():
        if "lora_A" not in key:
            continue
        name = key.replace(".lora_A.default", "")
        delta = adapters[key.replace("lora_A", "lora_B")].double() @ factor.double() * (32 / 2)
        expected = original[name].bfloat16().double() + delta
        torch.testing.assert_close(tensors[name].double(), expected, atol=1e-7, rtol=1e-6)
        checked += int((tensors[name].bfloat16().float() != tensors[name]).any())  # not rounded again
    assert checked > 3
    norm = next(name for name in original if name.endswith("input_layernorm.weight"))
    assert torch.equal(tensors[norm], original[norm])


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_bitwise(llava: list[str], runs: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copytree(runs / "half" / "checkpoint-2", cut / "checkpoint-2")
    shutil.copy(runs / "half" / "recipe.yaml", cut)
    train(recipe_of([*llava, *HALF, "--resume", "--output_dir", str(cut)]), [])
    for file in ("model.safetensors", "alignment_head.safetensors", f"checkpoint-4/{LORA_FILE}"):
        first, second = load_file(runs / "half" / file), load_file(cut / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items()), file
    losses = [pd.read_parquet(folder / "evaluation.parquet") for folder in (runs / "half", cut)]
    pd.testing.assert_frame_equal(*losses)


@pytest.mark.slow
def test_questions_are_answered_and_the_encoders_width_is_found(llava: list[str], tmp_path: Path) -> None:
    """Both run the model outside the pass that the trainer wraps."""
    pytest.importorskip("datasets")
    image = next((Path(llava[3].removeprefix("llava_json:")).parent / "coco").glob("*.png"))
    shutil.copy(image, tmp_path / "asked.png")
    rows = [{"image": "asked.png", "question": "what is this ?", "answer": "cat", "options": ["cat", "dog"]}] * 2
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ["--data.val", f"hf:{tmp_path / 'asked.jsonl'}", "--alignment.target", "encoder", "--optim.steps", "2"]
    train(recipe_of([*llava, *HALF, *more, "--output_dir", str(tmp_path / "out")]), [])
    assert pd.read_parquet(tmp_path / "out" / "evaluation.parquet")["correct"].notna().all()


def test_heads_are_chosen_by_the_vfms_float32_features(llava: list[str]) -> None:
    heads = ["--alignment.where", "heads", "--alignment.selection.heads", "1", "--alignment.selection.k", "2"]
    setup = ConversationSetup.from_recipe(recipe_of([*llava, *HALF, *heads]))
    dtypes: dict[str, set[torch.dtype]] = {"vfm": set(), "o_proj": set()}

    def note(name: str, value: torch.Tensor) -> None:
        dtypes[name].add(value.dtype)

    for layer in setup.vfms[0].network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, output: note("vfm", output))
    setup.mllm.decoder.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: note("o_proj", args[0]))
    settings, images = setup.recipe.alignment, [noise_image(n) for n in range(3)]
    choose_heads(setup.mllm, images, ["what is this ?"] * 3, setup.vfms, settings)
    assert dtypes == {"vfm": {torch.float32}, "o_proj": {torch.bfloat16}}


def test_what_cannot_be_halved_is_one_sentence(llava: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"frozen_precision is bfloat16 and optim.precision float32: expected"):
        recipe_of([*llava, *HALF, "--optim.precision", "float32"])
    with pytest.raises(ConfigError, match=r"optim.frozen_precision do not work with a toy LLaVA"):
        recipe_of([*AUTOCAST, *HALF])
    with pytest.raises(ConfigError, match="so that nothing is frozen"):
        recipe_of([*llava, *HALF, "--model.train", "all", "--model.train_vision_encoder"])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="frozen_precision is bfloat16 with fsdp, which shards weights of one prec"):
        check_launch(recipe_of([*llava, *HALF]))


def test_the_estimate_counts_two_bytes_less_for_each_halved_parameter(llava: list[str], tmp_path: Path) -> None:
    del tmp_path
    single, half = (plan(recipe_of([*llava, *more])) for more in ([], HALF))
    halved = half.sizes.halved
    assert halved > 0.3 * single.sizes.total
    assert single.sizes.halved == 0
    assert half.sizes == replace(single.sizes, halved=halved)
    # autocast makes copies of one block's frozen weights, unless they are in bfloat16 already
    assert single.memory("ddp", 2) - half.memory("ddp", 2) == 2 * halved + 2 * single.sizes.block
    assert f"{halved:,} frozen parameters in bfloat16" in half.report()
    assert "fsdp" in single.report()
    assert "fsdp" not in half.report()
