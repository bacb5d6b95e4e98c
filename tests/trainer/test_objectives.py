"""Predicted features, hidden tokens, and single attention heads: each equals its formula in float64, computed here from
what plain transformers gives."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.conftest import recipe
from tests.students import FLAGS, VIRAL, rows, square_image, world, write
from tests.tiny import build
from tests.trainer.small import tiny
from trainer.aligned_model import AlignedMLLMForConditionalGeneration
from trainer.alignment import attach_alignment
from trainer.alignment_config import AlignmentConfig, SelectionConfig
from trainer.dry_run.plan import plan
from trainer.evaluation import answer_questions
from trainer.head_choice import FILE, HeadChoice, check_same_choice, choose_heads
from trainer.masking import TokenMask, attach_mask, loss_tokens
from trainer.objectives import predict_loss
from trainer.recipe import Recipe
from trainer.run import train
from trainer.setups.conversation import ConversationSetup
from trainer.setups.packed import PackedSetup
from trainer.setups.packed_data import collate
from workbench.cli import parse
from workbench.data import Sample
from workbench.errors import ConfigError, DataError, ModelError, RunError
from workbench.mllm import MLLM
from workbench.scoring.prefixes import can_share
from workbench.spatial.vfm_patches import patches_under
from workbench.vfm import load_vfm

VFM = "efficientnet-lite0"


def run_head(head: Any, tokens: torch.Tensor) -> np.ndarray:
    """P_pi in float64 numpy, from the weights alone."""
    weights = {name: value.detach().double().numpy() for name, value in head.state_dict().items()}
    x = tokens.detach().double().numpy()
    for number in (0, 2):
        x = x @ weights[f"{number}.weight"].T + weights[f"{number}.bias"]
        x = x / (1 + np.exp(-x))
    return x @ weights["4.weight"].T + weights["4.bias"]


def normalized(y: np.ndarray) -> np.ndarray:
    """Each row minus its mean, over its standard deviation, feature by feature."""
    rows = []
    for row in y:
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        rows.append([(value - mean) / math.sqrt(variance + 1e-6) for value in row])
    return np.array(rows)


def squared_error(predicted: np.ndarray, target: np.ndarray) -> float:
    y = normalized(target)
    n, d = predicted.shape
    return sum((predicted[i, j] - y[i, j]) ** 2 for i in range(n) for j in range(d)) / (n * d)


# --- predict --------------------------------------------------------------------------------------


def test_predict_loss_and_its_gradient_equal_their_formulas() -> None:
    torch.manual_seed(0)
    predicted, target = torch.randn(6, 5, requires_grad=True), (7 * torch.randn(6, 5) + 3).requires_grad_()
    loss = predict_loss(predicted, target)
    p, y = predicted.detach().double().numpy(), target.detach().double().numpy()
    assert loss.item() == pytest.approx(squared_error(p, y), rel=1e-5)
    loss.backward()
    assert predicted.grad is not None
    np.testing.assert_allclose(predicted.grad.numpy(), 2 * (p - normalized(y)) / p.size, rtol=1e-4, atol=1e-7)
    assert target.grad is None
    with torch.no_grad():
        assert predict_loss(predicted, 100 * target - 5).item() == pytest.approx(loss.item(), rel=1e-4)
        assert predict_loss(torch.zeros(6, 5), target).item() == pytest.approx(1, rel=1e-4)


# --- hidden tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "share", "expected"), [(64, 0, 64), (64, 0.25, 16), (4, 0.01, 1), (4, 0.99, 3), (2, 0.9, 1), (1, 0, 1)]
)
def test_the_number_of_tokens_in_the_loss(tokens: int, share: float, expected: int) -> None:
    assert loss_tokens(tokens, share) == expected


def test_the_only_token_of_an_image_cannot_be_hidden() -> None:
    with pytest.raises(DataError, match=r"alignment.mask is 0.5, but an image or tile has one visual token: expected"):
        loss_tokens(1, 0.5)


def test_hidden_tokens_are_the_mean_of_the_visible_ones_and_show_nothing(llava: Path) -> None:
    mllm = MLLM.load(str(llava), validate=False)
    batch = mllm.encode(
        [square_image(0), [square_image(1), square_image(2)]],
        ["what is this ?", "a red cat ?"],
    )
    visual = mllm.visual_tokens(batch)
    inputs: list[torch.Tensor] = []
    mllm.decoder.layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    mask = attach_mask(mllm.model.train(), 0.5)
    mllm.decoder.layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    torch.manual_seed(0)
    hidden = mask.draw(visual)
    assert hidden is not None
    logits = mllm.model(**batch.inputs).logits
    before, after = inputs
    expected, start, text = before.clone(), 0, torch.ones(before.shape[:2], dtype=torch.bool)
    for row, sample in enumerate(visual):
        for part in sample:
            is_hidden = hidden[start : start + len(part.index)]
            assert is_hidden.sum() == len(part.index) // 2
            visible = [before[row, position].double() for position in part.index[~is_hidden]]
            for position in part.index[is_hidden]:
                expected[row, position] = (sum(visible) / len(visible)).float()
            text[row, part.index] = False
            start += len(part.index)
    torch.testing.assert_close(after, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(after[text], before[text])

    def disturb(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 10 * hidden[:, None].view(*output.shape[:-1], 1)

    handle = mllm.projector.register_forward_hook(disturb)
    assert torch.equal(mllm.model(**batch.inputs).logits, logits)  # the hidden tokens' own features reach nothing
    assert not torch.allclose(mllm.model.eval()(**batch.inputs).logits, logits, atol=1e-3)
    handle.remove()


@pytest.mark.parametrize("shares_prefix", [True, False])
def test_no_token_is_hidden_in_the_evaluation_after_a_training_pass(llava: Path, shares_prefix: bool) -> None:
    """`Quiz` runs the transformers model itself, without the module that draws the hidden tokens."""
    mllm = MLLM.load(str(llava), validate=False)
    mllm.family = replace(mllm.family, shares_prefix=shares_prefix)
    options = ("red", "blue", "a cat")
    scenes = [
        [
            Sample(f"{n} {word}", str(n), partial(square_image, n), f"what is {word} ?", "red", options, "color")
            for word in ("this", "the")
        ]
        for n in range(3)
    ]
    assert can_share(mllm) == shares_prefix
    model = AlignedMLLMForConditionalGeneration(mllm, mask=attach_mask(mllm.model, 0.9))
    before = answer_questions(model.eval(), mllm, scenes, 2)
    batch = mllm.encode([scene[0].image for scene in scenes], ["what is this ?"] * 3)
    labels = batch.inputs["input_ids"].masked_fill(batch.inputs["input_ids"] < 4, -100)
    inputs = {"labels": labels, "visual": mllm.visual_tokens(batch), **batch.inputs}
    hidden = model.train()(**inputs).logits
    pd.testing.assert_frame_equal(answer_questions(model.eval(), mllm, scenes, 2), before, check_exact=True)
    assert not torch.allclose(model(**inputs).logits, hidden, atol=1e-3)


def test_the_loss_is_a_mean_over_the_hidden_tokens_alone() -> None:
    ready = PackedSetup.from_recipe(tiny(objective="predict", target="encoder", mask=0.25, layer=(3,)))
    model, batch = ready.model.train(), collate([ready.train[i] for i in range(2)])
    assert isinstance(model.mask, TokenMask)
    states: list[torch.Tensor] = []
    model.base.model.language_model.layers[2].register_forward_hook(lambda _, __, output: states.append(output))
    torch.manual_seed(5)
    output = model(**batch)
    torch.manual_seed(5)
    positions = [torch.arange(64), torch.arange(64)]
    chosen = [index[torch.randperm(64)[:16]] for index in positions]
    ids = batch["input_ids"]
    visual = torch.cat([row[seg >= 0] for row, seg in zip(ids, batch["segments"], strict=True)])
    places = (visual == model.config.image_token_id).nonzero().flatten().view(2, 64)
    tokens = torch.cat([states[0][0][places[row]][index] for row, index in enumerate(chosen)])
    target = torch.cat([batch["targets"]["encoder"][row][index] for row, index in enumerate(chosen)])
    assert model.alignment is not None
    predicted = run_head(model.alignment.heads[0], tokens)
    assert output.alignment_loss.item() == pytest.approx(squared_error(predicted, target.double().numpy()), rel=1e-4)
    assert torch.equal(batch["targets"]["encoder"], batch["connector_inputs"])
    model.eval()
    with torch.no_grad():
        whole = [model(**batch).alignment_loss.item() for _ in range(2)]
    assert whole[0] == whole[1] != pytest.approx(output.alignment_loss.item(), rel=1e-3)


def test_a_model_that_shows_hidden_tokens_later_is_refused(tmp_path: Path) -> None:
    mllm = MLLM.load(str(build("qwen3_vl", tmp_path)), validate=False)
    with pytest.raises(ModelError, match=r"but qwen3_vl adds features .*expected alignment.mask 0"):
        attach_mask(mllm.model, 0.5)


# --- attention heads ------------------------------------------------------------------------------


def outputs_of_heads(mllm: MLLM, batch: Any, layers: list[int]) -> dict[tuple[int, int], list[torch.Tensor]]:
    """By layer and head the outputs at the visual tokens of each image, from a hook on o_proj's input."""
    seen: dict[int, torch.Tensor] = {}
    for layer in layers:
        mllm.decoder.layers[layer - 1].self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, layer=layer: seen.update({layer: args[0]})
        )
    mllm.model(**batch.inputs)
    count = mllm.config.get_text_config().num_attention_heads
    return {
        (layer, head): [
            seen[layer][row].view(seen[layer].shape[1], count, -1)[part.index, head]
            for row, sample in enumerate(mllm.visual_tokens(batch))
            for part in sample
        ]
        for layer in layers
        for head in range(count)
    }


