"""Rows as others write them: media under any key, placeholders between words, options and answers of every form, cells
that are text. Read right or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.students import noise_image
from workbench.data import load_data
from workbench.data.base import IMAGE_MARK
from workbench.data.choices import Options, answer_of, options_of
from workbench.data.conversations import ConversationDataset
from workbench.data.turns import Notes, place_images, turns_of
from workbench.errors import ConfigError, DataError, UnknownNameError


def said(question: str, answer: str = "a cat") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def llava(folder: Path, *given: dict[str, Any], options: str = "") -> ConversationDataset:
    """A LLaVA JSON of these rows, beside 1.png and 2.png."""
    for number in (1, 2):
        noise_image(number).save(folder / f"{number}.png")
    (folder / "mix.json").write_text(json.dumps(given))
    data = load_data(f"llava_json:{folder / 'mix.json'}{options}")
    assert isinstance(data, ConversationDataset)
    return data


def asked(folder: Path, *given: dict[str, Any], options: str = "") -> ConversationDataset:
    """JSON lines of questions about 1.png."""
    noise_image(1).save(folder / "1.png")
    (folder / "q.jsonl").write_text(
        "\n".join(json.dumps({"image": "1.png", "question": "what ?"} | row) for row in given)
    )
    data = load_data(f"hf:{folder / 'q.jsonl'}{options}")
    assert isinstance(data, ConversationDataset)
    return data


# --- media ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["image", "images", "image_path", "imagePath", "img", "Image", "image_file"])
def test_images_are_read_under_every_usual_key(key: str, tmp_path: Path) -> None:
    for value in ("1.png", ["1.png"]):
        (only,) = llava(tmp_path, {key: value, "conversations": said("<image>\nwhat ?")}).conversations
        assert only.images[0].tobytes() == noise_image(1).tobytes()
        assert only.turns == (("what ?", "a cat"),)
        (only,) = asked(tmp_path, {"image": None, "answer": "a cat"} | {key: value}).conversations
        assert only.images[0].tobytes() == noise_image(1).tobytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"video": "a.mp4"}, "row 2 has a video under `video`, which is not read"),
        ({"image": "1.png", "video_path": "a.mp4"}, "row 2 has a video under `video_path`"),
        ({"image": "1.png", "image_2": "2.png"}, "row 2 has `image_2` '2.png' beside `image`"),
        ({"audio": {"bytes": "x"}}, "row 2 has audio under `audio`"),
        ({"picture": "1.png"}, "row 2 has `picture` '1.png' and no image"),
        ({"image_url": "http://x/1.png"}, "row 2 has `image_url` 'http://x/1.png' and no image"),
        ({"image_id": 42}, "row 2 has `image_id` '42' and no image"),
        ({"image": [], "frames": ["1.png"]}, "row 2 has `frames`"),
        ({"image_path": "1.png", "img": "2.png"}, "row 2 has images under `image_path` and `img`"),
    ],
)
def test_media_that_are_not_read_are_refused_with_the_row(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    question = "<image> what ?" if more.get("image") or "img" in more else "what ?"
    with pytest.raises(DataError) as error:
        llava(tmp_path, {"conversations": said("what ?")}, more | {"conversations": said(question)})
    assert message in str(error.value)
    assert len(str(error.value)) < 300
    with pytest.raises(DataError) as error:
        asked(tmp_path, {"image": None, "answer": "a"}, {"image": None, "answer": "a"} | more)
    assert message.removeprefix("row 2 ") in str(error.value)
    assert len(str(error.value)) < 300


def test_what_is_no_medium_is_not_refused_but_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"image": "1.png", "image_id": 3, "source": "coco", "video": None, "conversations": said("<image> what ?")},
        {"conversations": said("what ?")},
    ]
    data = llava(tmp_path, *rows, rows[0])
    expected = ("`image_id` is not read: 2 rows, first row 1", "`source` is not read: 2 rows, first row 1")
    assert data.left_out == expected
    assert [record.getMessage() for record in caplog.records] == [
        f"llava_json:{tmp_path}/mix.json: {'; '.join(expected)}"
    ]


def test_keys_of_a_message_are_counted_by_row(tmp_path: Path) -> None:
    """Other trainers leave out the turns that such a key marks; here all of them are trained on."""
    messages = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "a", "loss": False, "name": ""}]
    data = llava(tmp_path, {"conversations": messages * 2}, {"conversations": said("what ?")})
    assert data.left_out == ("`loss` of a message is not read: 1 row, first row 1",)


def test_placeholders_between_words_keep_their_places() -> None:
    assert (
        place_images("row 1", "<image>\nwhat ?", 1)
        == place_images("row 1", "what ?\n<image>", 1)
        == place_images("row 1", "what ?", 1)
        == "what ?"
    )
    assert place_images("row 1", "<image>\n<image> which ?", 2) == "which ?"
    assert place_images("row 1", "A: <image> B: <image>", 2) == f"A: {IMAGE_MARK} B: {IMAGE_MARK}"
    assert place_images("row 1", "<image 1> or <image 2> ?", 2) == f"{IMAGE_MARK} or {IMAGE_MARK} ?"
    for question, images, message in (
        ("<image 2> or <image 1> ?", 2, "expected <image 1> to <image 2> in this order"),
        ("see <image>", 2, "row 1 has 1 times <image> for 2 images"),
        ("see <video> now", 1, "row 1 has <video> in its question: expected images only"),
    ):
        with pytest.raises(DataError, match=message):
            place_images("row 1", question, images)


def test_a_mark_without_its_medium_is_lost_at_the_edge_and_a_word_within(tmp_path: Path) -> None:
    for question in ("<image>\nwhat ?", "what ? <video>", "<audio> what ?"):
        with pytest.raises(DataError, match="row 1 has"):
            llava(tmp_path, {"conversations": said(question)})
    data = llava(tmp_path, {"conversations": said("a <video> in HTML ?")})
    assert data.conversations[0].turns[0][0] == "a <video> in HTML ?"
    assert data.left_out == ("<video> is a word where there is no image: 1 row, first row 1",)


def test_parts_of_messages_are_images_and_texts(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
    noise_image(1).save(tmp_path / "1.png")

    def read(*parts: dict[str, Any]) -> str:
        row = {
            "images": ["1.png"] * sum(part["type"].startswith("image") for part in parts),
            "messages": [{"role": "user", "content": list(parts)}, answer],
        }
        (tmp_path / "m.jsonl").write_text(json.dumps(row))
        return load_data(f"hf:{tmp_path / 'm.jsonl'}").conversations[0].turns[0][0]

    one, image = {"type": "text", "text": "one : "}, {"type": "image", "text": None}
    assert (
        read(one, image, {"type": "text", "text": " two : "}, image | {"type": "image_url"})
        == f"one : {IMAGE_MARK} two : {IMAGE_MARK}"
    )
    assert read(image, one) == "one :"
    with pytest.raises(DataError, match=r"row 1, message 1 has a part of type 'video': expected text or image"):
        read(one, {"type": "video", "video": "a.mp4"})


def test_turns_that_are_cut_off_are_counted_and_empty_answers_refused(tmp_path: Path) -> None:
    notes = Notes()
    messages = [said("x", "hello")[1], *said("what ?"), said("more ?")[0]]
    assert turns_of("row 7", messages, 0, speaker="from", text="value", notes=notes) == (("what ?", "a cat"),)
    assert notes.sentences() == (
        "a question after the last answer is left out: 1 row, first row 7",
        "an answer before the first question is left out: 1 row, first row 7",
    )
    with pytest.raises(DataError, match="row 2, message 2 is an empty answer"):
        llava(tmp_path, {"conversations": said("what ?")}, {"conversations": said("what ?", " ")})
    with pytest.raises(DataError, match="row 1 has an empty question and no image"):
        llava(tmp_path, {"conversations": said(" ")})


def test_broken_rows_are_skipped_only_where_the_spec_says_so(tmp_path: Path) -> None:
    rows = [
        {"conversations": said("what ?")},
        {"conversations": said("what ?", "")},
        {"video": "x", "conversations": said("what ?")},
    ]
    data = llava(tmp_path, *rows, options="?broken=skip")
    assert len(data.conversations) == 1
    assert data.left_out[0].startswith("2 broken rows of 3 are left out, first row 2, message 2 is an empty answer")
    data = asked(tmp_path, {"answer": "a"}, {"answer": ""}, options="?broken=skip")
    assert len(data.conversations) == 1
    assert data.left_out[0].startswith("1 broken row of 2 is left out, first row 2 has an empty answer")
    with pytest.raises(DataError, match="has 3 broken rows"):
        llava(tmp_path, *[rows[1]] * 3, options="?broken=skip")
    with pytest.raises(UnknownNameError, match="unknown broken 'skp'"):
        llava(tmp_path, *rows, options="?broken=skp")


# --- options and answers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"options": ["a cat", "a dog"]},
        {"choices": ["a cat", "a dog"]},
        {"options": "['a cat', 'a dog']"},
        {"options": '["a cat", "a dog"]'},
        {"options": "['a cat' 'a dog']"},
        {"options": "['a cat'\n 'a dog']"},
        {"options": {"A": "a cat", "B": "a dog", "C": None}},
        {"choices": {"text": ["a cat", "a dog"], "label": ["A", "B"]}},
        {"A": "a cat", "B": "a dog", "C": ""},
    ],
)
def test_options_of_every_form_and_their_answers(row: dict[str, Any], tmp_path: Path) -> None:
    answers = ["a dog", 1, "B", "(B)", "B.", "(b)", "B. a dog", ["a dog"], ["a dog", "a dog"], "['a dog']"]
    data = asked(tmp_path, *(row | {"answer": answer} for answer in answers))
    assert [sample.answer for sample in data] == ["a dog"] * len(answers) == [c.turns[0][1] for c in data.conversations]
    assert {sample.options for sample in data} == {("a cat", "a dog")}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"options": "left|right", "answer": "left"},
            "its `options` is the text 'left|right': expected a list of texts",
        ),
        ({"options": ["a", ""], "answer": "a"}, "has an empty option 2"),
        ({"options": ["a", None], "answer": "a"}, "option 2 is 'None'"),
        ({"options": [True, False], "answer": "a"}, r"option 1 is 'True' \(bool\)"),
        (
            {"options": ["<image 1>", "x"], "answer": "x"},
            "has the option <image 1>, which stands for an image, a video or audio",
        ),
        ({"options": ["a", "b"], "choices": ["b", "a"], "answer": "a"}, "`options` and `choices` that differ"),
        (
            {"options": ["a", "b"], "answer": "c"},
            "the answer 'c' to the options a, b: expected one of them, its index from 0 or its letter",
        ),
        ({"options": ["a", "b"], "answer": 2}, "the answer '2' to the options a, b"),
        ({"options": ["a", "b"], "answer": -1}, "the answer '-1' to the options a, b"),
        (
            {"options": ["a", "b"], "answer": "1"},
            "the answer '1' to the options a, b: .*; answer=index in the spec of the data reads it as the index",
        ),
        (
            {"options": ["left", "right"], "answer": "b"},
            "expected one of them, .* its letter; answer=letter in the spec of the data reads it as the letter",
        ),
        ({"options": {"text": ["x", "y"], "label": 1}, "answer": "x"}, "its `options` has the keys text, label"),
        ({"answer": "a", "category": "\ud800"}, "row 2: its category has half a character"),
        (
            {"options": ["B", "A"], "answer": "A"},
            r"its answer 'A' can mean 'A' \(text\) and 'B' \(letter\): expected answer=text or answer=letter",
        ),
        ({"options": ["1", "2", "3"], "answer": 1}, r"can mean '1' \(text\) and '2' \(index\)"),
        ({"options": [1, 2, 3], "answer": 1}, r"can mean '1' \(text\) and '2' \(index\)"),
        ({"answer": ["a", "b"]}, "has 2 answers"),
        ({"answer": {"text": "a"}}, r"its answer is .* \(dict\): expected a text or a number"),
        ({"answer": True}, r"its answer is 'True' \(bool\)"),
        ({"answer": None}, "has an empty answer"),
        ({"answer": []}, "has an empty answer"),
        ({"answer": float("nan")}, "has an empty answer"),
    ],
)
def test_answers_that_cannot_be_known_are_refused_with_the_row(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message) as error:
        asked(tmp_path, {"answer": "x"}, row)
    assert "row 2" in str(error.value)


@pytest.mark.parametrize(
    "answer", ["it's", "('", "['a dog", "[\\", "'what' she said", '"""', "(\x0c", "['a', 'b' 'c']"]
)
def test_an_answer_that_begins_like_a_list_is_a_text(answer: str, tmp_path: Path) -> None:
    (conversation,) = asked(tmp_path, {"answer": answer}).conversations
    assert conversation.turns[0][1] == answer.strip()


