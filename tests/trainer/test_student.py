"""Any family as the student: both losses equal independent ones, the right parts move, runs resume bitwise, folders are
plain, bad input is one sentence."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, TrainerState, TrainingArguments

from tests.conftest import launch
from tests.students import FLAGS, VIRAL, Bomb, noise_image, pickled, rows, world, write
from tests.tiny import VISION, _text, _tokenizer, build, randomize
from trainer.__main__ import main
from trainer.__main__ import read as read_recipe
from trainer.dry_run.plan import plan
from trainer.loop import AlignmentTrainer
from trainer.monitor.cknna import build_cknna_monitor
from trainer.monitor.warnings import EarlyWarnings
from trainer.recipe import Recipe
from trainer.run import train
from trainer.setups.conversation import ConversationSetup
from trainer.setups.conversation_splits import load_conversations
from workbench import cknna
from workbench.capture.hidden_states import read
from workbench.cli import parse
from workbench.errors import DataError, RunError, WorkbenchError
from workbench.hashing import fingerprint
from workbench.mllm import MLLM
from workbench.spatial.vfm_patches import patches_under
from workbench.training_folder import checkpoints
from workbench.vfm import load_vfm


def recipe_of(flags: list[str], **alignment: Any) -> Recipe:
    recipe = parse(Recipe, flags, prog="trainer")
    return replace(recipe, alignment=replace(recipe.alignment, **alignment))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a small LLaVA on a small world."""
    return world(tmp_path_factory.mktemp("llava"))[1]


# two-way images, tiles, no template, merged patches, a text model with another path
FAMILIES = ["gemma3", "llava_next", "paligemma", "qwen3_vl", "smolvlm"]


# that heads attach to every family is in test_alignment.py, their labels in test_conversations.py
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_train_and_their_losses_are_those_of_transformers_and_of_the_formula(
    name: str, tmp_path: Path
) -> None:
    model = build(name, tmp_path / name)
    file = write(tmp_path / "w", rows(4, 0) if name != "paligemma" else rows(3, 0)[1:])
    flags = [
        "--model.name",
        str(model),
        "--data.train",
        f"llava_json:{file}",
        "--data.val",
        f"llava_json:{file}",
        *VIRAL,
    ]
    ready = ConversationSetup.from_recipe(recipe_of([*flags, "--data.features", "compute"]))
    numbers = list(range(len(ready.train)))
    batch = ready.collate(numbers)
    wrapped = ready.model.train()
    plain = MLLM.load(str(model), dtype="float32", validate=False)
    before = {n: p.clone() for n, p in wrapped.named_parameters()}
    output = wrapped(**batch)

    inputs = {key: value for key, value in batch.items() if key not in ("labels", "visual", "targets", "aligned")}
    plain.model.train()
    torch.testing.assert_close(output.lm_loss, plain.model(**inputs, labels=batch["labels"]).loss, atol=1e-5, rtol=1e-5)

    head = ready.model.alignment.heads[0].double()
    vfm, cosines = load_vfm("efficientnet-lite0"), []
    states = plain.model(**inputs, output_hidden_states=True).hidden_states[2]
    for row, number in enumerate(numbers):
        images = ready.train.conversations[number].images
        for part in batch["visual"][row]:
            (target,) = patches_under(vfm, [images[part.image]], [[part]])[0]
            cosines.append(
                torch.nn.functional.cosine_similarity(
                    head(states[row, part.index].double()), target.double().clone(), dim=-1
                )
            )
    assert output.alignment_loss.item() == pytest.approx(-torch.cat(cosines).mean().item(), abs=2e-4)
    head.float()

    optimizer = torch.optim.SGD([p for group in ready.parameter_groups() for p in group["params"]], lr=1e-2)
    (output.lm_loss + 0.5 * output.alignment_loss).backward()
    optimizer.step()
    moved = {n for n, p in wrapped.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in before if n.startswith("alignment.")} <= moved
    parts = {
        part: {f"base.{n}" for n, own in ready.trained.items() if own == part} & moved
        for part in ("connector", "language")
    }
    assert all(parts.values())
    assert not {n for n in moved if n.startswith("base.")} - set.union(*parts.values())
    tower = {id(p) for p in plain.model.get_encoder(modality="image").parameters()} - {
        id(p) for p in plain.projector.parameters()
    }
    assert not {f"base.{n}" for n, p in plain.model.named_parameters() if id(p) in tower} & moved
    ready.check_frozen(wrapped.base.state_dict())  # the VFM and the tower hold their values
    with torch.no_grad():
        next(p for p in wrapped.base.parameters() if not p.requires_grad).add_(1)
    with pytest.raises(WorkbenchError, match="a frozen part of the model changed"):
        ready.check_frozen(wrapped.base.state_dict())


def trainer_of(ready: ConversationSetup, recipe: Recipe, folder: Path) -> AlignmentTrainer:
    arguments = TrainingArguments(
        str(folder), max_steps=1, report_to=[], remove_unused_columns=False, use_cpu=True, label_names=["labels"]
    )
    return AlignmentTrainer(recipe=replace(recipe, output_dir=folder), setup=ready, watched=(None, []), args=arguments)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["cosine", "relation"])
