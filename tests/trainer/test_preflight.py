"""What cannot be trained on is named with row and file before the first step, and what is cut is counted; later, a run
goes on with the remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import refused
from tests.students import FLAGS, noise_image, rows, write
from tests.tiny import BUILDERS, build
from trainer.preflight import VisualLengths, _lengths, image_sizes, look_through
from trainer.recipe import Recipe
from trainer.run import train
from trainer.setups import conversation_data
from trainer.setups.conversation import ConversationSetup
from trainer.setups.conversation_data import Collator, ConversationSet
from trainer.setups.rows import Rows
from workbench.cli import parse
from workbench.data import load_data
from workbench.data.base import Conversation
from workbench.errors import DataError, RunError, WorkbenchError
from workbench.mllm import MLLM
from workbench.mllm.conversation import IGNORED, encode_conversations
from workbench.training_folder import checkpoints

SIZES = [(60, 60), (90, 60), (60, 90), (300, 200), (61, 333), (640, 480), (20, 100), (1000, 40)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRAL_CACHE", str(tmp_path / "cache"))


def data_of(folder: Path, sizes: list[tuple[int, int]], extra: list[dict[str, Any]] | None = None) -> Path:
    """A JSON with an image of each size, each in one conversation, two together in the last."""
    made: list[dict[str, Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    for n, size in enumerate(sizes):
        noise_image(n, *size).save(folder / f"{n}.png")
        turns = [("human", "<image>\nwhat is this ?"), ("gpt", "a red cat"), ("human", "what color ?"), ("gpt", "red")][
            : 2 + 2 * (n % 2)
        ]
        made.append({"id": n, "image": f"{n}.png", "conversations": [{"from": a, "value": b} for a, b in turns]})
    (folder / "mix.json").write_text(json.dumps(made + (extra or [])))
    return folder / "mix.json"


def said(question: str, answer: str = "a cat", **more: Any) -> dict[str, Any]:
    return {
        "id": "x",
        **more,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_lengths_without_pixels_are_those_of_the_encoded_conversations(name: str, tmp_path: Path) -> None:
    """Of images of many sizes; all of the sequence, up to its last visual token, and up to its first answer."""
    mllm = MLLM.load(str(build(name, tmp_path / "m")), validate=False)
    extra = [said("what is it ?")] if name != "paligemma" else []
    made = json.loads(data_of(tmp_path / "w", SIZES[:7], extra).read_text())
    if name == "paligemma":
        made = [row | {"conversations": row["conversations"][:2]} for row in made]
    (tmp_path / "w" / "mix.json").write_text(json.dumps(made))
    data = ConversationSet(load_data(f"llava_json:{tmp_path / 'w' / 'mix.json'}"))
    sizes, broken = image_sizes(data), list[str]()
    assert {sizes[c.loads[0].place] for c in data.conversations if c.loads} == set(SIZES[:7])
    tokens = VisualLengths(mllm, set(sizes.values()))
    found = list(_lengths(mllm, data.conversations, sizes, tokens, broken, data))
    assert len(found) == len(data.conversations)
    assert not broken
    for own, length in found:
        batch, labels = encode_conversations(mllm, [own.images], [own.turns])
        ids = batch.inputs["input_ids"][0]
        visual = (ids == mllm.config.image_token_id).nonzero().flatten().tolist()
        assert abs(length.whole - len(ids)) <= (name == "paligemma") * 2, own.id
        if name != "paligemma":  # whose answer is a suffix, which the processor adds
            assert length.answer == int((labels[0] != IGNORED).long().argmax())
            assert length.visual == (visual[-1] if visual else -1)


@pytest.mark.parametrize(("name", "adds_up"), [("llava_onevision", False), ("llava_next", True), ("qwen2_vl", True)])
def test_lengths_of_rows_with_several_images_are_those_of_the_encoded_ones(
    name: str, adds_up: bool, tmp_path: Path
) -> None:
    """LLaVA-OneVision cuts an image into tiles only where it is alone."""
    mllm = MLLM.load(str(build(name, tmp_path / "m")), validate=False)
    extra = [said("<image>\n<image>\nwhat is this ?", image=["0.png", "1.png"])]
    data = ConversationSet(load_data(f"llava_json:{data_of(tmp_path / 'w', [(200, 150), (60, 90)], extra)}"))
    sizes = image_sizes(data)
    tokens = VisualLengths(mllm, set(sizes.values()))
    assert tokens.add_up == adds_up
    for conversation, length in _lengths(mllm, data.conversations, sizes, tokens, [], data):
        batch, labels = encode_conversations(mllm, [conversation.images], [conversation.turns])
        ids = batch.inputs["input_ids"][0]
        assert length.whole == len(ids)
        assert length.visual == int((ids == mllm.config.image_token_id).nonzero().max())
        assert length.answer == int((labels[0] != IGNORED).long().argmax())


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "smolvlm", "internvl"])
def test_the_arithmetic_is_used_where_it_agrees_with_the_processor(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mllm = MLLM.load(str(build(name, tmp_path / "m")), validate=False)
    many = {(60 + 7 * n, 60 + (13 * n) % 100) for n in range(30)}
    monkeypatch.setattr("trainer.preflight.SIZES_ASKED", 5)
    few = VisualLengths(mllm, many)
    monkeypatch.setattr("trainer.preflight.SIZES_ASKED", 1000)
    every = VisualLengths(mllm, many)
    assert {size: few[size] for size in many} == {size: every[size] for size in many}
    assert len(set(every._known.values())) > 1


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "paligemma"])
def test_an_image_is_refused_exactly_where_training_would_stop_at_it(name: str, tmp_path: Path) -> None:
    mllm = MLLM.load(str(build(name, tmp_path / "m")), validate=False)
    file = data_of(tmp_path / "w", [(60, 60), (300, 200)])
    made = [row | {"conversations": row["conversations"][:2]} for row in json.loads(file.read_text())]
    file.write_text(json.dumps(made))
    data = ConversationSet(load_data(f"llava_json:{file}"))
    ids = encode_conversations(mllm, [data.conversations[1].images], [data.conversations[1].turns])[0].inputs[
        "input_ids"
    ][0]
    last = int((ids == mllm.config.image_token_id).nonzero().max())
    for max_length in (last - 20, last - 2, last, last + 1, last + 2, len(ids), len(ids) + 1):
        stops, cut, lost = False, 0, 0
        for c in data.conversations:
            try:
                _, labels = encode_conversations(mllm, [c.images], [c.turns], max_length=max_length)
            except WorkbenchError:
                stops = True
                continue
            cut += encode_conversations(mllm, [c.images], [c.turns])[0].inputs["input_ids"].shape[1] > max_length
            lost += not labels.ne(IGNORED).any()
        if stops:
            with pytest.raises(DataError, match=r"conversation \d:\d of llava_json:.*\.png\): an image reaches beyond"):
                look_through(mllm, data, max_length)
            continue
        sentences = look_through(mllm, data, max_length)
        assert [sentence.split(" of ")[0].split()[-1] for sentence in sentences] == [
            str(count) for count in (cut, lost) if count
        ]


@pytest.mark.parametrize(
    ("name", "size", "options", "why"),
    [
        ("qwen2_vl", (14, 14), {"mask": 0.5}, "an image or tile has one visual token"),
        ("llava_onevision", (160, 160), {"encoder": True}, "its tokens mix several encoder features"),
    ],
)
def test_a_row_that_the_alignment_loss_cannot_use_is_named(
    name: str, size: tuple[int, int], options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    mllm = MLLM.load(str(build(name, tmp_path / "m")), validate=False)
    if name == "qwen2_vl":
        mllm.processor.image_processor.size["shortest_edge"] = 1  # no smallest number of tokens
    data = ConversationSet(load_data(f"llava_json:{data_of(tmp_path / 'w', [(60, 60), size])}"))
    collate = Collator(mllm, data, None, **options)
    assert len(collate([0])["labels"]) == 1
    with pytest.raises(DataError, match=rf"conversation 2:1 of llava_json.*{why}.*leave it out \(drop=ROW"):
        collate([0, 1])


def test_a_row_that_is_found_broken_while_training_is_looked_for_on_the_same_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process that loads data, CUDA cannot be used."""
    mllm = MLLM.load(str(build("llava", tmp_path / "m")), validate=False)
    data = ConversationSet(load_data(f"llava_json:{data_of(tmp_path / 'w', [(60, 60), (60, 60)])}"))
    file = sorted((tmp_path / "w").rglob("*.png"))[1]
    file.write_bytes(file.read_bytes()[:60])
    devices = []

    def encode(*given: Any, device: str | None = None, **options: Any) -> Any:
        devices.append(device)
        return encode_conversations(*given, device=device, **options)

    monkeypatch.setattr(conversation_data, "encode_conversations", encode)
    with pytest.raises(DataError, match=r"conversation 2:1 of llava_json"):
        Collator(mllm, data, None)([0, 1])
    assert devices and set(devices) == {"cpu"}


