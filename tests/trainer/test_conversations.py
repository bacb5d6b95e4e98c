"""Conversations: what each family's template lets a model learn equals encoded prefixes; files are read whole or
refused; batches are grouped and exact."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.students import noise_image, rows, write
from tests.tiny import BUILDERS, build
from trainer.build.language import FLATTEN_CONTENT
from trainer.setups.conversation_data import GroupedSampler
from trainer.setups.rows import Rows
from workbench.convert.build import CHAT_TEMPLATE
from workbench.data import Sample, load_data
from workbench.data.base import IMAGE_MARK, Conversation
from workbench.data.conversations import mixed
from workbench.errors import DataError, ModelError, UnknownNameError
from workbench.mllm import MLLM
from workbench.mllm.conversation import IGNORED, conversation_text, encode_conversations
from workbench.scoring.options import Options

TURNS = [[("what is this ?", "a red cat"), ("what color ?", "red")], [("is this a dog ?", "no")]]


def ids_of(mllm: MLLM, images: list[Any], text: str) -> torch.Tensor:
    """Tokens of one text that already is in the model's format."""
    return mllm.process((tuple(images),), [text], ["?"]).inputs["input_ids"][0]


def by_prefixes(
    mllm: MLLM, images: list[Any], turns: list[tuple[str, str]], place: str, bos: str, end: str, after: str
) -> torch.Tensor:
    """Labels of one conversation, from the lengths of its encoded beginnings; the format is written out by hand."""
    text, labels = f"{bos}", ids_of(mllm, images, bos + place * len(images) or "x").new_empty(0)
    for number, (question, answer) in enumerate(turns):
        text += f"User : {place * len(images) if number == 0 else ''} {question} Assistant :"
        start = len(ids_of(mllm, images, text))
        text += f" {answer}{end}"
        ids = ids_of(mllm, images, text)
        labels = torch.cat([labels, torch.full((start - len(labels),), IGNORED), ids[start:]])
        text += after
    return labels


@pytest.mark.parametrize("name", sorted(set(BUILDERS) - {"paligemma"}))
def test_what_is_learnt_equals_encoded_prefixes(name: str, tmp_path: Path) -> None:
    mllm = MLLM.load(str(build(name, tmp_path / "m")), validate=False)
    bos = "<bos>" if (mllm.processor.chat_template or "").startswith("{{ bos_token }}") else ""
    place = {"gemma3": "<start_of_image>", "internvl": "<IMG_CONTEXT>"}.get(name, "<image>")
    if name.startswith("qwen"):
        place = "<|vision_start|> <|image_pad|> <|vision_end|>"
    plain = mllm.processor.chat_template
    # and a template that ends no turn
    for end, after, template in ((" <eos>", "\n", plain), ("<eos>", "", plain.replace(" <eos>", ""))):
        mllm.processor.chat_template = template
        for images in ([[noise_image(0)], [noise_image(1, 40, 80)]], [[noise_image(0), noise_image(2)], []], [[], []]):
            batch, labels = encode_conversations(mllm, images, TURNS)
            for row in range(2):
                expected = by_prefixes(mllm, images[row], TURNS[row], place, bos, end, after)
                ids = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()]
                assert torch.equal(labels[row, : len(expected)], expected)
                assert (labels[row, len(expected) :] == IGNORED).all()
                asked = mllm.encode([images[row]], [TURNS[row][0][0]]).inputs["input_ids"][0]
                assert torch.equal(ids[: len(asked)], asked)
                assert int((labels[row] != IGNORED).long().argmax()) == len(asked)
            assert mllm.processor.tokenizer.decode(labels[0][labels[0] != IGNORED]).split() == [
                "a",
                "red",
                "cat",
                "<eos>",
                "red",
                "<eos>",
            ]


