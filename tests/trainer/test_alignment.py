"""Objectives and variants: each equals its formula in float64 and trains the student only; attached to any model;
re-injected where it should be."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText

from tests.conftest import SMALL, recipe, refused
from tests.students import noise_image, square_image
from tests.tiny import BUILDERS, build
from tests.trainer.small import TINY, tiny
from trainer.alignment import attach_alignment
from trainer.alignment_config import AlignmentConfig
from trainer.build.partition import checkpoint_activations
from trainer.model_config import LoraConfig
from trainer.objectives import AlignmentHead, cosine_loss, relation_loss, weight_at
from trainer.recipe import DataConfig, Recipe
from trainer.run import train
from trainer.setups.packed import PackedSetup
from trainer.setups.packed_data import collate
from trainer.setups.packing import Packing
from workbench.capture.edit import edit
from workbench.capture.hidden_states import read
from workbench.cli import parse
from workbench.errors import ConfigError, DataError, ModelError, UnknownNameError
from workbench.hashing import fingerprint
from workbench.mllm import MLLM
from workbench.mllm.residual import attach_residual
from workbench.spatial.vfm_patches import patches_under
from workbench.vfm import load_vfm

VFMS = ("efficientnet-lite0", "dinov2-small")


# --- losses ---------------------------------------------------------------------------------------


def by_hand(objective: str, predicted: np.ndarray, target: np.ndarray) -> float:
    """Both losses of one image, token by token in float64."""

    def cos(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    n = len(predicted)
    if objective == "cosine":
        return -sum(cos(predicted[i], target[i]) for i in range(n)) / n
    pairs = [(i, j) for i in range(n) for j in range(n)]
    return sum((cos(predicted[i], predicted[j]) - cos(target[i], target[j])) ** 2 for i, j in pairs) / n**2


def run_head(head: AlignmentHead, tokens: torch.Tensor) -> np.ndarray:
    """P_pi in float64 numpy, from the weights alone."""
    w = {name: value.detach().double().numpy() for name, value in head.state_dict().items()}
    x = tokens.detach().double().numpy()
    for number in (0, 2):
        x = x @ w[f"{number}.weight"].T + w[f"{number}.bias"]
        x = x / (1 + np.exp(-x))
    return x @ w["4.weight"].T + w["4.bias"]


def test_relation_loss_equals_its_formula_and_ignores_rotation_scale_and_width() -> None:
    torch.manual_seed(0)
    student, target = torch.randn(6, 5, requires_grad=True), torch.randn(6, 7, requires_grad=True)
    loss = relation_loss(student, target)
    assert loss.item() == pytest.approx(
        by_hand("relation", student.detach().double().numpy(), target.detach().double().numpy()), abs=1e-6
    )
    loss.backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert target.grad is None
    rotation = torch.linalg.qr(torch.randn(7, 7))[0]
    with torch.no_grad():
        assert (
            relation_loss(3 * target @ rotation, target).item()
            < 1e-12
            < 0.01
            < relation_loss(target.flip(0) + 1, target).item()
        )
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    # half of the pairs are the diagonal, the others 2 apart
    assert relation_loss(opposite, opposite.abs()).item() == pytest.approx(2)


def test_relation_loss_is_exact_where_training_is_in_bfloat16() -> None:
    """A small difference of two products, which bfloat16 would drown: both are taken in float32."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, 32, generator=generator) + 3
    student = (target + 0.01 * torch.randn(64, 32, generator=generator)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = relation_loss(student, target)
    expected = by_hand("relation", student.detach().double().numpy(), target.double().numpy())
    assert 0 < expected < 1e-5
    assert loss.item() == pytest.approx(expected, rel=1e-2)


# --- attached to a model --------------------------------------------------------------------------


def hidden_states(mllm: MLLM, batch: Any, where: str) -> dict[int, list[torch.Tensor]]:
    """By layer, the visual tokens of each image as transformers itself gives them: its hidden states, or W_o^-1 of what
    attention adds."""
    found: dict[int, Any] = {}
    if where == "output":
        states = mllm.model(**batch.inputs, output_hidden_states=True).hidden_states
        found = dict(enumerate(states))
    else:
        hooks = [
            block.self_attn.register_forward_hook(lambda _, __, output, layer=layer: found.update({layer: output[0]}))
            for layer, block in enumerate(mllm.decoder.layers, start=1)
        ]
        mllm.model(**batch.inputs)
        for hook in hooks:
            hook.remove()
        for layer, output in list(found.items()):
            found[layer] = torch.linalg.solve(
                mllm.decoder.layers[layer - 1].self_attn.o_proj.weight.double(), output.double().mT
            ).mT
    tokens = mllm.visual_tokens(batch)
    return {
        layer: [values[row, part.index] for row, sample in enumerate(tokens) for part in sample]
        for layer, values in found.items()
    }


@pytest.mark.parametrize("where", ["output", "attention"])
@pytest.mark.parametrize("heads", ["each", "shared", "none"])
@pytest.mark.parametrize("objective", ["cosine", "relation"])
def test_the_attached_loss_is_the_mean_over_layers_and_targets_in_float64(
    llava: Path, objective: str, heads: str, where: str
) -> None:
    if (objective, heads) == ("cosine", "none"):
        return
    torch.manual_seed(0)
    mllm = MLLM.load(str(llava), validate=False)
    dims = {"a": 6, "b": 9}
    alignment = attach_alignment(
        mllm, layers=[3, 1], dims=dims, objective=objective, heads=heads, where=where, hidden=8
    )  # type: ignore[arg-type]
    assert len(alignment.heads) == {"each": 4, "shared": 2, "none": 0}[heads]
    batch = mllm.encode(
        [square_image(0), [square_image(1), square_image(2)]],
        ["what is this ?", "a red cat ?"],
    )
    tokens = mllm.visual_tokens(batch)
    targets = {
        name: [torch.randn(len(part.index), dim, requires_grad=True) for sample in tokens for part in sample]
        for name, dim in dims.items()
    }
    mllm.model(**batch.inputs)
    parts = alignment.losses(targets, tokens)
    states, expected = hidden_states(mllm, batch, where), {}
    for i, layer in enumerate((1, 3)):
        for j, name in enumerate(dims):
            values = []
            for own, target in zip(states[layer], targets[name], strict=True):
                head = None if heads == "none" else alignment.heads[(i if heads == "each" else 0) * 2 + j]
                predicted = own.detach().double().numpy() if head is None else run_head(head, own)  # type: ignore[arg-type]
                values.append(by_hand(objective, predicted, target.detach().double().numpy()))
            expected[f"layer_{layer}/{name}"] = np.mean(values)  # images have one size here
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(expected, abs=2e-5)
    torch.stack(list(parts.values())).mean().backward()
    assert all(own.grad is None for target in targets.values() for own in target)
    reached = {
        n.split("layers.")[1][0]
        for n, p in mllm.model.named_parameters()
        if "language_model.layers" in n and p.grad is not None and p.grad.any()
    }
    assert reached == {"0", "1", "2"}
    assert all(p.grad is not None and p.grad.any() for p in alignment.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_family_is_a_student_and_nothing_of_the_model_changes(name: str, tmp_path: Path) -> None:
    mllm = MLLM.load(str(build(name, tmp_path)), validate=False)
    batch = mllm.encode([noise_image(0, 160, 90), square_image(1)], ["what is this ?", "a red cat ?"])
    tokens = mllm.visual_tokens(batch)
    names, before = set(mllm.model.state_dict()), mllm.model(**batch.inputs).logits
    torch.manual_seed(0)
    alignment = attach_alignment(mllm.model, layers=[2, 3], dims={"vfm": 5}, hidden=8)
    optimizer = torch.optim.SGD([*mllm.model.parameters(), *alignment.parameters()], lr=1e-3)
    old = [p.clone() for p in alignment.parameters()]
    output = mllm.model(**batch.inputs)
    assert torch.equal(output.logits, before)
    assert set(mllm.model.state_dict()) == names
    loss = alignment.loss({"vfm": [[torch.randn(len(part.index), 5) for part in sample] for sample in tokens]}, tokens)
    visual = [read(mllm, batch, layers=[2, 3])[row].values for row in range(2)]
    assert loss.isfinite()
    assert len(visual[0][0]) == sum(len(part.index) for part in tokens[0])
    loss.backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(old, alignment.parameters(), strict=True))
    assert any(p.grad is not None and p.grad.any() for n, p in mllm.model.named_parameters() if "layers.0" in n)
    alignment.remove()
    mllm.model(**batch.inputs)
    with pytest.raises(ModelError, match="before a forward pass"):
        alignment.loss({"vfm": torch.zeros(1, 5)}, tokens)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["output", "attention"])