def test_whole_numbers_with_a_fraction_and_empty_questions_are_told_of(tmp_path: Path) -> None:
    data = asked(tmp_path, {"answer": 3.0}, {"answer": 1.5}, {"answer": 3}, {"answer": "a", "question": " "})
    assert [c.turns[0][1] for c in data.conversations] == ["3.0", "1.5", "3", "a"]
    number, question = sorted(data.left_out)
    assert number.startswith("the answer is written with .0") and number.endswith("1 row, first row 1")
    assert question == "the question is empty: 1 row, first row 4"


def test_labels_that_are_numbers_are_no_indices(tmp_path: Path) -> None:
    choices = {"text": ["a cat", "a dog", "a cow"], "label": ["1", "2", "3"]}
    assert asked(tmp_path, {"choices": choices, "answer": "1"})[0].answer == "a cat"
    with pytest.raises(DataError, match=r"'1' can mean 'a dog' \(index\) and 'a cat' \(letter\)"):
        asked(tmp_path, {"choices": choices, "answer": 1})


def test_the_spec_can_say_how_answers_are_meant(tmp_path: Path) -> None:
    rows = [{"options": ["1", "2", "3"], "answer": 1}, {"options": ["1", "2", "3"], "answer": "2"}]
    assert [s.answer for s in asked(tmp_path, *rows, options="?answer=index")] == ["2", "3"]
    assert [s.answer for s in asked(tmp_path, *rows, options="?answer=text")] == ["1", "2"]
    assert [s.answer for s in asked(tmp_path, {"options": ["B", "A"], "answer": "A"}, options="?answer=letter")] == [
        "B"
    ]
    small = {"options": ["left", "right"], "answer": "b"}
    assert asked(tmp_path, small, options="?answer=letter")[0].answer == "right"
    with pytest.raises(DataError, match="expected a letter"):
        asked(tmp_path, *rows, options="?answer=letter")
    assert (
        asked(tmp_path, *rows, options="?answer=index").fingerprint
        != asked(tmp_path, *rows, options="?answer=text").fingerprint
    )