def test_accumulated_parts_give_the_gradient_of_the_whole_batch(tmp_path: Path, objective: str) -> None:
    """With tiles of different numbers and texts alone among them: 1 x 8 equals 8 x 1."""
    recipe = recipe_of([*world(tmp_path, "llava_next")[1], *VIRAL], objective=objective)
    ready = ConversationSetup.from_recipe(recipe)
    trainer = trainer_of(ready, recipe, tmp_path)
    numbers, found = [0, 1, 2, 3, 4, 8, 5, 9], []
    for parts in ([numbers], [[n] for n in numbers]):
        ready.model.train().zero_grad()
        batches, items = trainer.get_batch_samples(
            iter([ready.collate(part) for part in parts]), len(parts), torch.device("cpu")
        )
        for batch in batches:
            trainer.compute_loss(ready.model, batch, num_items_in_batch=items).backward()
        found.append({n: p.grad.clone() for n, p in ready.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=1e-4)


def test_text_alone_has_a_language_loss_and_no_alignment_loss(llava: list[str]) -> None:
    ready = ConversationSetup.from_recipe(recipe_of([*llava, *VIRAL]))
    output = ready.model.train()(**ready.collate([8, 9]))
    assert output.alignment_loss is None
    assert output.lm_loss > 0
    output.lm_loss.backward()
    assert all(not p.grad.any() for p in ready.model.alignment.parameters())
    assert any(p.grad is not None and p.grad.any() for p in ready.mllm.decoder.parameters())


@pytest.mark.slow
def test_cached_targets_are_the_computed_ones_tile_by_tile(tmp_path: Path) -> None:
    flags = [*world(tmp_path, "llava_next")[1], *VIRAL]
    cached, computed = (
        ConversationSetup.from_recipe(recipe_of([*flags, "--data.features", mode])).collate([3, 0, 8])["targets"]
        for mode in ("cache", "compute")
    )
    for a, b in zip(cached["efficientnet-lite0"], computed["efficientnet-lite0"], strict=True):
        assert [tuple(t.shape) for t in a] == [tuple(t.shape) for t in b]
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert [len(own) for own in cached["efficientnet-lite0"]] == [4, 2, 0]
    centred = ConversationSetup.from_recipe(recipe_of([*flags, "--data.limit_train", "10"], center=True))
    every = [tile for own in centred.collate(list(range(10)))["targets"]["efficientnet-lite0"] for tile in own]
    assert torch.cat(every).mean(0).abs().max() < 1e-4


@pytest.mark.slow
def test_the_control_takes_another_picture_wherever_else_it_occurs(tmp_path: Path) -> None:
    """Three conversations are about one image, and an image has several tiles."""
    model = build("smolvlm", tmp_path / "smolvlm")
    given = [row | {"image": "coco/0.png"} if row["id"] in (1, 2) else row for row in rows(8, 2)]
    flags = ["--model.name", str(model), "--data.train", f"llava_json:{write(tmp_path / 'w', given)}", *FLAGS, *VIRAL]
    flags += ["--data.val", f"llava_json:{tmp_path / 'w' / 'mix.json'}"]

    def tiles(seed: int, images: str) -> list[tuple[tuple[int, int], torch.Tensor]]:
        """Every tile's target, with its conversation and image."""
        batch = ConversationSetup.from_recipe(replace(recipe_of(flags, images=images), seed=seed)).collate(
            list(range(10))
        )
        own = zip(batch["visual"], batch["targets"]["efficientnet-lite0"], strict=True)
        return [
            ((row, part.image), target)
            for row, (parts, targets) in enumerate(own)
            for part, target in zip(parts, targets, strict=True)
        ]

    true = tiles(0, "same")
    assert len(true) > len({whose for whose, _ in true}) > 8
    for seed in range(4):
        for whose, given in tiles(seed, "others"):
            sources = {source for source, target in true if torch.equal(target, given)}
            assert sources
            assert whose not in sources


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl"])
def test_own_targets_are_what_the_connector_receives_and_gives(name: str, tmp_path: Path) -> None:
    flags = [*world(tmp_path, name)[1], *VIRAL]
    for target in ("encoder", "projector"):
        ready = ConversationSetup.from_recipe(recipe_of(flags, target=target))
        ready.model.train()
        seen: list[Any] = []
        plain = ready.model.alignment.losses
        ready.model.alignment.losses = lambda targets, visual, hidden, plain=plain, seen=seen: (  # type: ignore[misc]
            seen.append(targets) or plain(targets, visual, hidden)
        )
        ready.model(**ready.collate([0, 8, 3]))
        for row, own in zip((0, 3), seen[0][target], strict=True):
            conversation = ready.train.conversations[row]
            (known,) = read(
                ready.mllm,
                ready.mllm.encode([conversation.images], [conversation.turns[0][0]]),
                layers=[0],
                encoder=True,
            )
            expected = known.encoder_features if target == "encoder" else known.values[0]
            torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)
            assert not own.requires_grad