@pytest.mark.parametrize("sharing", ["each", "shared"])
@pytest.mark.parametrize("objective", ["cosine", "predict"])
def test_the_loss_of_attention_heads_is_that_of_their_outputs(llava: Path, objective: str, sharing: str) -> None:
    torch.manual_seed(0)
    mllm, sites = MLLM.load(str(llava), validate=False), [(3, 1), (1, 0), (3, 0)]
    alignment = attach_alignment(
        mllm, layers=sites, dims={"vfm": 6}, where="heads", objective=objective, heads=sharing, hidden=8
    )  # type: ignore[arg-type]
    batch = mllm.encode([square_image(0), square_image(1)], ["what is this ?", "a red cat ?"])
    outputs = outputs_of_heads(mllm, batch, [1, 3])
    target = [torch.randn(len(tokens), 6) for tokens in outputs[1, 0]]
    mllm.model(**batch.inputs)
    losses = alignment.losses({"vfm": target}, mllm.visual_tokens(batch))
    assert list(losses) == ["layer_1_head_0/vfm", "layer_3_head_0/vfm", "layer_3_head_1/vfm"] == alignment.names
    y = torch.cat(target).double().numpy()
    for number, (site, loss) in enumerate(zip(sorted(sites), losses.values(), strict=True)):
        predicted = run_head(alignment.heads[number if sharing == "each" else 0], torch.cat(outputs[site]))
        cosines = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(predicted, y, strict=True)]
        expected = -sum(cosines) / len(cosines) if objective == "cosine" else squared_error(predicted, y)
        assert loss.item() == pytest.approx(expected, abs=2e-5)
    # head 0 of layer 3 is made of its own values alone
    losses["layer_3_head_0/vfm"].backward()
    attention = mllm.decoder.layers[2].self_attn
    width = attention.o_proj.in_features // mllm.config.get_text_config().num_attention_heads
    reached = attention.q_proj.weight.grad.abs().sum(1) > 0
    assert reached[:width].any()
    assert not reached[width:].any()