# --- the command line -----------------------------------------------------------------------------


def words(model: Path, file: Path | str, out: Path, *more: object) -> list[str]:
    spec = f"llava_json:{file}"
    given = [
        "--model.name",
        model,
        "--data.train",
        spec,
        "--data.val",
        spec,
        *FLAGS,
        "--monitor.cknna_images",
        0,
        "--output_dir",
        out,
        *more,
    ]
    return [str(word) for word in given]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "row", "make", "more", "message"),
    [
        ("qwen2_vl", said("<image> what ?", image="x.png"), lambda f: noise_image(9, 2270, 10).save(f), (), "x.png): "),
        (
            "qwen2_vl",
            said("<image> what ?", image="x.png"),
            lambda f: noise_image(9, 900, 600).save(f),
            ("--data.max_length", 30),
            "an image reaches beyond max_length, 30 tokens",
        ),
        (
            "llava",
            said("<image> what ?", image="x.png"),
            lambda f: f.write_bytes(b""),
            (),
            "x.png cannot be read (it has 0 bytes)",
        ),
        (
            "llava",
            said("what ?", "a <eos> cat"),
            None,
            (),
            "the answer contains '<eos>', a control token of this model",
        ),
        ("llava", said("what ? <video> <pad> ?"), None, (), "the question contains '<pad>'"),
        ("paligemma", said("what ?"), None, (), "its processor cannot take a prompt without an image here"),
    ],
)
def test_a_late_row_that_cannot_be_used_is_named_before_anything_is_written(
    family: str, row: dict[str, Any], make: Any, more: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    """The last of many, in training and in validation, dry run or not."""
    model = build(family, tmp_path / family)
    good = data_of(tmp_path / "good", [(60, 60)] * 12)
    made = [one | {"conversations": one["conversations"][:2]} for one in json.loads(good.read_text())]
    good.write_text(json.dumps(made))
    bad = tmp_path / "good" / "bad.json"
    bad.write_text(json.dumps([*made, row]))
    if make is not None:
        make(tmp_path / "good" / "x.png")
    empty = tmp_path / "empty.yaml"
    empty.write_text("log_every: 1\n")
    for train_on, validate_on, dry in ((bad, good, ()), (good, bad, ("--dry_run",))):
        given = words(model, train_on, tmp_path / "out", "--data.val", f"llava_json:{validate_on}", *more, *dry)
        line = refused("trainer", str(empty), *given)
        assert message in line and len(line) < 500 and not (tmp_path / "out").exists(), line
        assert "x.png" in line if make is not None and not more else "13:x" in line, line


def test_what_is_remembered_of_a_copy_has_the_name_of_the_copy(tmp_path: Path) -> None:
    mllm = MLLM.load(str(build("llava", tmp_path / "m")), validate=False)
    for name in ("old", "new"):
        file = data_of(tmp_path / name, [(60, 60)])
        (sentence,) = look_through(mllm, ConversationSet(load_data(f"llava_json:{file}")), 25)
        assert f"llava_json:{file}" in sentence
    assert len(list((tmp_path / "cache" / "looked_through").iterdir())) == 1


def test_what_was_looked_through_is_remembered_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = MLLM.load(str(build("llava", tmp_path / "m")), validate=False)
    file = data_of(tmp_path / "w", [(60, 60), (90, 60)])
    calls: list[int] = []
    real = VisualLengths.__init__
    monkeypatch.setattr(VisualLengths, "__init__", lambda self, *given: calls.append(1) or real(self, *given))

    def look(max_length: int | None = None) -> int:
        calls.clear()
        look_through(mllm, ConversationSet(load_data(f"llava_json:{file}")), max_length)
        return len(calls)

    assert [look(), look(), look(40), look(40), look(41)] == [1, 0, 1, 0, 1]
    noise_image(7, 60, 60).save(tmp_path / "w" / "0.png")
    assert look() == 1
    mllm.processor.chat_template = mllm.processor.chat_template.replace("User :", "User : a")
    assert [look(), look()] == [1, 0]


# --- going on -------------------------------------------------------------------------------------


def test_rows_take_the_place_of_those_that_are_left_out() -> None:
    made = [Conversation(str(n), (("x" * n, "y"),), (noise_image,) * (n % 2)) for n in range(8)]  # type: ignore[arg-type]
    stored = Rows.of(made)
    for gone in ({3}, {0}, {7}, {2, 3, 4}, {6, 7}, {1, 3, 5}):
        kept = [n for n in range(8) if n not in gone]
        numbers, count = Rows.of([made[n] for n in kept]).match_stored(stored, "data")
        assert count == len(gone)
        for place, number in enumerate(numbers):
            now = kept[number]
            assert now == place if place not in gone else now not in gone and now % 2 == place % 2
            if place in gone and any(n > place and n % 2 == place % 2 for n in kept):
                assert now == min(n for n in kept if n > place and n % 2 == place % 2)
    for other, message in (
        ([*made, made[0]], "8 conversations, and row 9 of the 9 now in data is not the next of them"),
        ([made[1], made[0], *made[2:6]], "row 2 of the 6 now in data is not the next of them"),
        (made[::2], "data has no conversation with an image any more: expected one to take the place of row 2"),
    ):
        with pytest.raises(RunError, match=message):
            Rows.of(other).match_stored(stored, "data")
    changed = [Conversation("0", (("other", "text"),)), *made[1:]]
    assert Rows.of(changed).match_stored(stored, "data") == (list(range(8)), 0)


def run_of(flags: list[str], folder: Path) -> Path:
    train(parse(Recipe, [*flags, "--output_dir", str(folder)], prog="trainer"), [])
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def met(tmp_path: Path) -> tuple[list[str], Path, int]:
    """Flags of a run of six steps, its file, and the number of a conversation with one image whose turn comes in step 4
    or 5."""
    model, file = build("llava", tmp_path / "llava"), write(tmp_path / "w", rows(24, 4))
    flags = words(model, file, tmp_path, "--optim.steps", 6, "--eval_every", 6, "--log_every", 1, "--save_every", 2)
    recipe = parse(Recipe, flags, prog="trainer")
    ready = ConversationSetup.from_recipe(recipe)
    order = list(ready.sampler(1))
    return (
        flags,
        file,
        next(n for n in order[6:10] if n > 3 and n not in order[:6] and len(ready.train.conversations[n].loads) == 1),
    )


def break_late(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The file of an image that becomes unreadable once training has begun."""
    from workbench.data.images import StoredImage

    real = StoredImage.__call__

    def call(self: StoredImage) -> Image.Image:
        if self.name.endswith(name) and os.environ.get("BROKEN"):
            raise DataError(f"image {self.name} cannot be read (image file is truncated)")
        return real(self)

    monkeypatch.setattr(StoredImage, "__call__", call)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["drop", "deleted"])
def test_a_run_goes_on_without_a_row(
    how: str, met: tuple[list[str], Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the run that had the next conversation of its kind in that place from the beginning; resumed again, it says so
    still."""
    flags, file, number = met
    given = json.loads(file.read_text())
    break_late(monkeypatch, f"coco/{number}.png")
    import trainer.loop as loop

    begin = loop.AlignmentTrainer.run
    monkeypatch.setattr(
        loop.AlignmentTrainer, "run", lambda *a, **k: (monkeypatch.setenv("BROKEN", "1"), begin(*a, **k))[1]
    )
    with pytest.raises(
        DataError,
        match=rf"conversation {number + 1}:{number} of llava_json:.*{number}.png cannot be read.*--resume --repaired",
    ):
        run_of(flags, tmp_path / "out")
    assert [c.step for c in checkpoints(tmp_path / "out")] == [2]
    if how == "drop":
        now = [word + f"?drop={number + 1}" if word.startswith("llava_json:") else word for word in flags]
    else:
        file.write_text(json.dumps([row for row in given if row["id"] != number]))
        now = flags
    monkeypatch.delenv("BROKEN")
    if how == "deleted":
        with pytest.raises(RunError, match="add --repaired"):
            run_of([*now, "--resume"], tmp_path / "out")
        monkeypatch.delenv("BROKEN", raising=False)
    run_of([*now, "--resume", "--repaired"], tmp_path / "out")
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    sentence = f"resumed at step 2 without 1 of {len(given)} conversations, each replaced by the next one"
    assert any(sentence in warning for warning in record["warnings"])
    assert record["dropped"] == 1
    assert sentence in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.delenv("BROKEN", raising=False)
    after = next(n for n in range(number + 1, len(given)) if given[n].get("image"))
    file.write_text(json.dumps([given[after] if n == number else row for n, row in enumerate(given)]))
    # the sampler of the untroubled run must group by the lengths of the rows that the first one began with
    stored = Rows.load(tmp_path / "out" / "checkpoint-6")
    assert stored is not None
    assert len(stored.digests) == len(given)
    monkeypatch.setattr(ConversationSet, "rows", property(lambda self: stored, lambda self, value: None), raising=False)
    first = weights(
        run_of([w.partition("?")[0] if w.startswith("llava_json:") else w for w in flags], tmp_path / "same")
    )
    second = weights(tmp_path / "out")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_a_run_goes_on_with_a_larger_max_length_and_says_so(met: tuple[list[str], Path, int], tmp_path: Path) -> None:
    """From the middle, and from its last step; a smaller one is another recipe."""
    flags, _, _ = met
    done = run_of([*flags, "--data.max_length", "60", "--keep_checkpoints", "None"], tmp_path / "out")
    for step, gone in ((4, ["checkpoint-6"]), (6, [])):
        folder = tmp_path / f"from-{step}"
        os.system(f"cp -r {done} {folder}")
        for name in ("training.json", "model.safetensors", *gone):
            os.system(f"rm -r {folder / name}")
        with pytest.raises(WorkbenchError, match=r"was started with data\.max_length 60, and this recipe says 50"):
            run_of([*flags, "--data.max_length", "50", "--resume"], folder)
        run_of([*flags, "--data.max_length", "200", "--resume"], folder)
        record = json.loads((folder / "training.json").read_text())
        sentence = f"resumed at step {step} with data.max_length 200, which was 60 before"
        assert [w for w in record["warnings"] if sentence in w]
        assert record["recipe"]["data"]["max_length"] == 200
        assert sentence in (folder / "README.md").read_text()
        if step == 6:
            assert all(torch.equal(value, weights(done)[name]) for name, value in weights(folder).items())


@pytest.mark.slow
def test_what_is_left_out_and_cut_is_in_the_record(tmp_path: Path) -> None:
    model, given = build("llava", tmp_path / "llava"), rows(6, 1)
    long = said("what is this ? " * 20, image="coco/0.png") | {"source": "web"}
    long["conversations"][0]["value"] = "<image> " + long["conversations"][0]["value"]
    file = write(tmp_path / "w", given)
    file.write_text(json.dumps([*given, long]))
    run_of(words(model, file, tmp_path, "--data.max_length", 60, "--optim.steps", 1), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    expected = [
        "`source` is not read: 1 row, first row 8",
        "data.max_length = 60 cuts 1 of 8 conversations",
        "leaves no answer in 1 of 8 conversations",
    ]
    for what in expected:
        assert any(what in sentence for sentence in record["left_out"]) and any(
            what in warning for warning in record["warnings"]
        ), (what, record["left_out"])
    assert not np.isnan(record["seconds"])
