"""The dry run: the sizes it says are those of the real model, its checks stop what would fail later, and it writes
nothing."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.gpu import models
from tests.conftest import ROOT, SMALL_VIRAL, recipe, refused, run
from tests.students import FLAGS, VIRAL, configs, rows, write, write_sparse
from tests.tiny import build
from trainer.__main__ import read
from trainer.alignment import attach_alignment
from trainer.alignment_config import AlignmentConfig
from trainer.build.assembled_llava import describe_parts
from trainer.build.lora import add_lora
from trainer.dry_run import disk
from trainer.dry_run.disk import check_disk
from trainer.dry_run.meta import attach_on_meta, on_meta
from trainer.dry_run.plan import STRATEGIES, Plan, one_square, plan
from trainer.dry_run.sizes import FLOAT, Sizes, sizes_of
from trainer.model_config import LoraConfig, ModelConfig
from trainer.output.model_folder import save_model
from trainer.recipe import DataConfig, OptimConfig, Recipe
from trainer.run import train
from trainer.setups.conversation import ConversationSetup
from trainer.setups.packed import PackedSetup
from workbench.errors import ConfigError, RunError, WorkbenchError
from workbench.yaml_config import as_mapping

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
    "connector": replace(
        TINY,
        model=replace(TINY.model, train="connector"),
        alignment=replace(TINY.alignment, target="projector", where="attention"),
    ),
    "residual": replace(TINY, alignment=AlignmentConfig(residual="encoder", layer=(1,))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_the_sizes_are_those_of_the_real_model(tmp_path: Path, name: str) -> None:
    found, ready = plan(VARIANTS[name]), PackedSetup.from_recipe(VARIANTS[name])
    real = list(ready.model.parameters())
    assert found.sizes.total == sum(p.numel() for p in real)
    assert found.sizes.trained == sum(p.numel() for p in real if p.requires_grad)
    assert set(found.image_tokens) == {ready.train.inputs.shape[1]}
    assert found.sequence == max(len(packed.input_ids) for packed in ready.train.packed)
    assert (found.items, found.val_items, found.unit) == (12, 4, "images")
    if name != "lora":  # whose folder is merged
        save_model(ready.model, ready.processor, tmp_path)
        written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
        assert found.checkpoint == pytest.approx(written + 8 * found.sizes.trained, rel=0.01)


@pytest.mark.slow
def test_a_report_names_the_residual_what_was_not_run_and_no_features_that_are_not_kept() -> None:
    report = plan(VARIANTS["residual"]).report()
    assert "residual encoder into layer 1 of 3" in report
    assert "not run        language model and heads (a residual needs the whole model at once)" in report
    cached, computed = (plan(replace(TINY, data=replace(TINY.data, features=mode))) for mode in ("cache", "compute"))
    assert cached.features == 4 * 64 * 16 * (768 + 112)
    assert computed.features == 0
    assert "not run" not in cached.report()
    assert "cosine, output of layer 2, 3 of 3 with efficientnet-lite0, lambda 0.5" in cached.report()


@pytest.mark.slow
def test_a_7b_llava_from_its_configuration() -> None:
    """LLaVA-1.5-7B: 7.06 billion parameters, 576 visual tokens, of which none takes memory here."""
    config = LlavaConfig(image_seq_length=576)
    config.text_config.vocab_size = 32064
    model = on_meta(AutoModelForImageTextToText, config)
    viral = replace(
        TINY,
        model=ModelConfig(layers=32),
        alignment=AlignmentConfig(objective="cosine", layer=(16,), vfm=("dinov2-base",), hidden=2048),
    )
    attached = attach_on_meta(viral, model, *one_square(model, 576))
    sizes = sizes_of(model, attached.alignment, attached.residual)
    assert all(p.is_meta for p in model.parameters())
    assert attached.not_run == ()
    assert attached.widths == {"tower": 1024, "dinov2-base": 768}
    assert sum(sizes.parts[part][0] for part in ("tower", "connector", "language")) == 7_063_427_072
    assert sizes.parts["head"][0] == 4096 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 768 + 768
    assert sizes.block == 202_383_360  # 4 x 4096^2 + 3 x 4096 x 11008 + 2 x 4096
    whole = Plan(viral, sizes, model.config, 665_000, (576, 576), 1024, 100, 0, 0)
    memory = {strategy: whole.memory(strategy, 8) - whole.activations(8) for strategy in STRATEGIES}
    assert memory["ddp"] > memory["zero2"] > memory["fsdp"] >= memory["zero3"]
    assert memory["ddp"] == 4 * (sizes.total + 4 * sizes.trained)
    small = replace(whole, recipe=replace(viral, optim=replace(viral.optim, batch_size=1, global_batch=None)))
    # each process holds all of it until it is divided
    assert small.memory("fsdp", 1024) == 4 * sizes.total + 4 * sizes.total // 1024
    with pytest.raises(ConfigError, match=r"alignment.layer is 33: expected 1 to 32"):
        attach_on_meta(
            replace(viral, model=ModelConfig(layers=64), alignment=replace(viral.alignment, layer=(33,))),
            model,
            *one_square(model, 576),
        )
    with pytest.raises(ConfigError, match=r"an image of 530 visual tokens does not fit"):
        attach_on_meta(viral, model, *one_square(model, 530))


def test_a_disk_that_is_too_small_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A disk of one megabyte."""
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(
        RunError, match=r"checkpoints and result, frozen features need about .* MB in .*, where 1.0 MB are free"
    ):
        check_disk(plan(replace(TINY, output_dir=tmp_path / "out")))