CHOICES = (([(1, 0), (2, 3)], 0.5), ([(1, 0), (2, 3)], 0.5000001), ([(1, 0), (2, 1)], 0.5))


def naive_mutual_knn(x: np.ndarray, y: np.ndarray, k: int) -> float:
    shares = []
    for i in range(len(x)):
        lists = []
        for side in (x, y):
            cosines = {
                j: side[i] @ side[j] / np.sqrt((side[i] @ side[i]) * (side[j] @ side[j]))
                for j in range(len(side))
                if j != i
            }
            lists.append(set(sorted(cosines, key=lambda j: -cosines[j])[:k]))
        shares.append(len(lists[0] & lists[1]) / k)
    return float(np.mean(shares))


def test_the_chosen_heads_have_the_lowest_mutual_knn(llava: Path) -> None:
    mllm, vfm = MLLM.load(str(llava), validate=False), load_vfm(VFM)
    images, prompts = [square_image(n) for n in range(3)], ["what is this ?"] * 3
    settings = AlignmentConfig(
        objective="cosine", where="heads", layer=(2, 1), selection=SelectionConfig(heads=2, k=4, images=3)
    )
    state = torch.get_rng_state()
    choice = choose_heads(mllm, images, prompts, [vfm], settings)
    assert torch.equal(torch.get_rng_state(), state)
    batch = mllm.encode(images, prompts)
    outputs = outputs_of_heads(mllm, batch, [1, 2])
    patches = [parts[0].double().numpy() for parts in patches_under(vfm, images, mllm.visual_tokens(batch))]
    expected = {
        head: np.mean([naive_mutual_knn(x.detach().double().numpy(), y, 4) for x, y in zip(xs, patches, strict=True)])
        for head, xs in outputs.items()
    }
    assert {(layer, head): score for layer, head, score, _ in choice.scores} == pytest.approx(expected, abs=1e-9)
    assert choice.chosen == sorted(sorted(expected, key=lambda head: (expected[head], head))[:2])
    assert (choice.images, choice.tokens) == (3, 16)
    assert all(chance == pytest.approx(4 / 15, abs=0.05) for *_, chance in choice.scores)


