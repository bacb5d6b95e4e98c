"""Dropout on the residual stream: on what each block adds and on nothing else, while training only, the same again with
the same seed."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from tests.conftest import recipe, refused
from trainer.alignment_config import AlignmentConfig
from trainer.evaluation import answer_packed
from trainer.model_config import LoraConfig, ModelConfig
from trainer.output.model_folder import save_model
from trainer.recipe import DataConfig, OptimConfig, Recipe
from trainer.run import train
from trainer.setups.packed import PackedSetup
from trainer.setups.packed_data import collate
from workbench.errors import ConfigError
from workbench.mllm import MLLM
from workbench.mllm.conversation import IGNORED

RATE = 0.25
TINY = Recipe(
    model=ModelConfig(layers=3, width=32, ffn=64),
    data=DataConfig(limit_train=12, limit_val=4),
    optim=OptimConfig(steps=6, batch_size=4, warmup=2),
    alignment=AlignmentConfig(objective="cosine", layer=(2,), hidden=16, where="attention"),
    log_every=2,
    eval_every=6,
    save_every=2,
)
DROPPED = replace(TINY, model=replace(TINY.model, dropout=RATE))


def states(ready: PackedSetup, *, training: bool) -> dict[str, list[Tensor]]:
    """What one pass makes of each block: its input, what attention and MLP receive and are about to add, the stream
    between them, and its output."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    handles = []
    for block in ready.model.base.model.language_model.layers:
        handles += [
            block.register_forward_pre_hook(
                lambda _, args, kwargs: seen["input"].append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            ),
            block.self_attn.o_proj.register_forward_pre_hook(
                lambda layer, args: seen["attention"].append(nn.functional.linear(args[0], layer.weight))
            ),
            block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen["between"].append(args[0])),
            block.mlp.down_proj.register_forward_pre_hook(
                lambda layer, args: seen["mlp"].append(nn.functional.linear(args[0], layer.weight))
            ),
            block.register_forward_hook(lambda _, __, output: seen["output"].append(output)),
        ]
    ready.model.train(training)
    with torch.no_grad():
        seen["logits"].append(ready.model(**collate([ready.train[i] for i in range(4)])).logits)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.slow
def test_a_share_of_what_each_block_adds_is_dropped_and_nothing_else() -> None:
    """Elementwise, what is added is 0 or 1 / (1 - rate) of what would be; the stream itself, the image and the logits
    have no dropout of their own."""
    ready = PackedSetup.from_recipe(DROPPED)
    torch.manual_seed(3)
    seen, plain = states(ready, training=True), states(ready, training=False)
    for before, adds, after in (("input", "attention", "between"), ("between", "mlp", "output")):
        for x, own, y in zip(seen[before], seen[adds], seen[after], strict=True):
            added, dropped = y - x, y == x
            assert_close(added[~dropped], own[~dropped] / (1 - RATE), atol=1e-5, rtol=1e-4)
            count = dropped.numel()
            assert abs(int(dropped.sum()) - RATE * count) < 5 * (RATE * (1 - RATE) * count) ** 0.5
    assert torch.equal(seen["input"][0], plain["input"][0])
    assert all(map(torch.equal, seen["input"][1:], seen["output"][:-1]))
    student = ready.model.base
    with torch.no_grad():
        logits = student.lm_head(student.model.language_model.norm(seen["output"][-1]))[0]
    batch = collate([ready.train[i] for i in range(4)])
    assert_close(seen["logits"][0], logits[batch["labels"][batch["segments"] >= 0] != IGNORED])
    for x, own, y in zip(plain["input"], plain["attention"], plain["between"], strict=True):
        assert_close(y, x + own)


@pytest.mark.slow
def test_the_mean_over_many_draws_is_what_is_added_without_dropout() -> None:
    layer = PackedSetup.from_recipe(DROPPED).model.base.model.language_model.layers[0].mlp.down_proj.train()
    x, draws = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), 2000
    torch.manual_seed(0)
    with torch.no_grad():
        values = torch.stack([layer(x) for _ in range(draws)])
        expected = layer.eval()(x)
    error = expected.abs() * (RATE / (1 - RATE) / draws) ** 0.5
    assert ((values.mean(0) - expected).abs() < 5 * error).all()
    assert torch.equal(expected, nn.functional.linear(x, layer.weight))


@pytest.mark.slow
def test_adapters_are_dropped_with_their_layer() -> None:
    """Else a hook would sit on the layer below the adapter, whose part of the sum would never be 0."""
    ready = PackedSetup.from_recipe(
        replace(DROPPED, model=replace(DROPPED.model, train="lora", lora=LoraConfig(rank=2)))
    )
    layer = ready.model.base.model.language_model.layers[0].self_attn.o_proj
    nn.init.normal_(layer.lora_B["default"].weight)
    torch.manual_seed(0)
    dropped = layer.train()(torch.randn(200, 32)).eq(0).float().mean()
    assert float(dropped) == pytest.approx(RATE, abs=0.03)