def test_a_text_that_is_an_option_is_that_option() -> None:
    options = options_of("row 1", {"options": ["A", "B", "3", "2020-01-01", "[0.1, 0.2]"]})
    for text in options.texts:
        assert answer_of("row 1", text, options) == text
    assert answer_of("row 1", "[0.1, 0.2]", Options()) == "[0.1, 0.2]"  # a box
    for binary in (b"7", b"yes"):  # no list of numbers
        with pytest.raises(DataError, match=r"its answer is .* \(bytes\): expected a text or a number"):
            answer_of("row 1", binary, Options())
    assert [answer_of("row 1", value, Options()) for value in (3, 1.5, "3.0")] == ["3", "1.5", "3.0"]


# --- ids ---


def test_a_question_has_its_own_id(tmp_path: Path) -> None:
    """Answers in files are joined by it; `drop` and messages about conversations keep the numbers of the rows."""
    row = {"answer": "a cat"}
    data = asked(tmp_path, row | {"id": 3, "question_id": "c"}, row | {"id": 0, "question_id": "a"})
    assert [sample.id for sample in data] == ["3", "0"]
    assert [conversation.id for conversation in data.conversations] == ["1", "2"]
    assert data.left_out == ("column `question_id` is not read: 2 rows, first row 1",)
    other = asked(tmp_path, row | {"id": 3, "question_id": "c"}, row | {"id": 1, "question_id": "a"})
    assert other.fingerprint != data.fingerprint
    assert [sample.id for sample in asked(tmp_path, row | {"id": 3}, row | {"id": 0}, options="?drop=1")] == ["0"]