def test_a_model_without_a_template_learns_the_suffix(tmp_path: Path) -> None:
    mllm = MLLM.load(str(build("paligemma", tmp_path / "m")), validate=False)
    turns = [TURNS[0][:1], TURNS[1]]
    batch, labels = encode_conversations(mllm, [noise_image(0), noise_image(1)], turns)
    for row, ((question, answer),) in enumerate(turns):
        prompt = mllm.encode([noise_image(row)], [question]).inputs["input_ids"][0]
        tail = mllm.processor.tokenizer(f"{answer} <eos>", add_special_tokens=False, return_tensors="pt")["input_ids"][
            0
        ]
        whole = torch.cat([prompt, tail])
        assert torch.equal(batch.inputs["input_ids"][row, : len(whole)], whole)
        assert torch.equal(labels[row, len(prompt) : len(whole)], tail)
        assert int((labels[row] != IGNORED).sum()) == len(tail)
    with pytest.raises(ModelError, match="can be trained on one question"):
        encode_conversations(mllm, [noise_image(0)], TURNS[:1])


def test_sequences_are_cut_but_not_inside_an_image(tmp_path: Path) -> None:
    mllm = MLLM.load(str(build("llava", tmp_path / "m")), validate=False)
    whole, labels = encode_conversations(mllm, [noise_image(0)], TURNS[:1])
    cut, short = encode_conversations(mllm, [noise_image(0)], TURNS[:1], max_length=30)
    assert (
        cut.inputs["input_ids"].shape
        == cut.inputs["attention_mask"].shape
        == short.shape
        == (
            1,
            30,
        )
    )
    assert torch.equal(labels[:, :30], short)
    assert whole.inputs["input_ids"].shape[1] > 30
    with pytest.raises(ModelError, match="reaches beyond max_length, 10 tokens"):
        encode_conversations(mllm, [noise_image(0)], TURNS[:1], max_length=10)
    with pytest.raises(ModelError, match="the answer contains '<image>'"):
        encode_conversations(mllm, [noise_image(0)], [[("what is this ?", "an <image>")]])


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_images_stand_between_the_words_where_the_template_lets_them(name: str, tmp_path: Path) -> None:
    mllm = MLLM.load(str(build(name, tmp_path / "m")), validate=False)
    images, question = [noise_image(0), noise_image(1, 40, 80)], f"one : {IMAGE_MARK} two : {IMAGE_MARK} what is red ?"
    if mllm.processor.chat_template is None:
        with pytest.raises(ModelError, match="has no chat template: expected images before the question"):
            mllm.encode([images], [question])
        return
    batch, labels = encode_conversations(mllm, [images], [[(question, "one"), ("a ?", "no")]])
    ids, visual = batch.inputs["input_ids"][0], mllm.visual_tokens(batch)[0]
    asked = mllm.encode([images], [question]).inputs["input_ids"][0]
    assert torch.equal(ids[: len(asked)], asked)
    assert int((labels[0] != IGNORED).long().argmax()) == len(asked)
    word = {w: mllm.processor.tokenizer.convert_tokens_to_ids(w) for w in ("one", "two", "what")}
    places = [(ids[: len(asked)] == word[w]).nonzero().flatten().tolist() for w in word]
    ends = [torch.cat([part.index for part in visual if part.image == n]) for n in (0, 1)]
    assert (
        places[0][0]
        < int(ends[0].min())
        <= int(ends[0].max())
        < places[1][0]
        < int(ends[1].min())
        <= int(ends[1].max())
        < places[2][0]
    )
    with pytest.raises(ModelError, match="has 2 image marks for 1 images"):
        mllm.encode([images[0]], [question])
    plain = mllm.processor.chat_template
    first = (
        "{% for p in m['content'] if p['type'] == 'image' %}IMAGE{% endfor %}{% for p in m['content'] if p['type'] =="
        " 'text' %} {{ p['text'] }}{% endfor %}"
    )
    mllm.processor.chat_template = (
        "{% for m in messages %}" + first.replace("IMAGE", mllm.image_placeholder) + "{% endfor %}"
    )
    mllm._keeps_order.clear()
    with pytest.raises(
        ModelError, match="has a chat template that puts images elsewhere: expected images before the question"
    ):
        mllm.encode([images], [question])
    mllm.processor.chat_template = plain


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "paligemma", "qwen3_vl", "smolvlm"])
def test_control_tokens_of_the_model_are_refused_or_words(name: str, tmp_path: Path) -> None:
    """All of them, in questions, answers and options; never obeyed."""
    mllm = MLLM.load(str(build(name, tmp_path / "m")), validate=False)
    tokenizer = mllm.processor.tokenizer
    tokenizer.add_tokens(["tachycardia", "<b>", "  "])  # vocabulary, no control
    tokenizer.add_tokens(["<|turn|>"])
    added = (
        {token.content for token in tokenizer.added_tokens_decoder.values()}
        - {"tachycardia", "<b>", "  "}
        - mllm._placeholders
    )
    marks = {token for token in added if not re.match("<loc|<seg", token)}  # PaliGemma's, which answers are made of
    assert set(mllm.control_tokens) - {"<video>"} == marks - {"<video>"} >= {"<pad>", "<bos>", "<eos>", "<|turn|>"}
    image, ids = [[noise_image(0)]], {token: tokenizer.convert_tokens_to_ids(token) for token in marks}
    usual = encode_conversations(mllm, image, [[("what is tachycardia <b> ?", "a cat")]])
    for token in sorted(marks):
        text = f"a {token}{token} cat"
        for turns in ([(text, "yes")], [("what ?", text)]):
            with pytest.raises(
                ModelError,
                match=re.escape(f"contains '{token}', a control token of this model: remove it"),
            ):
                encode_conversations(mllm, image, [turns])
        for call in (lambda text=text: mllm.encode(image, [text]), lambda text=text: mllm.answer_ids(text)):
            with pytest.raises(ModelError, match="a control token"):
                call()
        mllm.control_tokens_as_words = True
        batch, labels = encode_conversations(mllm, image, [[(text, text)]])
        learnt = labels[0][labels[0] != IGNORED].tolist()
        if ids[token] != tokenizer.unk_token_id:  # which the words of this tokenizer are
            assert ids[token] not in learnt[:-1]
            assert ids[token] not in mllm.answer_ids(text)
            assert (batch.inputs["input_ids"] == ids[token]).sum() == (usual[0].inputs["input_ids"] == ids[token]).sum()
        mllm.control_tokens_as_words = False