def test_activation_checkpointing_gives_the_same_gradients(llava: Path, where: str, reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        mllm = MLLM.load(str(llava), validate=False)
        torch.manual_seed(0)
        alignment = attach_alignment(mllm, layers=[2], dims={"vfm": 6}, where=where, hidden=8)  # type: ignore[arg-type]
        mllm.model.train()
        if checkpointing:
            checkpoint_activations(mllm.model, reentrant=reentrant)
            mllm.model.enable_input_require_grads()
        for seed in (0, 1):  # accumulated
            batch = mllm.encode([square_image(seed)], ["what is this ?"])
            tokens = mllm.visual_tokens(batch)
            target = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
            if checkpointing and reentrant and where == "attention":
                with pytest.raises(ModelError, match="expected use_reentrant=False"):
                    mllm.model(**batch.inputs)
                return
            loss = mllm.model(**batch.inputs, labels=batch.inputs["input_ids"]).loss
            (loss + alignment.loss({"vfm": target}, tokens)).backward()
            # what backward computes again is no forward pass
            with pytest.raises(ModelError, match="before a forward pass"):
                alignment.loss({"vfm": target}, tokens)
        found.append(
            {
                n: p.grad
                for n, p in [*mllm.model.named_parameters(), *alignment.named_parameters()]
                if p.grad is not None
            }
        )
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=1e-4)