@pytest.mark.parametrize("ids", [(3, 3), (3, "3"), (3, None), (3, ""), (3, 1.5)])
def test_ids_that_do_not_name_one_question_are_not_read(ids: tuple[Any, ...], tmp_path: Path) -> None:
    rows = [{"answer": "a cat", "id": name} for name in ids]
    data = asked(tmp_path, *rows)
    assert [sample.id for sample in data] == ["1", "2"]
    assert data.left_out[0].startswith("column `id` is not read: ")
    named = asked(tmp_path, *(row | {"question_id": f"q{n}"} for n, row in enumerate(rows)))
    assert [sample.id for sample in named] == ["q0", "q1"]


def test_an_id_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 2: its id has half a character"):
        asked(tmp_path, {"answer": "a cat", "id": "a"}, {"answer": "a cat", "id": "\ud800"})


# --- files of a split -----------------------------------------------------------------------------


def test_files_belong_to_the_splits_that_their_names_say(tmp_path: Path) -> None:
    noise_image(1).save(tmp_path / "1.png")
    for names, other in ((("train2014", "val2014"), "val"), (("training", "testing"), "test")):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            (folder / f"{name}.csv").write_text(f"image,question,answer\n1.png,what ?,{name}\n")
        for split, expected in (("", names[0]), ("train", names[0]), (other, names[1]), (names[1], names[1])):
            option = f"&split={split}" if split else ""
            assert [s.answer for s in load_data(f"hf:{folder}?images={tmp_path}{option}")] == [expected]