# --- files ----------------------------------------------------------------------------------------


def test_llava_json_is_read_as_it_stands(tmp_path: Path) -> None:
    file = write(tmp_path / "w")
    data = load_data(f"llava_json:{file}")
    first, other, text = data.conversations[0], data.conversations[3], data.conversations[-1]
    assert first.turns == (("what is this ?", "a blue dog"), ("what color ?", "blue"))
    assert len(first.loads) == 1
    assert len(other.loads) == 2
    assert text.loads == ()
    assert text.turns == (("one of the two ?", "one"),)
    assert first.images[0].tobytes() == noise_image(0).tobytes()
    assert other.images[1].tobytes() == noise_image(103).tobytes()
    assert len(data.conversations) == 10
    assert len(data.samples) == 6
    some = load_data(f"llava_json:{file}", limit=4, seed=1)
    assert len(some.conversations) == 4
    assert some.fingerprint != data.fingerprint == load_data(f"llava_json:{file}").fingerprint
    moved = tmp_path / "elsewhere"
    (tmp_path / "w" / "coco").rename(tmp_path / "c")
    moved.mkdir()
    (tmp_path / "c").rename(moved / "coco")
    (tmp_path / "w" / "gqa").rename(moved / "gqa")
    assert load_data(f"llava_json:{file}?images={moved}").fingerprint == data.fingerprint
    lines = tmp_path / "w" / "mix.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows())))
    assert [c.turns for c in load_data(f"llava_json:{lines}?images={moved}").conversations] == [
        c.turns for c in data.conversations
    ]


def test_rows_are_held_out(tmp_path: Path) -> None:
    file = write(tmp_path / "w")
    train, val = (
        {c.id for c in load_data(f"llava_json:{file}?split={split}&held=3").conversations} for split in ("train", "val")
    )
    assert len(val) == 3
    assert not train & val
    assert train | val == {c.id for c in load_data(f"llava_json:{file}").conversations}
    with pytest.raises(DataError, match="held is 10: expected 1 to 9"):
        load_data(f"llava_json:{file}?split=val&held=10")