def test_the_last_layer_is_read_before_or_after_the_final_norm(llava: Path) -> None:
    """transformers' own last hidden state is after it, and its others are outputs of blocks."""
    mllm = MLLM.load(str(llava), validate=False)
    batch = mllm.encode([square_image(0)], ["what is this ?"])
    tokens, last = mllm.visual_tokens(batch), mllm.n_layers
    targets = {"a": torch.randn(len(tokens[0][0].index), 6)}
    states = hidden_states(mllm, batch, "output")
    for final_norm in (True, False):
        torch.manual_seed(0)
        alignment = attach_alignment(mllm, layers=[last, 1], dims={"a": 6}, hidden=8, final_norm=final_norm)
        mllm.model(**batch.inputs)
        losses, head = alignment.losses(targets, tokens), alignment.heads[1]
        alignment.remove()
        after, before = (
            cosine_loss(head(values), targets["a"]).item()
            for values in (states[last][0], read(mllm, batch, layers=[last])[0].values[0])
        )
        assert abs(after - before) > 1e-3
        assert losses[f"layer_{last}/a"].item() == pytest.approx(after if final_norm else before, abs=1e-5)
        first = cosine_loss(alignment.heads[0](states[1][0]), targets["a"]).item()
        assert losses["layer_1/a"].item() == pytest.approx(first, abs=1e-5)
    with pytest.raises(
        ConfigError, match=rf"final_norm with output of layers \[1\]: expected the output of layer {last}"
    ):
        attach_alignment(mllm, layers=[1], dims={"a": 6}, final_norm=True)


def test_misuse_is_one_sentence(llava: Path) -> None:
    mllm = MLLM.load(str(llava), validate=False)
    alignment = attach_alignment(mllm, layers=[2], dims={"vfm": 6}, hidden=8)
    batch = mllm.encode([square_image(0)], ["what is this ?"])
    tokens, good = mllm.visual_tokens(batch), torch.randn(1, 16, 6)
    for targets, where, message in (
        ({"other": good}, tokens, "targets are other: expected vfm"),
        ({"vfm": good[..., :5]}, tokens, "target 'vfm' has width 5: expected 6"),
        ({"vfm": good[:, :5]}, tokens, "target 'vfm' has 5 tokens: expected 16"),
        ({"vfm": good}, [[]], "no sample of the batch has an image"),
    ):
        mllm.model(**batch.inputs)
        with pytest.raises(DataError, match=message):
            alignment.loss(targets, where)
    for options, message in (
        ({"layers": [5]}, "layer is 5: expected 1 to 4"),
        ({"layers": []}, "expected at least one of each"),
        ({"layers": [2, 2]}, "no layer twice"),
        ({"layers": [2], "heads": "none"}, "objective cosine without heads"),
    ):
        with pytest.raises(ConfigError, match=message):
            attach_alignment(mllm, dims={"vfm": 6}, **options)
    with pytest.raises(UnknownNameError, match=r"unknown objective 'cosin'.*did you mean 'cosine'"):
        attach_alignment(mllm, layers=[2], dims={"vfm": 6}, objective="cosin")  # type: ignore[arg-type]


def test_the_vfm_is_seen_under_each_tile_and_stays_as_it_is(tmp_path: Path) -> None:
    """A loop of one's own with a real VFM on a model with tiles: the loss falls, and the VFM's weights are bitwise what
    they were."""
    mllm, vfm = MLLM.load(str(build("internvl", tmp_path)), validate=False), load_vfm("efficientnet-lite0")
    before = fingerprint(vfm.network.state_dict())
    torch.manual_seed(0)
    alignment = attach_alignment(mllm, layers=[2], dims={vfm.name: vfm.dim}, hidden=16)
    optimizer = torch.optim.Adam([*mllm.model.parameters(), *alignment.parameters()], lr=3e-3)
    batch = mllm.encode([noise_image(0, 224, 112)], ["what is this ?"])
    tokens = mllm.visual_tokens(batch)
    targets = {vfm.name: patches_under(vfm, [own[0] for own in batch.images], tokens)}
    assert len(tokens[0]) == 3
    assert targets[vfm.name][0][0].shape == (16, vfm.dim)
    losses = []
    for _ in range(15):
        mllm.model(**batch.inputs)
        losses.append(alignment.loss(targets, tokens))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1].item() < losses[0].item() - 0.3
    assert fingerprint(vfm.network.state_dict()) == before
    assert not any(p.requires_grad for p in vfm.network.parameters())


# --- lambda ---------------------------------------------------------------------------------------