def folder_of(flags: list[str], folder: Path) -> Path:
    train(parse(Recipe, [*flags, "--output_dir", str(folder)], prog="trainer"), [])
    return folder


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}/{k}": v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.slow
def test_a_run_that_met_a_broken_picture_goes_on_once_it_is_replaced(tmp_path: Path) -> None:
    """A picture of the fourth or fifth step ends where it should not (a batch is read one step ahead); another run has
    no such trouble."""
    val = write(tmp_path / "val", rows(2, 0))  # all images of which are looked at before
    flags = [
        *world(tmp_path)[1],
        *VIRAL,
        "--data.features",
        "compute",
        "--monitor.cknna_images",
        "0",
        "--eval_every",
        "6",
        "--optim.steps",
        "6",
    ]
    flags += ["--data.val", f"llava_json:{val}"]
    ready = ConversationSetup.from_recipe(recipe_of(flags))
    order = list(ready.sampler(1))
    # the first few are seen before training
    number = next(n for n in order[6:10] if n > 3 and n not in order[:6] and ready.train.conversations[n].loads)
    file = tmp_path / "world" / "coco" / f"{number}.png"
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=rf"{number}.png cannot be read"):
        folder_of(flags, tmp_path / "out")
    assert [c.step for c in checkpoints(tmp_path / "out")] == [2]
    file.write_bytes(good)
    with pytest.raises(
        RunError, match=r"the data fingerprint .* \(if a file of the data was repaired, add --repaired\)"
    ):
        folder_of([*flags, "--resume"], tmp_path / "out")
    folder_of([*flags, "--resume", "--repaired"], tmp_path / "out")
    first, second = whole(folder_of(flags, tmp_path / "untroubled")), whole(tmp_path / "out")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    (said,) = json.loads((tmp_path / "out" / "training.json").read_text())["warnings"]
    assert said.startswith("step 2: resumed at step 2 with repaired data: ")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["all", "lora"])
def test_a_run_that_was_cut_off_goes_on_bitwise(mode: str, llava: list[str], tmp_path: Path) -> None:
    """Over the end of an epoch, with accumulation, dropout in LoRA, and the order of the data from the seed."""
    more = [
        "--optim.steps",
        "6",
        "--optim.accumulation",
        "2",
        "--model.train",
        mode,
        "--keep_checkpoints",
        "None",
        "--seed",
        "1",
    ]
    flags = [
        *llava,
        *VIRAL,
        *more,
        *(["--model.lora.rank", "2", "--model.lora.dropout", "0.3"] if mode == "lora" else []),
    ]
    done = folder_of(flags, tmp_path / "whole")
    assert [c.step for c in checkpoints(done)] == [2, 4, 6]
    cut = tmp_path / "cut"  # what a run leaves that is killed after its first checkpoint
    cut.mkdir()
    shutil.copytree(done / "checkpoint-2", cut / "checkpoint-2")
    shutil.copy(done / "recipe.yaml", cut)
    folder_of([*flags, "--resume"], cut)
    first, second = whole(done), whole(cut)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    logs = [
        pd.read_parquet(folder / "training.parquet")[["step", "lm_loss", "alignment_loss", "grad_norm"]].dropna(
            subset="lm_loss"
        )
        for folder in (done, cut)
    ]
    pd.testing.assert_frame_equal(logs[0].reset_index(drop=True), logs[1].reset_index(drop=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("llava", "connector"), ("qwen2_5_vl", "lora")])
