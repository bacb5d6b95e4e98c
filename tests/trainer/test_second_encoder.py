"""A second encoder beside the tower: what the connector receives, what it changes, and that a folder which cannot run
elsewhere says so everywhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.conftest import recipe, refused
from trainer.alignment_config import AlignmentConfig
from trainer.dry_run.plan import plan
from trainer.model_config import ModelConfig
from trainer.output.model_folder import load_model, save_model
from trainer.recipe import DataConfig, OptimConfig, Recipe
from trainer.run import train
from trainer.setups.packed import PackedSetup
from trainer.setups.packed_data import collate
from workbench import load_vfm
from workbench.errors import ConfigError, ModelError, WeightsError
from workbench.mllm import MLLM
from workbench.training_folder import training_record

VFM = "efficientnet-lite0"
TOWER, DIM = 768, 112
PLAIN = Recipe(
    model=ModelConfig(layers=3, width=32, ffn=64),
    data=DataConfig(limit_train=12, limit_val=4),
    optim=OptimConfig(steps=6, batch_size=4, warmup=2),
    log_every=2,
    eval_every=3,
    save_every=2,
    keep_checkpoints=None,
)
BOTH = replace(PLAIN, model=replace(PLAIN.model, second_encoder=VFM))


def logits(ready: PackedSetup) -> torch.Tensor:
    with torch.no_grad():
        return ready.model.eval()(**collate([ready.train[i] for i in range(4)])).logits


@pytest.fixture(scope="module")
def plain() -> PackedSetup:
    return PackedSetup.from_recipe(PLAIN)


@pytest.fixture(scope="module")
def both() -> PackedSetup:
    return PackedSetup.from_recipe(BOTH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, evaluated on a split of its own, with its best model."""
    own = replace(BOTH, data=replace(BOTH.data, test="shapes:test", limit_test=4), keep_best=True)
    target = tmp_path_factory.mktemp("second") / "two_encoders"
    train(replace(own, output_dir=target), ["test"])
    return target