def test_a_part_of_a_split_is_read_only_where_the_split_is_not_there(tmp_path: Path) -> None:
    noise_image(1).save(tmp_path / "1.png")
    for name in ("train", "train500", "training_more", "val50"):
        (tmp_path / f"{name}.csv").write_text(f"image,question,answer\n1.png,what ?,{name}\n")
    for split, expected in (("", "train"), ("train", "train"), ("train500", "train500"), ("val", "val50")):
        option = f"?split={split}" if split else ""
        assert [s.answer for s in load_data(f"hf:{tmp_path}{option}")] == [expected]


def test_a_table_without_rows_says_so(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    pd.DataFrame({"image": pd.Series(dtype=str), "question": "", "answer": ""}).to_parquet(tmp_path / "q.parquet")
    with pytest.raises(DataError, match=r"q\.parquet has no rows: expected some"):
        load_data(f"hf:{tmp_path / 'q.parquet'}")


def test_an_option_of_a_spec_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has the option answer twice, text and index: expected it once"):
        asked(tmp_path, {"answer": "a"}, options="?answer=text&answer=index")


# --- cells ----------------------------------------------------------------------------------------

CELLS = ["007", "1.50", "None", "NA", "null", "nan", "True", "FALSE", "1e5", "2020-01-01", "N/A", "-0"]


@pytest.mark.parametrize(("ending", "comma"), [(".csv", ","), (".tsv", "\t")])
def test_cells_are_the_texts_that_stand_there(ending: str, comma: str, tmp_path: Path) -> None:
    noise_image(1).save(tmp_path / "1.png")
    table = tmp_path / f"q{ending}"
    lines = [
        comma.join(("image", "question", "answer", "options")),
        *(comma.join(("1.png", f"{cell} ?", cell, "")) for cell in CELLS),
    ]
    table.write_text("\n".join(["\ufeff" + lines[0], *lines[1:]]))
    data = load_data(f"hf:{table}")
    assert [c.turns[0] for c in data.conversations] == [(f"{cell} ?", cell) for cell in CELLS]
    assert not any(sample.options for sample in data)
    (tmp_path / "q.jsonl").write_text(
        "\n".join(json.dumps({"image": "1.png", "question": "?", "answer": cell}) for cell in CELLS)
    )
    assert [sample.answer for sample in load_data(f"hf:{tmp_path / 'q.jsonl'}")] == CELLS
    table.write_text(f"{lines[0]}\n1.png{comma}what ?\n")
    with pytest.raises(DataError, match="row 1 has 2 cells: expected 4, as in the first line"):
        load_data(f"hf:{table}")
    table.write_text(f"image{comma}image\n")
    with pytest.raises(DataError, match="none of them twice"):
        load_data(f"hf:{table}")


def test_a_table_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    """With the same size and the same time of its last change."""
    datasets = pytest.importorskip("datasets")
    import os

    file = tmp_path / "q.parquet"
    for answer in ("cat", "dog"):
        datasets.Dataset.from_dict({"question": ["what ?"], "answer": [answer]}).to_parquet(file)
        os.utime(file, ns=(1, 1))
        assert load_data(f"hf:{file}").conversations[0].turns == (("what ?", answer),)