def test_ranks_that_chose_different_heads_are_refused() -> None:
    choices = [HeadChoice(chosen, [(1, 0, score, 0.1)], 10, 4, 16) for chosen, score in CHOICES]
    check_same_choice([])
    check_same_choice([None, None])
    check_same_choice(choices[:2])
    with pytest.raises(RunError, match=r"rank 0 chose attention heads 1.0 2.3 and rank 2 1.0 2.1: expected the same"):
        check_same_choice(choices)


def test_a_checkpoint_holds_the_choice(tmp_path: Path) -> None:
    settings = tiny(where="heads", layer=(1, 3), selection=SelectionConfig(heads=2, images=4))
    ready = PackedSetup.from_recipe(settings)
    ready.write_extras(tmp_path)
    assert HeadChoice.load(tmp_path) == replace(ready.choice, scores=[list(row) for row in ready.choice.scores])
    assert ready.record["attention_heads"]["chosen"] == ready.choice.chosen == list(ready.model.alignment.sites)
    other = next(pair for layer, head, *_ in ready.choice.scores if (pair := (layer, head)) not in ready.choice.chosen)
    stored = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(stored | {"chosen": [other, ready.choice.chosen[0]]}))
    resumed = PackedSetup.from_recipe(settings, tmp_path)
    assert set(resumed.model.alignment.sites) == {other, ready.choice.chosen[0]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "predict", "heads": "none"}, "expected each or shared for the predict objective"),
        ({"selection": SelectionConfig(k=5)}, "alignment.selection is changed, but alignment.where is output"),
        (
            {"objective": "none", "where": "heads", "selection": SelectionConfig(k=5)},
            "alignment.selection is changed, but alignment.objective is none: expected an alignment loss on single",
        ),
        ({"objective": "none", "where": "heads", "target": "encoder"}, "alignment.where is heads with alignment.targ"),
        ({"where": "heads", "target": "encoder"}, "alignment.where is heads with alignment.target encoder"),
        ({"objective": "relation", "mask": 0.5}, "alignment.mask is 0.5 with alignment.objective relation"),
        ({"objective": "none", "mask": 0.5}, "expected predict or cosine, whose loss is a mean over tokens"),
        ({"mask": 1.0}, "alignment.mask is 1.0: expected"),
        ({"mask": 0.5, "target": "projector"}, "alignment.target projector, which would be the replaced token"),
        ({"mask": 0.5, "residual": "encoder"}, "alignment.residual encoder, which would show the hidden tokens"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**settings)