def test_the_disk_holds_the_best_model_and_the_one_before_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = plan(replace(TINY, output_dir=tmp_path / "out", save_every=TINY.optim.steps, keep_best=True))
    need = made.checkpoint + made.features + 3 * FLOAT * made.sizes.total
    for free, fits in ((need - 1, False), (need, True)):
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
        with nullcontext() if fits else pytest.raises(RunError, match="need about"):
            check_disk(made)


@pytest.mark.slow
def test_the_disk_holds_a_checkpoint_of_the_last_step_and_what_lora_goes_on_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of 3 steps, 2 between checkpoints, two are kept; a LoRA run keeps its factors by themselves beside the merged
    model."""
    own = replace(
        TINY,
        output_dir=tmp_path / "out",
        log_every=1,
        eval_every=3,
        save_every=2,
        optim=replace(TINY.optim, steps=3, warmup=0),
    )
    own = replace(own, model=replace(own.model, train="lora"), data=replace(own.data, features="compute"))
    found = plan(own)
    train(own, ["test"])
    folders = [tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-3"]
    written = sum(
        file.stat().st_size for folder in folders for file in folder.iterdir() if file.suffix in (".safetensors", ".pt")
    )
    planned = 2 * found.checkpoint
    # of either: there are names beside the numbers, and what is merged is not written
    assert abs(written - planned) < FLOAT * found.sizes.trained
    result = 4 * found.sizes.total
    for free, fits in ((planned + result - 1, False), (planned + result + 1, True)):
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
        with nullcontext() if fits else pytest.raises(RunError, match="checkpoints and result need about"):
            check_disk(found)


def test_the_command_says_it_and_writes_nothing(tmp_path: Path) -> None:
    words = [recipe("viral"), "--stage1", "None", *SMALL_VIRAL, "--output_dir", str(tmp_path / "out"), "--dry_run"]
    said = run("trainer", *words, "--optim.global_batch", "8").stdout
    for text in (
        "64 per image",
        "12 of 8 images (4 x 2 accumulated x 1 processes)",
        "output of layer 2 of 3 with efficientnet-lite0",
        "zero3",
        "2 proc.",
    ):
        assert text in said, text
    assert "8 proc." in said
    assert "16 proc." not in said
    assert list(tmp_path.iterdir()) == []
    assert "did you mean 'val'" in refused("trainer", *words, "--data.val", "shapes:vla")


# --- released models ------------------------------------------------------------------------------


def words(root: Path, model: list[str], file: Path, *more: str) -> list[str]:
    (root / "recipe.yaml").write_text("{}")
    data = f"llava_json:{file}"
    return [
        str(root / "recipe.yaml"),
        *model,
        "--data.train",
        data,
        "--data.val",
        data,
        *FLAGS,
        *VIRAL,
        *more,
        "--output_dir",
        str(root / "never"),
    ]


FAMILIES = {  # and what meta cannot run of them
    "llava_next": (["--model.train", "lora", "--model.lora.rank", "2"], ""),
    "qwen2_5_vl": (["--alignment.target", "encoder"], "vision encoder and projector"),
    "smolvlm": (["--model.train_vision_encoder"], "vision encoder and projector"),
    "paligemma": (["--alignment.objective", "none", "--alignment.residual", "projector"], "language model and heads"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_sizes_of_a_released_model_are_those_of_the_real_one(name: str, tmp_path: Path) -> None:
    more, missing = FAMILIES[name]
    file = write(tmp_path / "w", rows(4, 2) if name != "paligemma" else rows(3, 0)[1:])
    recipe = read(words(tmp_path, ["--model.name", str(build(name, tmp_path / name))], file, *more))
    found, ready = plan(recipe), ConversationSetup.from_recipe(recipe)
    real = list(ready.model.parameters())
    assert found.sizes.total == sum(p.numel() for p in real)
    assert found.sizes.trained == sum(p.numel() for p in real if p.requires_grad)
    for part, count in ready.record["trained"].items():  # type: ignore[attr-defined]
        assert found.sizes.parts[part][1] == count
    if name == "smolvlm":
        assert found.sizes.encoder_blocks == 2
    batch = ready.collate(list(range(len(ready.train))))
    tokens = [
        sum(len(part.index) for part in sample if part.image == n)
        for sample in batch["visual"]
        for n in {part.image for part in sample}
    ]
    assert found.image_tokens == (min(tokens), max(tokens))
    assert found.sequence == batch["input_ids"].shape[1]
    assert (found.items, found.texts, found.unit) == (len(ready.train), 2 * (name != "paligemma"), "conversations")
    assert [what.startswith(missing) for what in found.not_run] == [True] * bool(missing)
    if recipe.alignment.target == "vfm" and recipe.alignment.aligned:
        assert found.features == sum(own.numel() * 4 for row in batch["targets"]["efficientnet-lite0"] for own in row)
    assert not (tmp_path / "never").exists()
    assert all(line in found.report() for line in (f"{len(ready.train)} to train on", "zero3"))


@pytest.mark.slow
def test_features_of_an_image_are_stored_once(tmp_path: Path) -> None:
    model, about = build("llava", tmp_path / "m"), rows(1, 0)
    needed = [
        plan(read(words(tmp_path, ["--model.name", str(model)], write(tmp_path / str(count), about * count)))).features
        for count in (1, 5)
    ]
    assert needed[0] == needed[1] > 0


def test_what_waits_for_the_backward_pass_follows_precision_and_checkpointing() -> None:
    """By hand, for a language model of 2 layers of width 8 that is trained whole, 5 tokens of a vocabulary of 11 and a
    batch of 3."""
    text = SimpleNamespace(hidden_size=8, num_hidden_layers=2, vocab_size=11)
    config: Any = SimpleNamespace(get_text_config=lambda: text)
    sizes = Sizes({"language": (1000, 1000), "tower": (500, 0)}, block=300, outside=400)
    tokens = 3 * 5
    logits = tokens * 2 * 4 * 11
    for precision, checkpointing, expected in (
        ("float32", False, tokens * 8 * 68 * 2),
        ("float32", True, tokens * 8 * (2 * 4 + 68)),
        ("bfloat16", False, tokens * 8 * 34 * 2 + 2 * 1000),
        ("bfloat16", True, tokens * 8 * (2 * 4 + 34) + 2 * (1000 + 300)),
    ):
        recipe: Any = SimpleNamespace(
            optim=OptimConfig(batch_size=3, precision=precision, checkpointing=checkpointing), model=ModelConfig()
        )  # type: ignore[arg-type]
        assert Plan(recipe, sizes, config, 9, (4, 4), 5, 1, 0, 0).activations(1) == expected + logits


def test_memory_is_what_a_gpu_needed() -> None:
    """LLaVA-1.5-7B with LoRA 128 and one aligned layer, 701 tokens, autocast: peaks in GB that an H100 allocated
    (docs/results/gpu.md), within 5 %."""
    lora = LoraConfig(rank=128, alpha=256)
    model = on_meta(LlavaForConditionalGeneration, models.config()).requires_grad_(False)
    with torch.device("meta"):
        add_lora(model, lora)
        alignment = attach_alignment(model, layers=[16], dims={"vfm": 768}, hidden=2048)
    model.model.multi_modal_projector.requires_grad_(True)
    sizes = sizes_of(model, alignment)
    peaks = {
        (True, 1): 35.72,
        (True, 2): 35.76,
        (True, 4): 36.13,
        (True, 8): 38.86,
        (True, 16): 44.30,
        (False, 1): 52.69,
        (False, 2): 57.89,
        (False, 4): 68.15,
    }
    for (checkpointing, batch), peak in peaks.items():
        recipe = Recipe(
            model=ModelConfig(name="llava", train="lora", lora=lora),
            optim=OptimConfig(batch_size=batch, precision="bfloat16", checkpointing=checkpointing),
            alignment=AlignmentConfig(objective="cosine", layer=(16,)),
        )
        planned = Plan(recipe, sizes, model.config, 64, (576, 576), 701, 0, 0, 0).memory("ddp", 1) / 1e9
        assert planned == pytest.approx(peak, rel=0.05), (checkpointing, batch)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path, Path]:
    """Configurations by hub id, data, and a folder for more."""
    root = tmp_path_factory.mktemp("released")
    return configs(root), write(root / "w", rows(8, 2)), root


ASSEMBLED = ["--model.kind", "assembled", "--model.vision_encoder"]
# 14 s each, so only these two
PAIRS = {  # name of the stages: total of tower, connector and language model; aligned layer and layers
    "llava15_7b": (7_063_427_072, 16, 32),
    "qwen25_7b": (7_935_646_208, 14, 28),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_recipes_of_7b_are_planned_in_their_real_size(name: str, released: tuple[dict[str, Path], Path, Path]) -> None:
    """Both stages, from configurations in place of the hub's; 7,063,427,072 is the published size of LLaVA-1.5-7B."""
    folders, file, root = released
    total, layer, layers = PAIRS[name]
    data = [
        "--data.train",
        f"llava_json:{file}",
        "--data.val",
        f"llava_json:{file}",
        "--output_dir",
        str(root / "never"),
    ]
    first, baseline, viral = (
        str(ROOT / "trainer" / "recipes" / f"{name}_{stage}.yaml") for stage in ("stage1", "baseline", "viral")
    )
    named = read([first]).model
    assert named.language is not None
    parts = [*ASSEMBLED, str(folders[named.vision_encoder]), "--model.language", str(folders[named.language])]
    found = plan(read([first, *parts, *data]))
    settings, processor = describe_parts(found.recipe.model)
    for part in (settings, processor):
        part.save_pretrained(root / name)  # as the first stage would leave it
    write_sparse(root / name, on_meta(LlavaForConditionalGeneration, settings))
    assert found.sizes.total == total
    assert found.sizes.trained == found.sizes.parts["connector"][0]
    assert (found.image_tokens, found.not_run, read([baseline]).model.name) == (
        (576, 576),
        (),
        str(read([first]).output_dir),
    )
    plans = [plan(read([stage, "--model.name", str(root / name), *data])) for stage in (baseline, viral)]
    assert [p.sizes.parts["head"][0] > 10**7 for p in plans] == [False, True]
    assert not any(p.not_run for p in plans)
    assert f"output of layer {layer} of {layers} with dinov2-base" in plans[1].report()
    assert plans[1].sizes.parts["language"] == (
        found.sizes.parts["language"][0],
        0,
    )
    # by its parts, while there is no first stage yet
    before = plan(read([viral, "--model.name", "None", *parts, *data]))
    assert (before.sizes, before.sequence, before.checkpoint) == (
        plans[1].sizes,
        plans[1].sequence,
        plans[1].checkpoint,
    )
    counts = (1, 2, 4, 8, 16, 32, 64)
    assert [{own.recipe.optim.images(count) for count in counts} for own in (plans[1], found)] == [{128}, {256}]
    own, other = (as_mapping(read([stage])) for stage in (baseline, viral))
    assert {key for key in own if own[key] != other[key]} == {"alignment", "output_dir"}
    assert own["alignment"] == as_mapping(AlignmentConfig())
    assert not (root / "never").exists()