def test_the_folder_is_plain_and_what_is_trained_is_recorded(name: str, mode: str, tmp_path: Path) -> None:
    model, flags = world(tmp_path, name)
    out = folder_of(
        [*flags, *VIRAL, "--model.train", mode, "--model.lora.rank", "2", "--optim.steps", "2"], tmp_path / "out"
    )
    old, new = MLLM.load(str(model), validate=False), MLLM.load(str(out), validate=False)
    assert AutoModelForImageTextToText.from_pretrained(out).config.architectures == old.config.architectures
    trained = json.loads((out / "training.json").read_text())["trained"]
    assert [bool(trained[part]) for part in ("tower", "connector", "language", "lora", "head")] == [
        False,
        True,
        mode == "all",
        mode == "lora",
        True,
    ]
    before, after = old.model.state_dict(), new.model.state_dict()
    assert before.keys() == after.keys()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    decoder = next(n for n, part in old.model.named_modules() if part is old.decoder)
    assert any(n.startswith(decoder) for n in moved) == (mode != "connector")
    assert any(not n.startswith(decoder) for n in moved)
    head = load_file(out / "alignment_head.safetensors")
    torch.manual_seed(0)
    assert set(head) == {f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    loss = pd.read_parquet(out / "accuracy.parquet").iloc[0]
    assert loss["low"] <= loss["lm_loss"] <= loss["high"]
    assert loss["n"] > loss["n_conversations"] == 10
    assert loss["chance"] > 3
    evaluation = pd.read_parquet(out / "evaluation.parquet")
    assert (evaluation["lm_loss"] * evaluation["tokens"]).sum() / evaluation["tokens"].sum() == pytest.approx(
        loss["lm_loss"]
    )


@pytest.mark.slow
def test_variants_bfloat16_and_checkpointing_train(llava: list[str], tmp_path: Path) -> None:
    variants = [
        ["--alignment.objective", "relation", "--alignment.heads", "none"],
        [
            "--alignment.layer",
            "1",
            "3",
            "--alignment.where",
            "attention",
            "--alignment.vfm",
            "efficientnet-lite0",
            "dinov2-small",
        ],
        [
            "--optim.precision",
            "bfloat16",
            "--optim.checkpointing",
            "--optim.connector_rate",
            "1e-4",
            "--alignment.schedule",
            "cosine",
        ],
        ["--alignment.objective", "none", "--alignment.residual", "encoder"],
    ]
    for number, variant in enumerate(variants):
        out = folder_of([*llava, *VIRAL, *variant, "--optim.steps", "2"], tmp_path / str(number))
        log = pd.read_parquet(out / "training.parquet")
        assert log["lm_loss"].dropna().between(1, 20).all()
        assert ("alignment_loss" in log) == ("none" not in variant[:2])
    assert MLLM.load(str(tmp_path / "3"), validate=False).residual is not None
    sides = [c for c in pd.read_parquet(tmp_path / "1" / "training.parquet") if c.startswith("alignment_loss/")]
    # by name, also after a resume
    assert sides == [
        f"alignment_loss/layer_{n}/{vfm}" for n in (1, 3) for vfm in ("dinov2-small", "efficientnet-lite0")
    ]


def test_questions_with_options_are_answered_as_in_the_analyses(llava: list[str], tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    lines = []
    for n in range(5):
        noise_image(n).save(tmp_path / f"{n}.png")
        lines.append(
            json.dumps(
                {
                    "image": f"{n}.png",
                    "question": "what is this ?",
                    "answer": "cat" if n % 2 else "dog",
                    "options": ["cat", "dog"],
                }
            )
        )
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    ready = ConversationSetup.from_recipe(recipe_of([*llava, "--data.val", f"hf:{tmp_path / 'q.jsonl'}"]))
    table, mllm = ready.evaluate().table, ready.mllm
    right = []
    for n in range(5):
        with torch.inference_mode():
            logits = mllm.model(**mllm.encode([noise_image(n)], ["what is this ?"]).inputs).logits[0, -1]
        scores = logits[mllm.processor.tokenizer.convert_tokens_to_ids(["cat", "dog"])]
        right.append(int(scores.argmax()) == (n + 1) % 2)
    assert table["correct"].tolist() == right
    assert set(table["chance"]) == {0.5}
    assert table["category"].unique().tolist() == ["question"]
    assert not ready.warnings(1)


def test_questions_without_options_are_counted(llava: list[str], tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = [{"image": f"{n}.png", "question": "what is this ?", "answer": "cat"} for n in range(5)]
    for n, row in enumerate(rows):
        noise_image(n).save(tmp_path / row["image"])
    lines = [json.dumps(row | ({"options": ["cat", "dog"]} if n < 3 else {})) for n, row in enumerate(rows)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    val = f"hf:{tmp_path / 'q.jsonl'}"
    ready = ConversationSetup.from_recipe(recipe_of([*llava, "--data.val", val]))
    assert len(ready.evaluate().table) == 3
    assert [sentence for sentence in ready.warnings(1) if "options" in sentence] == [
        f"{val}: 2 of 5 questions are not evaluated, since only those about one image that have options are"
    ]


def test_questions_with_options_are_not_cut(llava: list[str], tmp_path: Path) -> None:
    """They are asked without max_length, so that nothing is said of it."""
    pytest.importorskip("datasets")
    noise_image(0).save(tmp_path / "0.png")
    asked = {"image": "0.png", "question": "what is this ? " * 20, "answer": "cat", "options": ["cat", "dog"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(asked) + "\n" + json.dumps(asked))
    words = [*llava, "--data.val", f"hf:{tmp_path / 'q.jsonl'}", "--data.max_length", "50"]
    ready = ConversationSetup.from_recipe(recipe_of(words))
    assert len(ready.evaluate().table) == 2
    assert not [sentence for sentence in ready.warnings(1) if "q.jsonl" in sentence]


# --- an assembled LLaVA ---------------------------------------------------------------------------


ASSEMBLED = ["--model.kind", "assembled", "--model.vision_encoder"]


def parts(root: Path, tower: str) -> tuple[Path, Path]:
    """Folders as the hub has them: a whole CLIP, or a SigLIP tower; a Llama without a chat template, or a Qwen2 with
    one."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    if tower == "clip":
        text = tf.CLIPTextConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=30
        )
        vision = tf.CLIPVisionConfig(**VISION, image_size=56, patch_size=14)
        clip = tf.CLIPModel(tf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
        randomize(clip).save_pretrained(root / "tower")
        tf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(
            root / "tower"
        )
        language = tf.LlamaForCausalLM(_text(tf.LlamaConfig, tokenizer))
    else:
        randomize(tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION, image_size=56, patch_size=14))).save_pretrained(
            root / "tower"
        )
        tf.SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(root / "tower")
        language = tf.Qwen2ForCausalLM(_text(tf.Qwen2Config, tokenizer, tie_word_embeddings=True))
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <eos>\n{% endfor %}{% if add_generation_prompt"
            " %}assistant :{% endif %}"
        )
    randomize(language).save_pretrained(root / "language")
    tokenizer.save_pretrained(root / "language")
    return root / "tower", root / "language"


@pytest.mark.slow
def test_pickled_parts_are_planned_trained_and_saved_as_safetensors_are(tmp_path: Path) -> None:
    """Vicuna's settings of generation included, which transformers would refuse to save after the last step."""
    file = write(tmp_path / "w")
    data = [
        "--data.train",
        f"llava_json:{file}",
        "--data.val",
        f"llava_json:{file}",
        *FLAGS,
        "--optim.steps",
        "2",
        "--save_every",
        "2",
    ]
    results = []
    for kind in ("safetensors", "pickles"):
        tower, language = parts(tmp_path / kind, "clip")
        (language / "generation_config.json").write_text(
            json.dumps({"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6})
        )
        if kind == "pickles":
            pickled(tower)
            pickled(language, 2)
        words = [*ASSEMBLED, str(tower), "--model.language", str(language), "--model.train", "connector", *data]
        (tmp_path / "empty.yaml").write_text("{}")
        found = plan(read_recipe([str(tmp_path / "empty.yaml"), *words, "--output_dir", str(tmp_path / "never")]))
        assert {part: (len(own.files), own.pickled) for part, own in found.weights.items() if own} == (
            {"vision_encoder": (1, True), "language": (2, True)}
            if kind == "pickles"
            else {"vision_encoder": (1, False), "language": (1, False)}
        )
        assert ("language: 2 files" in found.report() and "pickled (read without running code)" in found.report()) == (
            kind == "pickles"
        )
        folder = folder_of(words, tmp_path / f"out-{kind}")
        results.append(whole(folder))
        assert "temperature" not in json.loads((folder / "generation_config.json").read_text())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.slow
def test_parts_that_run_code_or_lack_a_tensor_are_refused_by_training_and_by_the_dry_run(tmp_path: Path) -> None:
    file = write(tmp_path / "w")
    (tmp_path / "empty.yaml").write_text("log_every: 1\nsave_every: 2\n")
    for part in ("vision_encoder", "language"):
        for fault, message in (
            ("bomb", "was refused: it holds more than plain tensors"),
            ("lacking", "the checkpoint lacks 1 tensors"),
            ("gone", "is missing"),
        ):
            places = dict(zip(("vision_encoder", "language"), parts(tmp_path / f"{part}-{fault}", "clip"), strict=True))
            own = places[part]
            pickled(own, 1 + (part == "language"))
            weights = next(own.glob("pytorch_model*.bin"))
            tensors = torch.load(weights)
            if fault == "gone":
                weights.rename(own / "moved.bin")
                message = "is missing" if part == "language" else "no weights that are read, only moved.bin"
            else:
                name = next(
                    name
                    for name in tensors
                    if "text_model" not in name and name.endswith("proj.weight") and "visual" not in name
                )
                del tensors[name]
                torch.save(tensors | ({"a": Bomb(tmp_path / "mark")} if fault == "bomb" else {}), weights)
                if fault == "lacking" and part == "language":
                    index = own / "pytorch_model.bin.index.json"
                    index.write_text(
                        json.dumps(
                            {
                                "weight_map": {
                                    k: v for k, v in json.loads(index.read_text())["weight_map"].items() if k != name
                                }
                            }
                        )
                    )
            words = [
                str(tmp_path / "empty.yaml"),
                *ASSEMBLED,
                str(places["vision_encoder"]),
                "--model.language",
                str(places["language"]),
            ]
            words += [
                "--data.train",
                f"llava_json:{file}",
                "--data.val",
                f"llava_json:{file}",
                *FLAGS,
                "--output_dir",
                str(tmp_path / "out"),
            ]
            for more in ([], ["--dry_run"]):
                with pytest.raises(WorkbenchError, match=rf"^model\.{part}: .*{message}") as error:
                    main([*words, *more])
                assert "\n" not in str(error.value)
                assert not (tmp_path / "out").exists()
                assert not (tmp_path / "mark").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_first_stage_from_released_parts_and_a_second_one_after_it(kind: str, tmp_path: Path) -> None:
    tower, language = parts(tmp_path / kind, kind)
    file = write(tmp_path / "w")
    data = [
        "--data.train",
        f"llava_json:{file}",
        "--data.val",
        f"llava_json:{file}",
        *FLAGS,
        "--optim.steps",
        "2",
        "--save_every",
        "2",
    ]
    first = folder_of(
        [*ASSEMBLED, str(tower), "--model.language", str(language), "--model.train", "connector", *data],
        tmp_path / "stage1",
    )
    mllm = MLLM.load(str(first))  # with the causal check of its visual tokens
    old = tf.AutoModelForCausalLM.from_pretrained(language)
    kept = {n: v for n, v in old.base_model.state_dict().items() if "embed" not in n}
    assert fingerprint(kept) == fingerprint({n: v for n, v in mllm.decoder.state_dict().items() if "embed" not in n})
    rows_of = mllm.model.get_input_embeddings().weight
    count = old.config.vocab_size
    assert torch.equal(rows_of[:count], old.get_input_embeddings().weight)
    torch.testing.assert_close(rows_of[count:], rows_of[:count].mean(0).expand(len(rows_of) - count, -1))
    own = (tf.CLIPVisionModel if kind == "clip" else tf.SiglipVisionModel).from_pretrained(tower)
    assert fingerprint(own.state_dict()) == fingerprint(mllm.model.get_encoder(modality="image").state_dict())
    second = folder_of(["--model.name", str(first), "--model.train", "lora", *data, *VIRAL], tmp_path / "stage2")
    assert MLLM.load(str(second)).family.name == "llava"
    assert ("ASSISTANT:" in mllm.prompt("what ?")) == (kind == "clip")


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_recipe_pair_runs_from_the_command_line(tmp_path: Path) -> None:
    model, flags = world(tmp_path)
    pairs = dict(zip(flags[::2], flags[1::2], strict=True))
    base = tmp_path / "baseline.yaml"
    base.write_text(
        f"model:\n  name: {model}\ndata:\n  train: [{pairs['--data.train']}, {pairs['--data.train']}]\n  weights: [1,"
        f" 0.5]\n  val: {pairs['--data.val']}\nlog_every: 1\neval_every: 2\nsave_every: 2\noptim:\n  steps: 2\n "
        " warmup: 1\n  batch_size: 2\n"
    )
    viral = tmp_path / "viral.yaml"
    viral.write_text("base: baseline.yaml\nalignment:\n  objective: cosine\n  layer: 2\n  hidden: 8\n")
    done = launch("--num_processes", "2", "-m", "trainer", str(viral), "--output_dir", str(tmp_path / "two"))
    assert "lm_loss" in done.stdout
    assert "step 2/2" in done.stderr
    main([str(viral), "--output_dir", str(tmp_path / "viral"), "--optim.batch_size", "4"])
    two, one = whole(tmp_path / "two"), whole(tmp_path / "viral")
    assert two.keys() == one.keys()
    for name, value in one.items():  # two processes are one with the same global batch
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0)
    first, second = (pd.read_parquet(tmp_path / folder / "evaluation.parquet") for folder in ("two", "viral"))
    pd.testing.assert_frame_equal(first, second, atol=1e-4)
    record = json.loads((tmp_path / "two" / "training.json").read_text())
    assert (record["processes"], record["global_batch"]) == (2, 4)
    # of which a step has none
    assert [w.split(" are ")[0] for w in record["warnings"]] == ["step 0: the 3 conversations without an image"]
    main([str(base), "--output_dir", str(tmp_path / "baseline")])
    assert not (tmp_path / "baseline" / "alignment_head.safetensors").exists()
    assert (tmp_path / "viral" / "alignment_head.safetensors").exists()


@pytest.mark.slow
def test_bad_input_is_one_sentence_and_writes_nothing(llava: list[str], tmp_path: Path) -> None:
    tower, language = parts(tmp_path / "clip", "clip")
    empty = tmp_path / "empty.yaml"
    empty.write_text("log_every: 1\nsave_every: 2\n")
    # with an image of 18 tokens before the answer
    model, short = llava[1], f"llava_json:{write(tmp_path / 'short', rows(3, 0))}"
    cases = [
        ([*llava, *VIRAL, "--alignment.layer", "9"], "alignment.layer is 9: expected 1 to 4"),
        ([*llava, *VIRAL, "--alignment.vfm", "hf:no/such-vfm"], "hf:no/such-vfm"),
        ([*llava, "--model.train", "lora", "--model.lora.targets", "q_prj"], "did you mean 'q_proj'"),
        ([*llava, "--model.layers", "3"], "model.layers is 3, but model.name"),
        (
            [*llava, "--model.vision_encoder", "openai/clip"],
            "model.vision_encoder is openai/clip, but model.name",
        ),
        (
            [*llava, "--start", "runs/baseline"],
            "start is runs/baseline, but a model of kind pretrained does not use it",
        ),
        (["--model.name", str(language), *llava[2:]], "unknown model architecture 'LlamaForCausalLM'"),
        (["--model.name", str(tmp_path / "none"), *llava[2:]], "neither a folder nor a hub id"),
        ([*ASSEMBLED, f"{model}/x", *llava[2:]], "model.language None: expected hub ids or folders of both"),
        (["--model.vision_encoder", f"{model}/x", *llava[2:]], f"unknown weights '{model}/x'"),
        (
            [*ASSEMBLED, str(tower), "--model.language", model, *llava[2:]],
            f"model.language is {model}, a llava: expected a causal language model",
        ),
        (
            [*ASSEMBLED, model, "--model.language", str(language), *llava[2:]],
            "a llava: expected a CLIP or SigLIP vision encoder",
        ),
        ([*llava, "--data.weights", "1", "2"], "data.weights is 1.0, 2.0: expected 1 numbers above 0"),
        ([*llava, "--data.questions", "1"], "data.questions is 1, which cannot be used for"),
        (
            [*llava, "--data.train", short, "--data.val", short, "--data.max_length", "20"],
            "which leaves none of the answers in the first",
        ),
        (
            ["--data.train", llava[3], "--data.val", llava[3]],
            "has conversations with several turns, or with several images or none: expected single questions",
        ),
        ([*llava, "--data.max_length", "12"], "an image reaches beyond max_length, 12 tokens"),
        ([*llava, "--data.train", f"{llava[3]}?images=/nowhere"], "image root '/nowhere' does not exist"),
        (
            [*llava, *VIRAL, "--alignment.center", "--data.features", "compute"],
            "expected alignment.target vfm and data.features cache",
        ),
        (
            [*llava, "--model.train_vision_encoder", "--model.train", "lora"],
            "expected model.train all, since only then the vision encoder can be trained too",
        ),
        (["--data.train", "shapes:train", "shapes:val"], "expected one data set, since a toy LLaVA cannot mix several"),
    ]
    for words, message in cases:
        with pytest.raises(WorkbenchError) as error:
            main([str(empty), *words, "--output_dir", str(tmp_path / "out")])
        assert message in str(error.value) and "\n" not in str(error.value), (words, str(error.value))
        assert not (tmp_path / "out").exists()


def test_a_mark_of_the_model_anywhere_in_the_data_is_found_before_training(tmp_path: Path) -> None:
    """Which JSON files of others may hold as a word; the first few conversations do not."""
    model = build("gemma3", tmp_path / "gemma3")
    given = rows(8, 2)
    given[-1]["conversations"][0]["value"] = "one <start_of_image> two ?"
    data = f"llava_json:{write(tmp_path / 'w', given)}"
    with pytest.raises(
        WorkbenchError,
        match=r"conversation 10:t1 of .*: the question contains '<start_of_image>', this model's image placeholder",
    ):
        folder_of(["--model.name", str(model), "--data.train", data, "--data.val", data, *FLAGS], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what is watched ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_next", "paligemma"])
def test_cknna_of_conversations_is_that_of_the_analyses(name: str, tmp_path: Path) -> None:
    """Over tiles of different sizes, two images in one conversation, and texts alone; against the model and the VFM
    read by themselves, image by image."""
    model = build(name, tmp_path / name)
    file = write(
        tmp_path / "w", rows(4 if name != "paligemma" else 3, 2 * (name != "paligemma"))[name == "paligemma" :]
    )
    recipe = recipe_of(
        [
            "--model.name",
            str(model),
            "--data.train",
            f"llava_json:{file}",
            "--data.val",
            f"llava_json:{file}",
            *VIRAL,
            "--monitor.k",
            "2",
        ]
    )
    ready = ConversationSetup.from_recipe(recipe)
    subset, said = build_cknna_monitor(recipe, ready)
    assert subset is not None
    assert said == []
    logs, vfm, expected = subset.measure(), load_vfm("efficientnet-lite0"), []
    for c in (c for c in ready.val.conversations if c.loads):
        batch = ready.mllm.encode([c.images], [c.turns[0][0]])
        (known,), places = read(ready.mllm, batch, layers=[2]), ready.mllm.visual_tokens(batch)[0]
        own = known.values[0].split([len(p.index) for p in places])
        for number, image in enumerate(c.images):
            parts = [p for p in places if p.image == number]
            hidden = [values for p, values in zip(places, own, strict=True) if p.image == number]
            pairs = zip(hidden, patches_under(vfm, [image], [parts])[0], strict=True)
            expected.append(sum(cknna(a, b, k=2) for a, b in pairs) / len(parts))
    assert logs["cknna_images"] == len(expected)
    assert logs["cknna/layer_2/efficientnet-lite0"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    few = replace(recipe, monitor=replace(recipe.monitor, k=10_000))
    assert "visual tokens of an image" in build_cknna_monitor(few, ready)[1][0]


@pytest.mark.slow
def test_a_head_that_stands_still_and_a_loss_that_is_not_finite_are_told_of_conversations(
    llava: list[str], tmp_path: Path
) -> None:
    still = folder_of([*llava, *VIRAL, "--alignment.weight", "0", "--monitor.cknna_images", "0"], tmp_path / "still")
    record = json.loads((still / "training.json").read_text())
    assert len(record["warnings"]) == 1
    assert "the alignment head of layer 2 with efficientnet-lite0 does not move" in record["warnings"][0]
    card = (still / "README.md").read_text()
    assert "loss per answer token" in card
    assert str(tmp_path) not in card
    assert "dinov2-small" not in card
    assert record["model_fingerprint"] in card
    wild = [
        "--optim.learning_rate",
        "1e30",
        "--optim.warmup",
        "0",
        "--optim.max_grad_norm",
        "1e30",
        "--monitor.cknna_images",
        "0",
    ]
    with pytest.raises(WorkbenchError, match="training stopped before a checkpoint could store it"):
        folder_of([*llava, *VIRAL, *wild], tmp_path / "wild")
    (file,) = (tmp_path / "wild").glob("not_finite-step-*.safetensors")
    assert {"input_ids", "labels"} <= load_file(file).keys()


@pytest.mark.slow
def test_steps_without_an_image_are_not_held_against_a_head(tmp_path: Path) -> None:
    """Text alone: no alignment loss is logged, and the head is not warned of before it had its steps, but at the
    end."""
    model, file = build("llava", tmp_path / "m"), write(tmp_path / "w", rows(2, 6))
    recipe = recipe_of(
        ["--model.name", str(model), "--data.train", f"llava_json:{file}", "--data.val", f"llava_json:{file}", *VIRAL]
    )
    ready = ConversationSetup.from_recipe(recipe)
    trainer = trainer_of(ready, recipe, tmp_path)
    trainer.state.global_step = 1
    ready.model.train()
    for numbers, names in (([2, 3], {"lm_loss"}), ([0, 1], {"lm_loss", "alignment_loss"})):
        batches, items = trainer.get_batch_samples(iter([ready.collate(numbers)]), 1, torch.device("cpu"))
        trainer.compute_loss(ready.model, batches[0], num_items_in_batch=items)
        logs: dict[str, float] = {"loss": 0.0}
        trainer.log(logs)
        assert {"lm_loss", "alignment_loss"} & logs.keys() == names
    steps = iter([False, False, True, True])
    early, state = EarlyWarnings(2, [], lambda: next(steps)), TrainerState(max_steps=9)
    early.on_train_begin(None, state, None, model=ready.model)  # type: ignore[arg-type]
    said = []
    for state.global_step in (1, 2, 3, 4):
        early.on_step_end(None, state, None, model=ready.model)  # type: ignore[arg-type]
        said.append(len(state.log_history))
    assert said == [0, 0, 0, 1]


def test_a_model_that_drops_its_pixels_is_refused_at_its_first_batch_with_an_image(tmp_path: Path) -> None:
    model, file = build("llava", tmp_path / "m"), write(tmp_path / "w", rows(2, 6))
    recipe = recipe_of(
        ["--model.name", str(model), "--data.train", f"llava_json:{file}", "--data.val", f"llava_json:{file}"]
    )
    for blind in (False, True):
        ready = ConversationSetup.from_recipe(recipe)
        trainer = trainer_of(ready, recipe, tmp_path)
        if blind:
            ready.model.base.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != "pixel_values"}),
                with_kwargs=True,
            )
        ready.model.train()
        for numbers in ([2, 3], [0, 1]):  # texts alone, then images
            batches, items = trainer.get_batch_samples(iter([ready.collate(numbers)]), 1, torch.device("cpu"))
            with pytest.raises(RunError, match="depend on the images") if blind and 0 in numbers else nullcontext():
                trainer.compute_loss(ready.model, batches[0], num_items_in_batch=items)


def test_launch_files_that_divide_the_weights_want_one_kind_in_a_step(
    llava: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert len(load_conversations(recipe_of(llava)).train) == 10
    with pytest.raises(
        WorkbenchError, match=r"data.group is no with fsdp for conversations with and without images: expected yes"
    ):
        load_conversations(recipe_of([*llava, "--data.no-group"]))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(
        WorkbenchError, match=r"zero3 cannot train on .* with and without images: expected the launch file fsdp"
    ):
        load_conversations(recipe_of(llava))
    seen = f"llava_json:{write(tmp_path / 'seen', rows(4, 0))}"
    assert len(load_conversations(recipe_of([*llava, "--data.train", seen])).train) == 4


@pytest.mark.slow
def test_a_checkpoint_of_another_architecture_is_refused(llava: list[str], tmp_path: Path) -> None:
    done = folder_of([*llava, "--optim.steps", "2"], tmp_path / "out")
    for name in ("training.json", "model.safetensors"):
        (done / name).unlink()
    settings = json.loads((done / "checkpoint-2" / "config.json").read_text())
    written = (done / "checkpoint-2" / "config.json").write_text(
        json.dumps(settings | {"architectures": ["LlavaNextForConditionalGeneration"]})
    )
    sizes = json.loads((done / "checkpoint-2" / "files.json").read_text())
    (done / "checkpoint-2" / "files.json").write_text(json.dumps(sizes | {"config.json": written}))
    with pytest.raises(
        WorkbenchError, match="holds LlavaNextForConditionalGeneration: expected LlavaForConditionalGeneration"
    ):
        folder_of([*llava, "--optim.steps", "2", "--resume"], done)