def test_heads_that_do_not_exist_are_one_sentence(llava: Path) -> None:
    mllm = MLLM.load(str(llava), validate=False)
    for sites, where, message in (
        ([2], "heads", r"layers contains 2 with where heads: expected pairs \(layer, head\)"),
        ([(2, 0)], "output", r"layers contains \(2, 0\) with where output: expected numbers of layers"),
        ([(2, 99)], "heads", "attention head is 99: expected 0 to"),
        ([(9, 0)], "heads", "layer is 9: expected 1 to 4"),
        ([(2, 0), (2, 0)], "heads", "no layer twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            attach_alignment(mllm, layers=sites, dims={"vfm": 6}, where=where)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"alignment.selection.heads is 99: expected at most 4, .*alignment.layer 2"):
        PackedSetup.from_recipe(tiny(where="heads", selection=SelectionConfig(heads=99, images=1)))


# --- resumed runs ---------------------------------------------------------------------------------

SMALL = ["--optim.steps", "4", "--optim.batch_size", "4", "--data.limit_train", "8", "--data.limit_val", "4"]
SMALL += ["--model.layers", "3", "--model.width", "32", "--model.ffn", "64", "--log_every", "1", "--eval_every", "4"]
SMALL += ["--save_every", "2", "--stage1", "None", "--alignment.hidden", "16", "--monitor.cknna_images", "0"]
VARIANTS = {
    "heads": ["--alignment.where", "heads", "--alignment.layer", "1", "2", "3", "--alignment.selection.images", "4"],
    "masked": ["--alignment.objective", "predict", "--alignment.target", "encoder", "--alignment.mask", "0.25"],
}


def keep_only(folder: Path, checkpoint: str) -> None:
    """Leave a run as if it had been killed after a checkpoint."""
    for file in folder.iterdir():
        if file.name not in (checkpoint, "recipe.yaml"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path, name: str) -> None:
    def fit(folder: Path, *words: str) -> None:
        options = [*SMALL, *VARIANTS[name], "--output_dir", str(folder), *words]
        train(parse(Recipe, options, prog="trainer", recipe=Path(recipe("viral"))), [])

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole)
    shutil.copytree(whole, parts)
    keep_only(parts, "checkpoint-2")
    fit(parts, "--resume")
    for file in ("model.safetensors", "alignment_head.safetensors"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file
    records = [json.loads((folder / "training.json").read_text()) for folder in (whole, parts)]
    if name == "heads":
        assert len(records[0]["attention_heads"]["chosen"]) == 4
        assert records[0]["attention_heads"] == records[1]["attention_heads"]
        assert json.loads((whole / "checkpoint-4" / FILE).read_text()) == records[0]["attention_heads"]


@pytest.mark.parametrize("checkpointing", [[], ["--optim.checkpointing"]])
def test_conversations_with_chosen_heads_and_hidden_tokens_resume_bitwise(
    tmp_path: Path, checkpointing: list[str]
) -> None:
    _, flags = world(tmp_path / "world")
    options = [*flags, *VIRAL, "--alignment.where", "heads", "--alignment.layer", "1", "2", "--alignment.mask", "0.25"]
    options += ["--alignment.selection.heads", "3", "--alignment.selection.images", "4", "--alignment.selection.k", "5"]
    options += ["--model.train", "lora", "--model.lora.rank", "2", "--model.lora.dropout", "0.1", *checkpointing]

    def recipe_to(folder: Path, *words: str) -> Recipe:
        return parse(Recipe, [*options, "--output_dir", str(folder), *words], prog="trainer")

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ready = ConversationSetup.from_recipe(recipe_to(whole))
    batch = ready.collate([0, 1, 3])
    sizes = [len(part.index) for sample in batch["visual"] for part in sample]
    assert int(ready.count_aligned(batch)) == sum(round(0.25 * size) for size in sizes) < sum(sizes)
    train(recipe_to(whole), [])
    shutil.copytree(whole, parts)
    keep_only(parts, "checkpoint-2")
    train(recipe_to(parts, "--resume"), [])
    for file in ("model.safetensors", "alignment_head.safetensors"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file
    record = json.loads((whole / "training.json").read_text())
    assert record["attention_heads"]["chosen"] == [list(head) for head in ready.choice.chosen]
    names = [f"layer_{layer}_head_{head}" for layer, head in ready.choice.chosen]
    log = pd.read_parquet(whole / "training.parquet")
    assert [c for c in log if c.startswith("alignment_loss/")] == [f"alignment_loss/{name}/{VFM}" for name in names]


def test_heads_are_chosen_by_each_image_once(tmp_path: Path) -> None:
    model = build("llava", tmp_path / "llava")
    about = rows()
    options = ["--model.name", str(model), *FLAGS, *VIRAL, "--alignment.where", "heads", "--alignment.layer", "1", "2"]
    options += ["--alignment.selection.heads", "2", "--alignment.selection.images", "3", "--alignment.selection.k", "5"]
    choices = []
    for name, repeats in (("once", 1), ("often", 3)):
        file = write(tmp_path / name, about)
        often = [row | {"id": f"{row['id']}-{n}"} for row in about for n in range(repeats)]
        file.write_text(json.dumps(often))
        words = [*options, "--data.train", f"llava_json:{file}", "--data.val", f"llava_json:{file}"]
        choices.append(ConversationSetup.from_recipe(parse(Recipe, words, prog="trainer")).choice)
    assert choices[0].images == 3
    assert choices[0] == choices[1]


def test_a_dry_run_plans_heads_without_choosing(tmp_path: Path) -> None:
    _, flags = world(tmp_path / "world")
    options = [
        *flags,
        *VIRAL,
        "--alignment.where",
        "heads",
        "--alignment.selection.heads",
        "2",
        "--alignment.mask",
        "0.5",
    ]
    planned = plan(parse(Recipe, [*options, "--output_dir", str(tmp_path / "out")], prog="trainer"))
    text = planned.report()
    assert (
        "the 2 least aligned heads of layer 2 of 4 with efficientnet-lite0, lambda 0.5, 50% of the tokens hidden"
        in text
    )
    assert not (tmp_path / "out").exists()