def test_no_image_is_in_both_splits_where_rows_have_several(tmp_path: Path) -> None:
    for n in range(12):
        noise_image(n).save(tmp_path / f"{n}.png")
    names = [[f"{n}.png"] for n in range(12)] + [[f"{n}.png", f"{n + 1}.png"] for n in range(11)]
    conversations = [
        [{"from": "human", "value": "<image>" * len(images) + "what ?"}, {"from": "gpt", "value": "a dog"}]
        for images in names
    ]
    lines = [{"image": i, "conversations": c} for i, c in zip(names, conversations, strict=True)]
    (tmp_path / "x.json").write_text(json.dumps(lines))

    def part(split: str) -> tuple[set[str], set[str], tuple[str, ...]]:
        data = load_data(f"llava_json:{tmp_path / 'x.json'}?split={split}&held=4", decode=False)
        rows = data.conversations
        return {c.id for c in rows}, {load.name for c in rows for load in c.loads}, data.left_out

    (train, of_train, left_out), (val, of_val, none) = part("train"), part("val")
    assert not of_train & of_val
    assert len(val) == 4
    assert not none
    assert left_out[0].startswith(f"{23 - len(train) - len(val)} of 23 rows show images of the validation split")


def test_missing_images_are_counted_and_named_before_anything_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "w")
    for name in ("coco/1.png", "coco/3.png", "gqa/3.png"):
        (tmp_path / "w" / name).unlink()
    message = r"3 images of mix.json are not below .* \(coco 2, gqa 1\), first coco/1.png, coco/3.png, gqa/3.png"
    with pytest.raises(DataError, match=message):
        load_data(f"llava_json:{file}")
    data = load_data(f"llava_json:{file}?missing=skip")
    assert len(data.conversations) == 8
    assert "2 of 10 rows are left out" in caplog.text


HUMAN, GPT = {"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "a cat"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "coco/0.png"}, "row 2 has no `conversations`"),
        ({"image": "coco/0.png", "conversations": []}, "row 2 has no list of messages"),
        (
            {"image": "coco/0.png", "conversations": [HUMAN, HUMAN]},
            "row 2, message 2: expected an answer, since they alternate",
        ),
        ({"image": "coco/0.png", "conversations": [HUMAN]}, "row 2 has no question with an answer"),
        (
            {"image": "coco/0.png", "conversations": [HUMAN, {"from": "gpt", "value": 7}]},
            "row 2, message 2: expected `from` human or gpt",
        ),
        (
            {"image": "coco/0.png", "conversations": [HUMAN, {"from": "cat", "value": "x"}]},
            "row 2, message 2: expected `from` human or gpt",
        ),
        ({"conversations": [HUMAN, GPT]}, "row 2 has 1 times <image> for 0 images"),
        ({"image": ["coco/0.png"] * 2, "conversations": [HUMAN, GPT]}, "row 2 has 1 times <image> for 2 images"),
        (
            {"image": "coco/0.png", "conversations": [GPT | {"from": "human"}, GPT]},
            "row 2 has 1 image and no <image> in its first question",
        ),
        (
            {"image": "coco/0.png", "conversations": [HUMAN, GPT, HUMAN, GPT]},
            "row 2 has <image> in turn 2 after the first question",
        ),
        ({"image": "../secret.png", "conversations": [HUMAN, GPT]}, "expected a path below the image root"),
        ({"image": 3, "conversations": [HUMAN, GPT]}, "row 2 has `image` 3"),
        ("text", "row 2 has no `conversations`"),
    ],
)
def test_a_broken_row_is_a_number_and_a_reason(tmp_path: Path, row: Any, message: str) -> None:
    file = write(tmp_path / "w", rows(1, 0))
    file.write_text(json.dumps([*rows(1, 0), row]))
    with pytest.raises(DataError) as error:
        load_data(f"llava_json:{file}")
    assert message in str(error.value)
    assert "1 broken row" in str(error.value)


