"""The dry run: the sizes it says are those of the real model, its checks stop what would fail later, and it writes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, LlavaConfig

from tests.conftest import SMALL_VIRAL, recipe, run
from trainer import dry_run
from trainer.checkpoint import save_model
from trainer.config import AlignmentConfig, DataConfig, LoraConfig, ModelConfig, OptimConfig, Recipe
from trainer.dry_run import check_disk, one_square, plan
from trainer.outline import attach, on_meta, sizes_of
from trainer.prepare import prepare
from workbench.errors import ConfigError, RunError

TINY = Recipe(
    model=ModelConfig(layers=3, width=32, ffn=64),
    data=DataConfig(limit_train=12, limit_val=4),
    optim=OptimConfig(batch_size=2, global_batch=8),
    alignment=AlignmentConfig(objective="cosine", layer=(2, 3), hidden=16),
    output_dir=Path("runs/never"),
)
VARIANTS = {
    "viral": TINY,
    "lora": replace(TINY, model=replace(TINY.model, train="lora", lora=LoraConfig(rank=2))),
    "connector": replace(TINY, model=replace(TINY.model, train="connector"), alignment=replace(TINY.alignment, target="projector", where="attention")),
    "residual": replace(TINY, alignment=AlignmentConfig(residual="encoder", layer=(1,))),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_sizes_are_those_of_the_real_model(tmp_path: Path, name: str) -> None:
    found, ready = plan(VARIANTS[name]), prepare(VARIANTS[name])
    real = list(ready.model.parameters())
    assert found.sizes.total == sum(p.numel() for p in real) and found.sizes.trained == sum(p.numel() for p in real if p.requires_grad)
    assert set(found.image_tokens) == {ready.train.inputs.shape[1]} and found.sequence == max(len(packed.input_ids) for packed in ready.train.packed)
    assert (found.items, found.val_items, found.unit) == (12, 4, "images")
    if name != "lora":  # whose folder is merged
        save_model(ready.model, ready.processor, tmp_path)
        written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
        assert found.checkpoint == pytest.approx(written + 8 * found.sizes.trained, rel=0.01)


def test_a_7b_llava_from_its_configuration() -> None:
    """LLaVA-1.5-7B: 7.06 billion parameters, 576 visual tokens, of which none takes memory here."""
    config = LlavaConfig(image_seq_length=576)
    config.text_config.vocab_size = 32064
    model = on_meta(AutoModelForImageTextToText, config)
    viral = replace(TINY, model=ModelConfig(layers=32), alignment=AlignmentConfig(objective="cosine", layer=(16,), vfm=("dinov2-base",), hidden=2048))
    attached = attach(viral, model, *one_square(model, 576))
    sizes = sizes_of(model, attached.alignment, attached.residual)
    assert all(p.is_meta for p in model.parameters()) and attached.not_run == () and attached.widths == {"tower": 1024, "dinov2-base": 768}
    assert sum(sizes.parts[part][0] for part in ("tower", "connector", "language")) == 7_063_427_072
    assert sizes.parts["head"][0] == 4096 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 768 + 768
    assert sizes.block == 202_383_360  # 4 x 4096^2 + 3 x 4096 x 11008 + 2 x 4096
    whole = dry_run.Plan(viral, sizes, model.config, 665_000, (576, 576), 1024, 100, 0, 0)
    memory = {strategy: whole.memory(strategy, 8) - whole.activations() for strategy in dry_run.STRATEGIES}
    assert memory["ddp"] > memory["zero2"] > memory["zero3"] == memory["fsdp"]
    assert memory["ddp"] == 4 * (sizes.total + 4 * sizes.trained)
    with pytest.raises(ConfigError, match=r"alignment.layer is 33: expected 1 to 32"):
        attach(replace(viral, model=ModelConfig(layers=64), alignment=replace(viral.alignment, layer=(33,))), model, *one_square(model, 576))
    with pytest.raises(ConfigError, match=r"an image of 530 visual tokens does not fit"):
        attach(viral, model, *one_square(model, 530))


def test_a_disk_that_is_too_small_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A disk of one megabyte."""
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(RunError, match=r"checkpoints and result need about .* MB in .*, where 1.0 MB are free"):
        check_disk(plan(replace(TINY, output_dir=tmp_path / "out")))


def test_the_command_says_it_and_writes_nothing(tmp_path: Path) -> None:
    words = [recipe("viral"), "--start", "None", *SMALL_VIRAL, "--output_dir", str(tmp_path / "out"), "--dry_run"]
    said = run("trainer", *words, "--optim.global_batch", "8").stdout
    for text in ("64 per image", "12 of 8 images (4 x 2 accumulated x 1 processes)", "output of layer 2 of 3 with efficientnet-lite0", "zero3", "2 proc."):
        assert text in said, text
    assert "4 proc." not in said  # 8 images do not divide into 4 x 4
    assert list(tmp_path.iterdir()) == []
    assert run("trainer", *words, "--data.val", "shapes:vla", code=2).stderr.strip().splitlines()[-1].startswith("error: ")