@pytest.mark.slow
def test_the_connector_receives_both_and_with_the_second_weighted_zero_the_model_is_the_one_without(
    plain: PackedSetup, both: PackedSetup
) -> None:
    states = [ready.model.state_dict() for ready in (plain, both)]
    connector = both.model.base.model.multi_modal_projector
    other = {
        name
        for name in states[0]
        if states[0][name].shape != states[1][name].shape or not torch.equal(states[0][name], states[1][name])
    }
    assert states[0].keys() == states[1].keys()
    assert other == {f"base.model.multi_modal_projector.linear_1.{name}" for name in ("weight", "bias")}

    features = both.train.inputs.rows(range(12))
    assert torch.equal(features[..., :TOWER], plain.train.inputs.rows(range(12)))
    assert features.shape == (
        12,
        64,
        TOWER + DIM,
    )
    images = [scene[0].image for scene in both.train.data.scenes]
    scale = both.record["second_encoder_scale"]
    assert isinstance(scale, float)
    assert_close(features[..., TOWER:], scale * load_vfm(VFM)(images, grid=(8, 8)).tokens(), atol=1e-5, rtol=1e-4)
    tower, second = (part.flatten(0, 1).std(0).mean() for part in features.split([TOWER, DIM], -1))
    assert_close(tower, second)
    # 32 / width / deviation
    assert both.input_rate == pytest.approx(plain.input_rate * TOWER / (TOWER + DIM), rel=1e-4)

    seen = connector.linear_1(features).detach().flatten(0, 1)  # standardized, as a narrow connector's are
    assert seen.mean(0).abs().max() < 1e-3
    assert 0.5 < float(seen.std(0).mean()) < 2
    before = logits(both)
    with torch.no_grad():
        kept = connector.linear_1.weight.clone(), connector.linear_1.bias.clone()
        connector.linear_1.weight[:, TOWER:] = 0
        assert (logits(both) - before).abs().max() > 1e-3
        narrow = plain.model.base.model.multi_modal_projector.linear_1
        connector.linear_1.weight[:, :TOWER] = narrow.weight
        connector.linear_1.bias.copy_(narrow.bias)
    assert_close(logits(both), logits(plain), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        connector.linear_1.weight.copy_(kept[0])
        connector.linear_1.bias.copy_(kept[1])


@pytest.mark.slow
def test_features_computed_at_every_step_are_those_of_the_cache(both: PackedSetup) -> None:
    computed = PackedSetup.from_recipe(
        replace(BOTH, data=replace(BOTH.data, features="compute", limit_train=2, limit_val=2))
    )
    assert computed.val.inputs.shape == (2, 64, TOWER + DIM)
    assert_close(
        computed.val.inputs.rows([0, 1])[..., TOWER:] / computed.record["second_encoder_scale"],
        both.val.inputs.rows([0, 1])[..., TOWER:] / both.record["second_encoder_scale"],
        atol=1e-3,
        rtol=1e-3,
    )


def test_a_step_trains_the_connector_on_both_and_leaves_the_second_encoder_as_it_was(both: PackedSetup) -> None:
    both.model.train()
    both.model(**collate([both.train[i] for i in range(4)])).lm_loss.backward()
    gradient = both.model.base.model.multi_modal_projector.linear_1.weight.grad
    assert gradient is not None
    assert gradient[:, :TOWER].abs().sum() > 0
    assert gradient[:, TOWER:].abs().sum() > 0
    both.model.zero_grad()
    both.check_frozen(both.model.base.state_dict())
    assert both.second is not None
    values = next(both.second.network.parameters())
    with torch.no_grad():
        values.add_(1)
        with pytest.raises(WeightsError, match=f"{VFM} changed while the model was trained"):
            both.check_frozen(both.model.base.state_dict())
        values.sub_(1)


@pytest.mark.slow
def test_a_folder_goes_back_into_its_model_and_into_no_other(both: PackedSetup, tmp_path: Path) -> None:
    save_model(both.model, both.processor, tmp_path)
    again = PackedSetup.from_recipe(replace(BOTH, seed=1))
    assert not torch.equal(logits(again), logits(both))
    load_model(again.model, tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.model.state_dict().values(), both.model.state_dict().values(), strict=True)
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["viral_second_encoder"] == {
        "vfm": VFM,
        "features": DIM,
        "fingerprint": both.record["second_encoder_fingerprint"],
        "scale": both.record["second_encoder_scale"],
    }
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(
        ModelError,
        match=(
            r"sees efficientnet-lite0 beside .* its accuracies are in accuracy.parquet, in the folder of its training$"
        ),
    ):
        MLLM.load(str(tmp_path))


@pytest.mark.slow
def test_a_run_is_evaluated_recorded_and_refused_elsewhere(folder: Path) -> None:
    record = training_record(folder)
    vfm = load_vfm(VFM)
    assert record["second_encoder"] == VFM
    assert record["second_encoder_fingerprint"] == vfm.fingerprint
    assert record["second_encoder_licence"] == "Apache-2.0"
    sources = json.loads((folder / "checkpoint-6" / "sources.json").read_text())
    assert {
        "second_encoder": vfm.fingerprint,
        "second_encoder_settings": vfm.entry.settings(),
    }.items() <= sources.items()
    assert len(pd.read_parquet(folder / "accuracy.parquet")) > 1
    assert len(pd.read_parquet(folder / "best" / "accuracy.parquet")) > 1
    assert f"cknna/layer_1/{VFM}" in pd.read_parquet(folder / "training.parquet").columns
    card = (folder / "README.md").read_text()
    assert "This model sees efficientnet-lite0 beside its own vision encoder" in card
    assert "from_pretrained" not in card
    assert "library_name" not in card
    (row,) = [line for line in card.splitlines() if line.startswith("| second encoder ")]
    assert row.startswith("| second encoder efficientnet-lite0 | efficientnet-lite0 |")
    assert row.endswith(f"| {vfm.fingerprint} | Apache-2.0 |")
    for model, scores in ((folder, folder), (folder / "best", folder / "best"), (folder / "checkpoint-4", folder)):
        said = refused(
            "analyses.attention",
            "--model",
            str(model),
            "--data",
            "shapes:val",
            "--limit",
            "2",
            "--output_dir",
            str(folder.parent / "runs"),
        )
        assert (
            said
            == f"error: model '{model}' sees efficientnet-lite0 beside its own vision encoder (viral_second_encoder in"
            " its config.json), so only the trainer can run it: its accuracies are in"
            f" {scores / 'accuracy.parquet'}"
        )
    assert not (folder.parent / "runs").exists()


@pytest.mark.slow
def test_it_goes_on_to_the_bit(folder: Path, tmp_path: Path) -> None:
    own = replace(
        BOTH,
        data=replace(BOTH.data, test="shapes:test", limit_test=4),
        keep_best=True,
        output_dir=tmp_path / "resumed",
        resume=True,
    )
    shutil.copytree(folder, tmp_path / "resumed", ignore=shutil.ignore_patterns("checkpoint-6", "training.json"))
    train(own, ["test"])
    whole, resumed = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    logs = [
        pd.read_parquet(path / "training.parquet").drop(columns="seconds") for path in (folder, tmp_path / "resumed")
    ]
    pd.testing.assert_frame_equal(*logs)


@pytest.mark.slow
def test_a_second_stage_has_the_scale_of_the_first_and_no_other_encoder(folder: Path, tmp_path: Path) -> None:
    """The scale is measured on the first stage's images; measured anew on others it would not be the one that the
    connector was trained with."""
    second = replace(BOTH, start=folder, data=replace(BOTH.data, limit_train=3), output_dir=tmp_path / "out")
    ready = PackedSetup.from_recipe(second)
    scales = [
        record["second_encoder_scale"]
        for record in (
            training_record(folder),
            ready.record,
            PackedSetup.from_recipe(replace(second, start=None)).record,
        )
    ]
    assert scales[0] == scales[1] != scales[2]
    trained = load_file(folder / "model.safetensors")
    (name,) = [name for name in trained if name.endswith("linear_1.weight")]
    assert torch.equal(ready.model.base.model.multi_modal_projector.linear_1.weight, trained[name])
    for check in (PackedSetup.from_recipe, plan):
        with pytest.raises(
            ConfigError,
            match=(
                r"start is .*, whose second encoder is efficientnet-lite0: expected none, as model.second_encoder says"
            ),
        ):
            check(replace(second, model=PLAIN.model))
    changed = shutil.copytree(folder, tmp_path / "start", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((changed / "config.json").read_text())
    for key, value, said in (
        ("vfm", "another", "another: expected"),
        ("fingerprint", "abc", "efficientnet-lite0 with other weights: expected"),
    ):
        there = config["viral_second_encoder"] | {key: value}
        (changed / "config.json").write_text(json.dumps(config | {"viral_second_encoder": there}))
        with pytest.raises(
            ConfigError, match=f"whose second encoder is {said} efficientnet-lite0, as model.second_encoder says"
        ):
            PackedSetup.from_recipe(replace(second, start=changed))


@pytest.mark.slow
@pytest.mark.parametrize("vfm", [VFM, "dinov2-small"])
def test_the_dry_run_has_the_real_sizes_and_counts_shared_features_once(vfm: str) -> None:
    own = replace(BOTH, alignment=AlignmentConfig(objective="cosine", layer=(2,), hidden=16, vfm=(vfm,)))
    found = plan(own)
    assert found.features == 4 * 64 * 16 * (TOWER + DIM + (384 if vfm != VFM else 0))
    assert found.not_run == ()
    if vfm == VFM:
        assert found.sizes.total == sum(p.numel() for p in PackedSetup.from_recipe(own).model.parameters())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model.second_encodr", VFM],
            "unknown option '--model.second_encodr': did you mean '--model.second_encoder'",
        ),
        (["--model.second_encoder", "dinov2-smal"], "unknown VFM 'dinov2-smal': expected one of dinov2-small, "),
        (
            ["--model.second_encoder", "dinov2-smal", "--dry_run"],
            "unknown VFM 'dinov2-smal': expected one of dinov2-small, ",
        ),
        (
            ["--model.second_encoder", VFM, "--alignment.target", "encoder"],
            f"alignment.target is encoder with model.second_encoder {VFM}: expected another",
        ),
        (
            ["--model.second_encoder", VFM, "--alignment.residual", "encoder"],
            "alignment.residual is encoder with model.second_encoder",
        ),
        (
            ["--model.second_encoder", VFM, "--model.name", "a/b"],
            f"model.second_encoder is {VFM}, but model.name = a/b already defines the model",
        ),
    ],
)
def test_what_it_cannot_be_is_one_sentence(tmp_path: Path, words: list[str], message: str) -> None:
    assert message in refused("trainer", recipe("viral"), *words, "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