def test_the_weight_follows_its_schedule() -> None:
    def all_of(**settings: Any) -> list[float]:
        return [weight_at(step, steps=9, weight=0.8, **settings) for step in range(9)]

    assert all_of() == [0.8] * 9
    assert all_of(warmup=4) == pytest.approx([0.2, 0.4, 0.6] + [0.8] * 6)
    assert all_of(schedule="linear", final=0.2, warmup=2) == pytest.approx(
        [0.4, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    )
    half = all_of(schedule="cosine")
    assert half[0] == 0.8
    assert half[4] == pytest.approx(0.4)
    assert half[8] == pytest.approx(0)
    assert half == sorted(half, reverse=True)
    assert all(a + b == pytest.approx(0.8) for a, b in zip(half, reversed(half), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": ()}, "alignment.layer is empty"),
        ({"layer": (2, 2)}, "alignment.layer is 2, 2: expected one or more, none of them twice"),
        ({"layer": (0,)}, "alignment.layer is 0: expected at least 1"),
        ({"layer": (2, 9)}, "alignment.layer is 9: expected 1 to 3"),
        ({"vfm": ()}, "alignment.vfm is empty"),
        ({"heads": "none"}, "alignment.heads is none: expected each or shared"),
        (
            {"layer": (2,), "final_norm": True},
            "alignment.final_norm is yes and alignment.layer 2: expected 3, the last",
        ),
        ({"final_norm": True, "where": "attention"}, "alignment.final_norm is yes with .* alignment.where attention"),
        ({"final_weight": 0.1}, "alignment.final_weight is 0.1, but the schedule is constant"),
        ({"target": "projector", "center": True}, "alignment.target is projector"),
        ({"warmup": 5000}, "alignment.warmup is 5000: expected at most optim.steps"),
        ({"objective": "none", "residual": "encoder", "layer": (9,)}, "alignment.layer is 9: expected 1 to 3"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**settings)


@pytest.mark.slow
def test_a_typo_in_the_lora_targets_names_the_layers_there_are(tmp_path: Path) -> None:
    words = [
        recipe("baseline"),
        "--stage1",
        "None",
        *SMALL,
        "--model.train",
        "lora",
        "--model.lora.targets",
        "q_pro",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    last = refused("trainer", *words)
    assert last.startswith("error: unknown model.lora.targets 'q_pro': expected one of")
    assert last.endswith("did you mean 'q_proj'?")
    assert not (tmp_path / "out").exists()
    for settings, message in (
        ({"rank": 0}, "rank is 0: expected at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": ()}, "targets is empty"),
    ):
        with pytest.raises(ConfigError, match=f"model.lora.{message}"):
            LoraConfig(**settings)  # type: ignore[arg-type]


# --- the trainer ----------------------------------------------------------------------------------


def one_step(settings: Recipe) -> tuple[Any, Any, set[str]]:
    """The prepared run, its first output, and the names of the tensors that a step moved."""
    ready = PackedSetup.from_recipe(settings)
    model = ready.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    output = model(**collate([ready.train[i] for i in range(4)]))
    (output.lm_loss + (0 if output.alignment_loss is None else output.alignment_loss)).backward()
    optimizer.step()
    return ready, output, {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", "connector", "lora"])
def test_the_head_moves_in_the_first_step_in_every_mode(train: str) -> None:
    base = tiny()
    _, _, moved = one_step(replace(base, model=replace(base.model, train=train)))  # type: ignore[arg-type]
    assert {f"alignment.heads.0.{n}.{p}" for n in (0, 2, 4) for p in ("weight", "bias")} <= moved
    assert {
        "base.model.multi_modal_projector.linear_1.weight",
        "base.model.multi_modal_projector.linear_2.weight",
    } <= moved
    assert not any("vision_tower" in name for name in moved)
    language = {name for name in moved if "language_model" in name}
    if train == "all":
        assert any("q_proj.weight" in name for name in language)
        assert any("embed_tokens" in name for name in language)
    elif train == "connector":
        assert not language
    else:
        # 7 layers in 3 blocks; A has no gradient while B is zero
        assert len(language) == 21
        assert all("lora_B" in name for name in language)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["encoder", "projector", "vfm"])
@pytest.mark.parametrize("objective", ["cosine", "relation"])
def test_the_targets_of_a_run_are_what_they_are_called(objective: str, target: str) -> None:
    """The first loss of a run equals float64 computed from the model's own hidden states and independently made
    targets."""
    ready = PackedSetup.from_recipe(tiny(objective=objective, target=target, vfm=VFMS, layer=(1, 3)))
    batch = collate([ready.train[i] for i in range(2)])
    model = ready.model.train()
    states: dict[int, torch.Tensor] = {}
    for layer in (1, 3):
        model.base.model.language_model.layers[layer - 1].register_forward_hook(
            lambda _, __, output, layer=layer: states.update({layer: output})
        )
    output = model(**batch)
    visual = Packing.of(batch["segments"]).flat(batch["input_ids"])[0] == model.config.image_token_id
    projector = model.base.model.multi_modal_projector
    projected = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(batch["connector_inputs"])))
    if target == "vfm":
        images = [ready.train.data.scenes[i][0].image for i in range(2)]
        targets = {name: load_vfm(name)(images, grid=(8, 8)).tokens() for name in VFMS}
    else:
        targets = {target: batch["connector_inputs"] if target == "encoder" else projected}
    expected = {}
    for i, layer in enumerate((1, 3)):
        for j, (name, values) in enumerate(targets.items()):
            head = model.alignment.heads[i * len(targets) + j]
            tokens = states[layer][0][visual].unflatten(0, (2, 64))
            each = [
                by_hand(objective, run_head(head, tokens[row]), values[row].detach().double().numpy())
                for row in range(2)
            ]
            expected[f"layer_{layer}/{name}"] = np.mean(each)
    assert {name: value.item() for name, value in output.alignment_losses.items()} == pytest.approx(expected, abs=2e-5)
    assert output.alignment_loss.item() == pytest.approx(np.mean(list(expected.values())), abs=2e-5)


@pytest.mark.slow
def test_the_target_of_the_projector_has_no_gradient() -> None:
    """With the language model cut off before the head, nothing is left that could move the connector."""
    ready = PackedSetup.from_recipe(tiny(target="projector"))
    model = ready.model.train()
    model.base.model.language_model.layers[1].register_forward_hook(lambda _, __, output: output.detach())
    del model.alignment._handles
    fresh = attach_alignment(model.base, layers=[2], dims={"projector": 32}, hidden=16)
    model.alignment = fresh
    model(**collate([ready.train[0]])).alignment_loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.base.parameters())
    assert all(p.grad is not None and p.grad.any() for p in fresh.parameters())