def test_files_and_options_that_are_not_there(tmp_path: Path) -> None:
    file = write(tmp_path / "w", rows(1, 0))
    for spec, message in (
        (f"{file}x", "does not exist"),
        (f"{file}?images={tmp_path}/none", "image root '.*none' does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            load_data(f"llava_json:{spec}")
    with pytest.raises(UnknownNameError, match="did you mean 'images'"):
        load_data(f"llava_json:{file}?imags=x")
    file.write_text('[{"id": 1,}]')
    with pytest.raises(DataError, match=r"is not valid JSON \(.*line 1"):
        load_data(f"llava_json:{file}")
    lines = file.with_suffix(".jsonl")
    lines.write_text("\n".join([json.dumps(rows(1, 0)[0]), "", '{"id": 1,}']))
    with pytest.raises(DataError, match=r"mix.jsonl has 1 broken row: row 3 is not valid JSON \(.*column"):
        load_data(f"llava_json:{lines}")
    file.write_text('{"id": 1}')
    with pytest.raises(DataError, match="holds dict: expected a list"):
        load_data(f"llava_json:{file}")


def test_hugging_face_data_sets(tmp_path: Path) -> None:
    if os.environ.get("CI"):
        import datasets
    else:
        datasets = pytest.importorskip("datasets")
    chat = [{"from": "human", "value": "<image>what is this ?"}, {"from": "gpt", "value": "a cat"}]
    table = datasets.Dataset.from_dict({"image": [noise_image(0), noise_image(1)], "conversations": [chat, chat]})
    (tmp_path / "p").mkdir()
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "p" / "train-00000.parquet")
    data = load_data(f"hf:{tmp_path / 'p'}")
    assert [c.turns for c in data.conversations] == [(("what is this ?", "a cat"),)] * 2
    assert data.conversations[1].images[0].tobytes() == noise_image(1).tobytes()
    file = tmp_path / "q.jsonl"
    noise_image(0).save(tmp_path / "0.png")
    row = {
        "image": "0.png",
        "question": "what is this ?",
        "answer": "cat",
        "options": ["cat", "dog"],
        "category": "kind",
    }
    file.write_text("\n".join(map(json.dumps, [row, row | {"answer": "dog"}])))
    asked = load_data(f"hf:{file}")
    assert [s.answer for s in asked] == ["cat", "dog"]
    assert asked[0].options == ("cat", "dog")
    assert asked[0].category == "kind"
    assert asked.conversations[0].images[0].tobytes() == noise_image(0).tobytes()
    parts = [{"type": "image"}, {"type": "text", "text": "what is this ?"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
    (tmp_path / "m.jsonl").write_text(json.dumps({"images": ["0.png"], "messages": messages}))
    assert load_data(f"hf:{tmp_path / 'm.jsonl'}").conversations[0].turns == (("what is this ?", "a cat"),)
    for content, message in (
        (
            {"image": "0.png", "text": "x"},
            "has columns image, text: expected conversations, messages, or question and answer",
        ),
        (row | {"image": "1.png"}, r"1 image of q.jsonl is not below .* \(\. 1\), first 1.png: expected all of them"),
        (
            {"images": ["1.png", "a/2.png"], "messages": messages},
            r"2 images of q.jsonl are not below .* \(\. 1, a 1\), first 1.png, a/2.png",
        ),
        (row | {"image": 3}, "row 1 has image 3: expected an image, its path, or its bytes"),
        ({"image": "0.png", "messages": "what ?"}, "row 1 has no list of messages"),
        ({"image": "0.png", "messages": ["what ?"]}, "row 1 has no list of messages"),
        ({"image": "0.png", "messages": messages[:1]}, "row 1 has no question with an answer"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            load_data(f"hf:{file}")
    for path in (str(tmp_path / "nowhere"), "data/a/b", "data/questions.jsonl"):  # none asks the hub
        with pytest.raises(DataError, match=f"{re.escape(path)} does not exist: expected a file, a folder, or"):
            load_data(f"hf:{path}")


def test_a_split_is_the_files_that_are_named_so(tmp_path: Path) -> None:
    """A split that is not there is an error: all rows in its place would be trained and validated on alike."""
    if not os.environ.get("CI"):
        pytest.importorskip("datasets")

    def rows(count: int) -> str:
        return "\n".join(json.dumps({"question": "what ?", "answer": str(n)}) for n in range(count))

    folder = tmp_path / "d"
    (folder / "test").mkdir(parents=True)
    (folder / "train-00000-of-00001.jsonl").write_text(rows(6))
    (folder / "test" / "0.jsonl").write_text(rows(3))
    assert [len(load_data(f"hf:{folder}{split}").conversations) for split in ("", "?split=train", "?split=test")] == [
        6,
        6,
        3,
    ]
    with pytest.raises(DataError, match=r"has no file whose name says split val: expected split=train or split=test"):
        load_data(f"hf:{folder}?split=val")
    (folder / "test" / "1.jsonl").write_text(rows(1))
    (folder / "train-00000-of-00001.jsonl").unlink()
    with pytest.raises(DataError, match=r"says split train: expected split=test"):
        load_data(f"hf:{folder}")
    lone = tmp_path / "rows.jsonl"
    lone.write_text(rows(2))
    assert len(load_data(f"hf:{lone}").conversations) == 2
    with pytest.raises(DataError, match=r"says split val: expected none"):
        load_data(f"hf:{lone}?split=val")


def test_mixing_repeats_and_samples(tmp_path: Path) -> None:
    file, shapes = write(tmp_path / "w"), load_data("shapes:val", limit=4)
    parts = [load_data(f"llava_json:{file}"), shapes]
    both = mixed(parts, [2.5, 0.5], seed=3)
    count = Counter(c.id for c in both.conversations)
    assert sorted(count[c.id] for c in parts[0].conversations) == [2] * 5 + [3] * 5
    assert sum(count[c.id] for c in shapes.conversations) == 2
    assert (
        both.fingerprint == mixed(parts, [2.5, 0.5], seed=3).fingerprint != mixed(parts, [2.5, 0.5], seed=4).fingerprint
    )
    assert shapes.conversations[0].turns == tuple((s.question, s.answer) for s in shapes.scenes[0])
    with pytest.raises(DataError, match="weights are 1: expected 2 numbers above 0"):
        mixed(parts, [1.0])
    with pytest.raises(
        DataError, match=r"weight 0.1 of shapes:val leaves none of its 4 conversations: expected at least 0.25"
    ):
        mixed(parts, [1.0, 0.1])
    with pytest.raises(DataError, match="questions without an answer"):
        _ = load_data(f"folder:{tmp_path / 'w'}").conversations


# --- order ----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(images=st.integers(0, 40), texts=st.integers(0, 40), group=st.integers(1, 7), seed=st.integers(0, 99))
def test_groups_are_of_one_kind_and_none_is_two_times_ahead(images: int, texts: int, group: int, seed: int) -> None:
    if not images + texts:
        return
    made = [Conversation(str(n), (("x" * (n % 9), ""),), (noise_image,) * (n < images)) for n in range(images + texts)]  # type: ignore[arg-type]
    epochs = 3
    # what three epochs give; less than a group of each kind waits
    wholes = [epochs * count // group * group for count in (images, texts)]
    total = sum(wholes) + group
    order = list(GroupedSampler(Rows.of(made), group, total, seed))
    assert len(order) == total
    assert order == list(GroupedSampler(Rows.of(made), group, total, seed))
    # a longer training begins in the same way
    assert order[: total // 2] == list(GroupedSampler(Rows.of(made), group, total // 2, seed))
    assert all(
        len({bool(made[n].loads) for n in order[start : start + group]}) == 1 for start in range(0, total, group)
    )
    counts = Counter(order[: sum(wholes)])
    for kind, count, whole in zip((range(images), range(images, images + texts)), (images, texts), wholes, strict=True):
        given = [counts[n] for n in kind]
        assert sum(given) == whole
        assert not count or set(given) <= {whole // count, -(-whole // count)}


def test_groups_are_of_about_one_length_and_differ_by_seed() -> None:
    made = [Conversation(str(n), (("x" * (n * 7 % 100), ""),)) for n in range(400)]
    spread = {}
    for grouped in (True, False):
        order = torch.tensor(list(GroupedSampler(Rows.of(made), 8, 400, 0, grouped=grouped)))
        lengths = torch.tensor([c.length for c in made])[order].view(-1, 8)
        spread[grouped] = (lengths.max(1).values - lengths.min(1).values).float().mean()
        assert sorted(order.tolist()) == list(range(400))
    assert spread[True] < 5 < 60 < spread[False]
    assert list(GroupedSampler(Rows.of(made), 8, 400, 0)) != list(GroupedSampler(Rows.of(made), 8, 400, 1))


def test_a_kind_that_fills_no_step_is_told_of() -> None:
    def sampler(images: int, texts: int, group: int, passes: int) -> GroupedSampler:
        data = [
            Conversation(str(n), (("a", "b"),), (noise_image,) if n < images else ()) for n in range(images + texts)
        ]
        return GroupedSampler(Rows.of(data), group, passes * len(data) // group * group, 0)

    assert (
        sampler(1000, 5, 128, 10).rare_kind()
        == "the 5 conversations without an image are 0.00498 of the data and 0 of what is trained on, since they rarely"
        " fill a step of 128; see optim.global_batch and data.group"
    )
    assert sampler(1000, 500, 128, 2).rare_kind() is None
    assert sampler(100, 0, 8, 1).rare_kind() is None


def test_placeholders_are_words_where_there_is_no_image(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "an <image> in XML ?"}, {"from": "gpt", "value": "<image>x</image>"}]
    (tmp_path / "mix.json").write_text(json.dumps([{"id": 0, "conversations": said}]))
    (only,) = load_data(f"llava_json:{tmp_path / 'mix.json'}").conversations
    assert only.turns == (("an < image> in XML ?", "< image>x</image>"),)


# --- byte-level tokenizers: a word after a space is another token than the word alone -------------

SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] =="
    " 'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text'"
    " %}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{%"
    " endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (  # as Qwen3's: an empty thought before the last answer, and in the prompt only where thinking is off
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n'}}{% if loop.last and m['role'] == 'assistant'"
    " %}{{'<think>\n\n</think>\n\n'}}{% endif %}{{m['content'] + '<|im_end|>\n'}}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is"
    " false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def byte_level(folder: Path, template: str, end: str) -> MLLM:
    """A small LLaVA with a byte-level BPE tokenizer."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [
        "User: is the mug left or right ? Assistant: left",
        "left\nright\nyes\nno",
        " left right yes no USER: ASSISTANT: what is it ?",
    ] * 50
    core.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet, special_tokens=special),
    )
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token=end,
        extra_special_tokens={"image_token": "<image>"},
    )
    model = tf.AutoModelForImageTextToText.from_pretrained(build("llava", folder))
    model.resize_token_embeddings(len(tokenizer))
    model.config.image_token_index = model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = tf.AutoProcessor.from_pretrained(folder)
    made = tf.LlavaProcessor(
        processor.image_processor,
        tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        chat_template=template,
    )
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return MLLM.load(str(folder), validate=False)


TEMPLATES = {
    "smolvlm": (SMOLVLM, "<end_of_utterance>"),
    "vicuna": (CHAT_TEMPLATE.replace("SYSTEM", ""), "<|im_end|>"),
    "chatml": (FLATTEN_CONTENT + CHATML, "<|im_end|>"),
    "thinking": (FLATTEN_CONTENT + THINKING, "<|im_end|>"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_options_are_scored_by_the_tokens_that_are_learnt(name: str, tmp_path: Path) -> None:
    """A model that knows every answer by heart must not be scored at chance because it is asked for other tokens than
    it learnt."""
    mllm = byte_level(tmp_path / "m", *TEMPLATES[name])
    sample = Sample("0", "0", lambda: noise_image(0), "is it left or right ?", "left", ("left", "right"), "side")
    batch, labels = encode_conversations(mllm, [noise_image(0)], [[(sample.question, sample.answer)]])
    (options,) = Options(mllm, [sample]).tokens
    at = int((labels[0] != IGNORED).long().argmax())
    assert labels[0, at] == options[0][0] != options[1][0]
    assert torch.equal(
        batch.inputs["input_ids"][0, :at], mllm.encode([noise_image(0)], [sample.question]).inputs["input_ids"][0]
    )
    learnt = labels[0][labels[0] != IGNORED].tolist()
    assert learnt[:-1] == mllm.answer_ids("left")
    assert learnt[-1] == mllm.processor.tokenizer.eos_token_id


def test_a_turn_that_ends_with_another_token_than_the_model_keeps_its_own_end(tmp_path: Path) -> None:
    mllm = byte_level(tmp_path / "m", FLATTEN_CONTENT + CHATML, "<end_of_utterance>")
    text, spans = conversation_text(mllm, [("yes ?", "no"), ("no ?", "yes")], 0)
    assert text.startswith(
        "<|im_start|>user\nyes"
        " ?<|im_end|>\n<|im_start|>assistant\nno<|im_end|><end_of_utterance>\n<|im_start|>user\nno ?"
    )
    assert [text[start:stop] for start, stop in spans] == [
        f"{answer}<|im_end|><end_of_utterance>" for answer in ("no", "yes")
    ]