@pytest.mark.slow
def test_without_dropout_every_loss_is_to_the_bit_what_it_was_and_with_it_the_evaluation_is(tmp_path: Path) -> None:
    plain, none, some = (
        PackedSetup.from_recipe(own)
        for own in (TINY, replace(DROPPED, model=replace(DROPPED.model, dropout=0.0)), DROPPED)
    )
    losses = []
    for ready in (plain, none, some):
        torch.manual_seed(0)
        with torch.no_grad():
            output = ready.model.train()(**collate([ready.train[i] for i in range(4)]))
        losses.append((float(output.lm_loss), float(output.alignment_loss)))
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[2][0]
    assert losses[0][1] != losses[2][1]
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.model.state_dict().values(), some.model.state_dict().values(), strict=True)
    )
    with_none, with_some = (answer_packed(ready.model, ready.val, 2) for ready in (plain, some))
    pd.testing.assert_frame_equal(with_none.table, with_some.table)
    assert with_none.losses == with_some.losses
    assert with_none.losses
    save_model(some.model, some.processor, tmp_path)  # a plain folder, whose model answers as the one in memory does
    mllm, sample = MLLM.load(str(tmp_path)), plain.val.data.scenes[0][0]
    batch = mllm.encode([sample.image], [sample.question])
    with torch.no_grad():
        assert torch.equal(mllm.model(**batch.inputs).logits, plain.model.base.eval()(**batch.inputs).logits)


@pytest.mark.slow
def test_a_run_is_the_same_again_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    own = replace(DROPPED, keep_checkpoints=None, monitor=replace(TINY.monitor, cknna_images=0))
    for name in ("whole", "again"):
        train(replace(own, output_dir=tmp_path / name), ["test"])
    shutil.copytree(
        tmp_path / "whole",
        tmp_path / "resumed",
        ignore=shutil.ignore_patterns("checkpoint-6", "training.json", "*.safetensors"),
    )
    for step in (2, 4):
        shutil.copytree(
            tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "resumed" / f"checkpoint-{step}", dirs_exist_ok=True
        )
    train(replace(own, output_dir=tmp_path / "resumed", resume=True), ["test"])
    whole, *others = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again", "resumed"))
    logs = [
        pd.read_parquet(tmp_path / name / "training.parquet").drop(columns="seconds")
        for name in ("whole", "again", "resumed")
    ]
    for other, log in zip(others, logs[1:], strict=True):
        assert whole.keys() == other.keys()
        assert all(torch.equal(whole[key], other[key]) for key in whole)
        pd.testing.assert_frame_equal(logs[0], log)
    (tmp_path / "resumed" / "training.json").unlink()
    with pytest.raises(
        ConfigError, match=r"was started with model.dropout 0.25, and this recipe says 0.5: choose another output_dir"
    ):
        train(
            replace(own, output_dir=tmp_path / "resumed", resume=True, model=replace(own.model, dropout=0.5)), ["test"]
        )


@pytest.mark.slow
def test_a_first_stage_has_the_dropout_of_its_own_recipe(tmp_path: Path) -> None:
    stage = tmp_path / "tiny_stage1.yaml"
    stage.write_text(
        f"base: {recipe('stage1')}\noptim: {{steps: 2, batch_size: 4}}\nlog_every: 2\nsave_every: 2\neval_every: 2\n"
    )
    own = replace(
        TINY,
        alignment=AlignmentConfig(),
        monitor=replace(TINY.monitor, cknna_images=0),
        stage1=stage,
        optim=replace(TINY.optim, steps=2, warmup=0),
    )
    for name, rate in (("one", 0.5), ("two", 0.0)):
        train(replace(own, model=replace(own.model, dropout=rate), output_dir=tmp_path / name), ["test"])
    rates = [
        yaml.safe_load((tmp_path / name / "recipe.yaml").read_text())["model"]["dropout"]
        for name in ("stage1-s0", "one", "two")
    ]
    assert rates == [0.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.dropot", "0.1"], "unknown option '--model.dropot': did you mean '--model.dropout'"),
        (["--model.dropout", "1"], "model.dropout is 1.0: expected at least 0 and below 1"),
        (["--model.dropout", "-0.1"], "model.dropout is -0.1: expected at least 0 and below 1"),
        (["--model.dropout", "nan"], "model.dropout is nan: expected at least 0 and below 1"),
        (
            ["--model.dropout", "0.1", "--model.name", "a/b"],
            "model.dropout is 0.1, but model.name = a/b already defines the model",
        ),
    ],
)
def test_what_it_cannot_be_is_one_sentence(tmp_path: Path, words: list[str], message: str) -> None:
    assert message in refused("trainer", recipe("viral"), *words, "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