@pytest.mark.slow
def test_the_controls_act_on_the_own_encoder_too() -> None:
    plain, others = (PackedSetup.from_recipe(tiny(target="encoder", images=images)) for images in ("same", "others"))
    assert torch.equal(plain.train.targets["encoder"].rows(range(8)), plain.train.inputs.rows(range(8)))
    assert all(not torch.equal(plain.train.inputs[i], others.train.targets["encoder"][i]) for i in range(8))


@pytest.mark.slow
def test_the_default_head_and_loss_are_what_they_were() -> None:
    """Seed, order of construction and formula of the first VIRAL recipe: the head is made after the VFM, from the
    generator as it stands then."""
    from transformers import set_seed

    from trainer.build.connector_init import init_projector
    from trainer.build.toy_llava import build_llava, build_processor
    from workbench.data import load_data

    ready = PackedSetup.from_recipe(tiny())
    train, val = load_data("shapes:train", limit=8), load_data("shapes:val", limit=4)
    processor = build_processor(TINY.model, sorted(train.vocabulary | val.vocabulary))
    set_seed(0)
    llava, _ = build_llava(TINY.model, processor)
    init_projector(llava, ready.train.inputs.rows(range(8)), 8)
    load_vfm("efficientnet-lite0")
    head = AlignmentHead(32, 16, 112)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), ready.model.alignment.parameters(), strict=True))
    batch = collate([ready.train[i] for i in range(4)])
    seen: list[torch.Tensor] = []
    ready.model.base.model.language_model.layers[1].register_forward_hook(lambda _, __, output: seen.append(output))
    output = ready.model(**batch)
    visual = seen[0][Packing.of(batch["segments"]).flat(batch["input_ids"]) == ready.model.config.image_token_id].view(
        4, 64, -1
    )
    assert torch.equal(output.alignment_loss, cosine_loss(head(visual), batch["targets"]["efficientnet-lite0"]))


VARIED = ["--stage1", "None", *SMALL, "--alignment.hidden", "16"]
SPLIT = {
    "several": [
        "--alignment.layer",
        "1",
        "3",
        "--alignment.vfm",
        *VFMS,
        "--alignment.schedule",
        "cosine",
        "--alignment.warmup",
        "3",
    ],
    "residual": ["--alignment.residual", "encoder", "--alignment.layer", "2", "--alignment.objective", "relation"],
    "lora": [
        "--model.train",
        "lora",
        "--model.lora.rank",
        "2",
        "--model.lora.dropout",
        "0.1",
        "--alignment.layer",
        "2",
    ],
}