@pytest.mark.slow
def test_every_recipe_is_read() -> None:
    files = sorted((ROOT / "trainer" / "recipes").glob("*.yaml"))
    folders = [read([str(file)]).output_dir for file in files]
    assert len(files) > 20
    assert len(set(folders)) == len(folders)


@pytest.mark.slow
def test_what_a_released_model_lacks_is_one_sentence(
    tmp_path: Path, released: tuple[dict[str, Path], Path, Path]
) -> None:
    folders, file, _ = released
    model = build("llava", tmp_path / "llava")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model / "config.json", bare)
    clip, text = folders["openai/clip-vit-large-patch14-336"], write(tmp_path / "text", rows(0, 3))
    for given, data, more, message in (
        (
            ["--model.name", "no/such-model"],
            file,
            [],
            "model 'no/such-model' is neither a folder nor a hub id within reach",
        ),
        (["--model.name", str(bare)], file, [], "has no tokenizer: expected tokenizer.json"),
        (
            [*ASSEMBLED, "no/clip", "--model.language", "no/vicuna"],
            file,
            [],
            "model.vision_encoder: model 'no/clip' is neither a folder nor a hub id within reach",
        ),
        (
            [*ASSEMBLED, str(clip), "--model.language", "no/vicuna"],
            file,
            [],
            "model.language: model 'no/vicuna' is neither a folder nor a hub id",
        ),
        (
            [*ASSEMBLED, str(clip), "--model.language", str(clip)],
            file,
            [],
            "a clip_vision_model: expected a causal language model",
        ),
        (["--model.name", str(model)], file, ["--alignment.layer", "9"], "alignment.layer is 9: expected 1 to 4"),
        (
            ["--model.name", str(model)],
            file,
            ["--model.train", "lora", "--model.lora.targets", "q_prj"],
            "did you mean 'q_proj'",
        ),
        (["--model.name", str(model)], tmp_path / "none.json", [], "none.json"),
        (
            ["--model.name", str(model)],
            text,
            [],
            "none of the 3 conversations .* has an image: expected some, or alignment.objective none",
        ),
        (
            ["--model.name", str(model)],
            text,
            ["--alignment.objective", "none"],
            "none of the conversations .* has an image: expected some to plan by",
        ),
    ):
        with pytest.raises(WorkbenchError, match=message) as error:
            plan(read(words(tmp_path, given, data, *more)))
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_plan_of_a_released_model_is_printed_before_a_disk_is_found_too_small(
    tmp_path: Path, released: tuple[dict[str, Path], Path, Path]
) -> None:
    """LLaVA-1.5-7B in the checkpoints of a hundred thousand steps."""
    folders, file, _ = released
    parts = [
        *ASSEMBLED,
        str(folders["openai/clip-vit-large-patch14-336"]),
        "--model.language",
        str(folders["lmsys/vicuna-7b-v1.5"]),
    ]
    more = ["--keep_checkpoints", "None", "--optim.steps", "100000", "--dry_run"]
    done = run("trainer", *words(tmp_path, parts, file, *more), code=2)
    assert "6,738,939,904" in done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("error: checkpoints and result, frozen features need about")
    assert not (tmp_path / "never").exists()