def fit(*words: str) -> None:
    train(parse(Recipe, [*VARIED, *words], prog="trainer", recipe=Path(recipe("viral"))), [])


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of `SPLIT` trained in one go, and in two parts: stopped after its first checkpoint, then resumed."""
    import shutil

    root = tmp_path_factory.mktemp("variants")
    for name, words in SPLIT.items():
        whole, parts = root / name, root / f"{name}-parts"
        fit(*words, "--output_dir", str(whole))
        shutil.copytree(whole, parts)
        for file in parts.iterdir():
            if file.name not in ("checkpoint-6", "recipe.yaml"):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        fit(*words, "--output_dir", str(parts), "--resume")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SPLIT))
def test_resumed_is_bitwise_the_uninterrupted_run(variants: Path, name: str) -> None:
    whole, parts = variants / name, variants / f"{name}-parts"
    files = {file.name for file in whole.glob("*.safetensors")}
    assert files == {"model.safetensors", "alignment_head.safetensors"} | (
        {"visual_residual.safetensors"} if name == "residual" else set()
    )
    for file in files:
        a, b = load_file(whole / file), load_file(parts / file)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), file
    logs = [pd.read_parquet(folder / "training.parquet").dropna(subset=["lm_loss"]) for folder in (whole, parts)]
    columns = [c for c in logs[0].columns if c.startswith("alignment") or c in ("lm_loss", "loss", "grad_norm")]
    assert len(columns) == (5 if name != "several" else 9)
    assert logs[0][columns].equals(logs[1][columns])


def test_several_layers_and_vfms_are_logged_apart(variants: Path) -> None:
    log = pd.read_parquet(variants / "several" / "training.parquet").dropna(subset=["lm_loss"])
    parts = [f"alignment_loss/layer_{layer}/{vfm}" for layer in (1, 3) for vfm in VFMS]
    assert log[parts].mean(axis=1).tolist() == pytest.approx(log["alignment_loss"].tolist(), abs=1e-6)
    weights = [weight_at(int(step) - 1, steps=12, weight=0.5, schedule="cosine", warmup=3) for step in log["step"]]
    assert log["alignment_weight"].tolist() == pytest.approx(weights)
    assert weights[-1] == pytest.approx(0)
    heads = torch.nn.ModuleList([AlignmentHead(32, 16, dim) for _ in range(2) for dim in (112, 384)])
    heads.load_state_dict(load_file(variants / "several" / "alignment_head.safetensors"))
    record = json.loads((variants / "several" / "training.json").read_text())
    assert record["vfm"] == list(VFMS)
    assert len(set(record["vfm_fingerprint"])) == 2


@pytest.mark.slow
def test_lora_ends_as_a_plain_folder_that_computes_the_same(variants: Path) -> None:
    """The last checkpoint keeps the exact adapters; they merge into what the final folder holds, and only the adapters
    and the connector were trained."""
    folder = variants / "lora"
    assert not (folder / "trained.safetensors").exists()
    assert not list(folder.rglob("adapter_config.json"))
    base = tiny()
    ready = PackedSetup.from_recipe(
        replace(
            base,
            data=DataConfig(limit_train=24, limit_val=8),
            model=replace(base.model, train="lora", lora=LoraConfig(rank=2)),
        )
    )
    trained = load_file(folder / "checkpoint-12" / "trained.safetensors")
    own = dict(ready.model.base.named_parameters())
    assert set(trained) == {name for name, p in own.items() if p.requires_grad}
    assert all("lora" in n or "projector" in n for n in trained)
    with torch.no_grad():
        for name, value in trained.items():
            own[name].copy_(value)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    for reference in (plain, AutoModelForImageTextToText.from_pretrained(folder / "checkpoint-12")):
        merged = reference.state_dict()
        weight = "model.language_model.layers.1.mlp.up_proj"
        delta = (
            32
            / 2
            * trained[f"{weight}.lora_B.default.weight"].double()
            @ trained[f"{weight}.lora_A.default.weight"].double()
        )
        torch.testing.assert_close(
            merged[f"{weight}.weight"].double(),
            own[f"{weight}.base_layer.weight"].double() + delta,
            atol=1e-6,
            rtol=1e-5,
        )
        assert delta.abs().max() > 1e-5
        assert torch.equal(
            merged["model.language_model.embed_tokens.weight"], own["model.language_model.embed_tokens.weight"]
        )
    ready.model.eval()
    mllm = MLLM.load(str(folder))
    batch = mllm.encode([ready.val.data[0].image], [ready.val.data[0].question])
    with torch.inference_mode():
        torch.testing.assert_close(
            ready.model.base(**batch.inputs).logits, mllm.model(**batch.inputs).logits, atol=1e-4, rtol=1e-4
        )


# --- residual -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loaded_residual_computes_what_training_computed(variants: Path) -> None:
    """Packed logits and hidden states of the trainer's model equal those of `MLLM.load`; plain transformers, which
    ignores the residual, differs."""
    folder = variants / "residual"
    mllm = MLLM.load(str(folder))
    assert mllm.residual is not None
    assert all(p.any() for p in mllm.residual.parameters())
    ready = PackedSetup.from_recipe(
        replace(tiny(objective="none", residual="encoder"), data=DataConfig(limit_train=24, limit_val=8))
    )
    model = ready.model.eval()
    model.base.load_state_dict(AutoModelForImageTextToText.from_pretrained(folder).state_dict())
    model.residual.adapters.load_state_dict(load_file(folder / "visual_residual.safetensors"))
    sample = ready.val.data.scenes[0][0]
    batch = mllm.encode([sample.image], [sample.question])
    seen: list[torch.Tensor] = []
    hook = model.base.model.language_model.layers[1].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.inference_mode():
        packed = collate([ready.val[0]])
        logits = model(**packed).logits[0]  # of the first question's answer
        hook.remove()
        assert torch.allclose(logits, mllm.model(**batch.inputs).logits[0, -1], atol=2e-4)
        plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
        assert not torch.allclose(logits, plain(**batch.inputs).logits[0, -1], atol=2e-3)
    visual = packed["input_ids"][0] == model.config.image_token_id
    torch.testing.assert_close(read(mllm, batch, layers=[2])[0].values[0], seen[0][0][visual], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("source", ["encoder", "projector"])
def test_the_image_is_added_at_the_visual_positions_only(llava: Path, source: str) -> None:
    mllm = MLLM.load(str(llava), validate=False)
    batch = mllm.encode([square_image(0), square_image(1)], ["what is this ?", "what is a red dog ?"])
    before = read(mllm, batch, layers=[0, 2, 3], tokens="all")
    torch.manual_seed(0)
    residual = attach_residual(mllm.model, source, [2], 32)  # type: ignore[arg-type]
    mllm.residual = residual
    if source == "encoder":
        after = read(mllm, batch, layers=[3], tokens="all")
        # adapters begin at zero
        assert all(torch.equal(a.values[0], b.values[2]) for a, b in zip(after, before, strict=True))
        torch.nn.init.normal_(residual.adapters[0].weight)  # type: ignore[arg-type]
        torch.nn.init.normal_(residual.adapters[0].bias)  # type: ignore[arg-type]
    after = read(mllm, batch, layers=[2], tokens="all")
    tower = read(mllm, batch, layers=[0], encoder=True)
    for row in range(2):
        visual = torch.isin(before[row].tokens, tower[row].tokens)
        assert torch.equal(before[row].values[1][~visual], after[row].values[0][~visual])
        assert visual.sum() == 16
        if source == "projector":
            added = before[row].values[0][visual]
        else:
            z = tower[row].encoder_features.double()
            z = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            added = z @ residual.adapters[0].weight.double().T + residual.adapters[0].bias.double()
        torch.testing.assert_close(
            after[row].values[0][visual].double(), before[row].values[1][visual].double() + added, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("source", ["encoder", "projector"])
def test_a_block_that_runs_again_in_the_backward_pass_adds_the_same(llava: Path, source: str) -> None:
    """Some versions of transformers checkpoint the call of a block, and what is added to its output with it."""
    gradients = []
    for again in (False, True):
        mllm = MLLM.load(str(llava), validate=False)
        batch = mllm.encode([square_image(0)], ["what is this ?"])
        torch.manual_seed(0)
        residual = attach_residual(mllm.model, source, [2], 32)  # type: ignore[arg-type]
        for adapter in residual.adapters:
            torch.nn.init.normal_(adapter.weight)  # type: ignore[arg-type]
        for block in mllm.decoder.layers if again else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        mllm.model(**batch.inputs).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in mllm.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


@pytest.mark.parametrize("source", ["encoder", "projector"])
def test_decoding_with_a_cache_equals_full_passes(llava: Path, source: str) -> None:
    """Greedy by whole forward passes, one a token, with the answer's own image placeholders left alone."""
    mllm = MLLM.load(str(llava), validate=False)
    batch = mllm.encode([square_image(0)], ["what is this ?"])
    plain = mllm.model.generate(**batch.inputs, max_new_tokens=6, do_sample=False)
    torch.manual_seed(1)
    residual = attach_residual(mllm.model, source, [1, 3], 32)  # type: ignore[arg-type]
    for adapter in residual.adapters:
        torch.nn.init.normal_(adapter.weight)  # type: ignore[arg-type]
    cached = mllm.model.generate(**batch.inputs, max_new_tokens=6, do_sample=False)
    inputs = dict(batch.inputs)
    with torch.inference_mode():
        for _ in range(6):
            new = mllm.model(**inputs, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], new], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert torch.equal(cached[0], inputs["input_ids"][0][: len(cached[0])])
    assert not torch.equal(cached, plain)
    image = torch.tensor([[mllm.config.image_token_id]])
    steps = []
    with torch.inference_mode():  # a decoded token is no visual position, even with the placeholder's id
        for step in ({"input_ids": image}, {"inputs_embeds": mllm.model.get_input_embeddings()(image)}):
            steps.append(
                mllm.model(**step, past_key_values=mllm.model(**batch.inputs, use_cache=True).past_key_values).logits
            )
    assert torch.equal(*steps)


@pytest.mark.parametrize("source", ["encoder", "projector"])
def test_interventions_see_the_residual(llava: Path, source: str) -> None:
    """Editing nothing changes nothing, at every place; what an edit is handed is what `read` says; another image put in
    at the tower is that image."""
    mllm = MLLM.load(str(llava), validate=False)
    mllm.residual = attach_residual(mllm.model, source, [2], 32)  # type: ignore[arg-type]
    torch.manual_seed(0)
    for adapter in mllm.residual.adapters:
        torch.nn.init.normal_(adapter.weight)  # type: ignore[arg-type]
    batch = mllm.encode([square_image(0)], ["what is this ?"])
    other = mllm.encode([square_image(1)], ["what is this ?"])
    with torch.inference_mode():
        plain, wanted = (mllm.model(**b.inputs).logits[:, -1:].float() for b in (batch, other))
    for place in ("encoder", "projector", 1, 2, 3):
        handed: list[torch.Tensor] = []
        logits = edit(
            mllm, batch, at=place, fn=lambda values, _, handed=handed: handed.append(values.clone()) or values
        )
        torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-4)
        if isinstance(place, int):
            torch.testing.assert_close(handed[0], read(mllm, batch, layers=[place])[0].values[0], atol=1e-5, rtol=1e-4)
    features = read(mllm, other, layers=[0], encoder=True)[0]
    torch.testing.assert_close(
        edit(mllm, batch, at="encoder", fn=lambda *_: features.encoder_features), wanted, atol=1e-4, rtol=1e-3
    )  # type: ignore[arg-type, return-value]
    if source == "projector":
        torch.testing.assert_close(
            edit(mllm, batch, at="projector", fn=lambda *_: features.values[0]), wanted, atol=1e-4, rtol=1e-3
        )


@pytest.mark.slow
def test_a_residual_that_cannot_be_right_is_refused(variants: Path, tmp_path: Path) -> None:
    import shutil

    mllm = MLLM.load(str(variants / "residual"))
    with pytest.raises(ModelError, match="therefore cannot run alone"):
        mllm.decoder(inputs_embeds=torch.zeros(1, 3, 32))
    batch = mllm.encode([square_image(0)], ["any red star ?"])
    features = mllm.model.get_image_features(**batch.vision)
    text = {k: v for k, v in batch.inputs.items() if k != "pixel_values"}
    mllm.model(**text, mm_encoder_outputs={"image": features})
    with pytest.raises(ModelError, match="expected an image that goes through the projector"):
        mllm.model(**text, mm_encoder_outputs={"image": features})  # features of a pass before this one
    shutil.copytree(variants / "residual", tmp_path / "copy")
    (tmp_path / "copy" / "visual_residual.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adds its image again.*is missing or does not fit"):
        MLLM.load(str(tmp_path / "copy"))
    with pytest.raises(ConfigError, match="expected a model trained without a residual"):
        PackedSetup.from_recipe(
            replace(TINY, start=variants / "residual", data=DataConfig(limit_train=24, limit_val=8))
        )
    gemma = MLLM.load(str(build("gemma3", tmp_path / "gemma")), validate=False)
    with pytest.raises(ModelError, match="does not give one visual token for each row"):
        attach_residual(gemma.model, "encoder", [2], 32)


@pytest.mark.slow
def test_the_fingerprint_knows_the_residual(variants: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(variants / "residual", tmp_path / "copy")
    file = tmp_path / "copy" / "visual_residual.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    assert MLLM.load(str(variants / "residual")).fingerprint != MLLM.load(str(tmp_path / "copy")).fingerprint


# --- records --------------------------------------------------------------------------------------


def test_the_runs_page_reads_old_and_new_records(tmp_path: Path) -> None:
    from workbench.training_folder import alignment_words, training_record
    from workbench.yaml_config import as_mapping

    old = {"layer": 3, "vfm": "efficientnet-lite0", "weight": 0.5}  # of a record from before there could be several
    for objective, words in (("cosine", "efficientnet-lite0, layer 3, weight 0.5"), ("none", "none")):
        (tmp_path / "training.json").write_text(json.dumps({"recipe": {"alignment": old | {"objective": objective}}}))
        assert alignment_words(training_record(tmp_path)["recipe"]["alignment"]) == words
    control = as_mapping(
        AlignmentConfig(
            objective="cosine",
            images="others",
            center=True,
            schedule="linear",
            final_weight=0.1,
            warmup=5,
            where="attention",
        )
    )
    assert alignment_words(control) == (
        "efficientnet-lite0, layer 3, weight 0.5, schedule linear, final weight 0.1, warmup 5, where attention, "
        "control: shuffled targets, control: centered targets"
    )
    new = as_mapping(AlignmentConfig(objective="relation", layer=(2, 3), vfm=VFMS, teacher_norm="student"))
    new = json.loads(json.dumps(new))
    assert (
        alignment_words(new)
        == "efficientnet-lite0, dinov2-small, layer 2, 3, weight 0.5, objective relation, CLIP-normalized"
    )
    normed = as_mapping(AlignmentConfig(objective="cosine", final_norm=True, warmup=1))
    assert alignment_words(normed) == "efficientnet-lite0, layer 3, weight 0.5, warmup 1, final norm"
    assert (
        alignment_words(as_mapping(AlignmentConfig(residual="projector", layer=(2,)))) == "residual projector, layer 2"
    )
