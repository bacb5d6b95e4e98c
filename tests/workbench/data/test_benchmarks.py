"""Benchmarks in their authors' formats: what is read, and what is said of files that are not quite like that."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from PIL import Image

from workbench.data import load_data
from workbench.data.benchmark_rows import BenchmarkDataset
from workbench.data.mmstar import _split
from workbench.data.mmvp import _options as mmvp_options
from workbench.errors import DataError, UnknownNameError

COLORS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30))


def png(number: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (20 + number, 16), COLORS[number % 4]).save(content, "PNG")
    return content.getvalue()


def jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def parquet(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    pd.DataFrame(list(rows)).to_parquet(file)
    return file


def stored(number: int) -> dict[str, Any]:
    return {"bytes": png(number), "path": f"{number}.png"}


def loaded(spec: str, **options: Any) -> BenchmarkDataset:
    data = load_data(spec, **options)
    assert isinstance(data, BenchmarkDataset)
    return data


# --- POPE -----------------------------------------------------------------------------------------


def pope_folder(folder: Path, questions: int = 4) -> Path:
    """Two images with `questions` questions each, in two splits that share the questions with the answer yes."""
    folder.mkdir(exist_ok=True)
    for number in range(2):
        (folder / f"COCO_{number}.png").write_bytes(png(number))
    for split in ("random", "popular"):
        rows = [
            {
                "question_id": n + 1,
                "image": f"COCO_{n // questions}.png",
                "text": f"Is there a {'dog' if n % 2 == 0 else split} in the image?",
                "label": "yes" if n % 2 == 0 else "no",
            }
            for n in range(2 * questions)
        ]
        jsonl(folder / f"coco_pope_{split}.json", rows)
    return folder


def test_pope_splits_share_their_images(tmp_path: Path) -> None:
    folder = pope_folder(tmp_path / "pope")
    data = loaded(f"pope:{folder}")
    assert data.counts == {"random": 8, "popular": 8}
    assert len(data.scenes) == 2
    assert data.version == "the authors' labels, unknown copy"
    assert data.about.endswith("16 questions about 2 images (random 8, popular 8)")
    assert data[0].options == ("yes", "no")
    assert (data[0].id, data[0].answer, data[1].answer) == ("random-1", "yes", "no")
    assert data[0].image.size == (20, 16)
    one = loaded(f"pope:{folder}?split=popular")
    assert one.counts == {"popular": 8}
    assert one.fingerprint != data.fingerprint == loaded(f"pope:{folder}").fingerprint
    assert loaded(f"pope:{folder / 'coco_pope_random.json'}").counts == {"random": 8}
    assert loaded(f"pope:{folder}", limit=1).counts == {"random": 4, "popular": 4}


def test_the_labels_of_repope_are_named(tmp_path: Path) -> None:
    """By a file, by its folder, or by the spec; a folder further up says nothing."""
    (tmp_path / "pope_and_repope" / "data").mkdir(parents=True)
    far = pope_folder(tmp_path / "pope_and_repope" / "data" / "pope")
    assert loaded(f"pope:{far}").version == "the authors' labels, unknown copy"
    assert loaded(f"pope:{far}?labels=repope").version == "RePOPE's labels, unknown copy"
    near = pope_folder(tmp_path / "RePOPE")
    assert loaded(f"pope:{near}").version == "RePOPE's labels, unknown copy"
    assert loaded(f"pope:{near}?labels=authors").version == "the authors' labels, unknown copy"
    assert loaded(f"pope:{near}").fingerprint != loaded(f"pope:{near}?labels=authors").fingerprint
    (far / "coco_pope_random.json").rename(far / "coco_repope_random.json")
    assert loaded(f"pope:{far}?split=random").version == "RePOPE's labels, unknown copy"
    with pytest.raises(UnknownNameError, match=r"unknown labels of pope 'repop'.*did you mean 'repope'"):
        loaded(f"pope:{near}?labels=repop")


def test_pope_as_a_table_has_splits_as_categories(tmp_path: Path) -> None:
    rows = [
        {"question_id": f"{n}", "question": f"Is there a dog {n}?", "answer": answer, "image": stored(n % 2)}
        | {"category": category}
        for n, (answer, category) in enumerate([("yes", "random,popular"), ("No", "random"), ("no.", "adversarial")])
    ]
    data = loaded(f"pope:{parquet(tmp_path / 'test.parquet', rows)}")
    assert data.counts == {"random": 2, "popular": 1, "adversarial": 1}
    assert [sample.answer for sample in data] == ["yes", "yes", "no", "no"]
    assert {sample.id for sample in data} == {"random-0", "popular-0", "random-1", "adversarial-2"}
    assert data[0].image_id == data[1].image_id == data[3].image_id


def test_what_is_wrong_with_pope_is_one_sentence(tmp_path: Path) -> None:
    folder = pope_folder(tmp_path / "pope")
    with pytest.raises(UnknownNameError, match=r"unknown split of pope 'randm'.*did you mean 'random'"):
        loaded(f"pope:{folder}?split=randm")
    with pytest.raises(DataError, match="has no file of the split adversarial: expected one beside random, popular"):
        loaded(f"pope:{folder}?split=adversarial")
    (folder / "COCO_1.png").unlink()
    with pytest.raises(DataError, match=r"coco_pope_random.json row 5 \(and 7 more rows\): .*COCO_1.png"):
        loaded(f"pope:{folder}")
    rows = [{"question_id": 1, "image": "COCO_0.png", "text": "Is there a dog?", "label": "maybe"}]
    jsonl(folder / "coco_pope_random.json", rows)
    with pytest.raises(DataError, match=r"coco_pope_random\.json row 1 has label 'maybe': expected yes or no"):
        loaded(f"pope:{folder}")
    jsonl(folder / "coco_pope_random.json", [row | {"label": "yes"} for row in rows * 2])
    with pytest.raises(DataError, match="row 1 has the id random-1, which 2 rows have"):
        loaded(f"pope:{folder}?split=random")
    jsonl(folder / "repope_random.json", rows)
    with pytest.raises(DataError, match=r"has coco_pope_random\.json and repope_random\.json: expected one file"):
        loaded(f"pope:{folder}")
    jsonl(folder / "other.json", rows)
    with pytest.raises(DataError, match="names no split: expected random, popular, adversarial in the name"):
        loaded(f"pope:{folder / 'other.json'}")


# --- MME ------------------------------------------------------------------------------------------


def mme_folder(folder: Path) -> Path:
    """One category with images and texts side by side, and one with a folder for each."""
    (folder / "count").mkdir(parents=True)
    (folder / "OCR" / "images").mkdir(parents=True)
    (folder / "OCR" / "questions_answers_YN").mkdir()
    for number, (images, texts) in enumerate(
        [(folder / "count", folder / "count"), (folder / "OCR" / "images", folder / "OCR" / "questions_answers_YN")]
    ):
        (images / "1.png").write_bytes(png(number))
        lines = "Is it red? Please answer yes or no.\tYes\nIs it green? Please answer yes or no.\tNo\n"
        (texts / "1.txt").write_text(lines)
        (images / "._1.png").write_bytes(b"of an archive by macOS")
        (texts / "._1.txt").write_bytes(b"of an archive by macOS")
    return folder


def test_mme_from_its_folders_and_from_a_table_is_the_same(tmp_path: Path) -> None:
    folders = loaded(f"mme:{mme_folder(tmp_path / 'mme')}")
    rows = [
        {"question_id": "1.png", "image": stored(number), "category": category}
        | {"question": f"Is it {color}? Please answer yes or no.", "answer": answer}
        for number, category in enumerate(("count", "OCR"))
        for color, answer in (("red", "Yes"), ("green", "No"))
    ]
    table = loaded(f"mme:{parquet(tmp_path / 'test.parquet', rows)}")
    for data in (folders, table):
        assert data.counts == {"count": 2, "OCR": 2}
        assert [sample.answer for sample in data] == ["yes", "no", "yes", "no"]
        assert [sample.pair for sample in data] == ["count/1.png"] * 2 + ["OCR/1.png"] * 2
    assert [(a.id, a.question, a.image_id) for a in folders] == [(b.id, b.question, b.image_id) for b in table]


def test_a_byte_order_mark_is_no_part_of_a_question(tmp_path: Path) -> None:
    folder = mme_folder(tmp_path / "mme")
    file = folder / "count" / "1.txt"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert {sample.question for sample in loaded(f"mme:{folder}")} == {
        f"Is it {color}? Please answer yes or no." for color in ("red", "green")
    }


@pytest.mark.parametrize("written", ["parquet", "save_to_disk"])
def test_a_benchmark_in_several_files_is_read_whole(written: str, tmp_path: Path) -> None:
    """As `lmms-lab/MME` and others are on the hub: several files of one split, which is not train."""
    parts = [
        [
            {"question_id": f"{number}.png", "image": stored(number), "category": "count"}
            | {"question": f"Is it {color}?", "answer": answer}
            for color, answer in (("red", "Yes"), ("green", "No"))
        ]
        for number in range(2)
    ]
    folder = tmp_path / "MME"
    if written == "parquet":
        (folder / "data").mkdir(parents=True)
        for number, rows in enumerate(parts):
            parquet(folder / "data" / f"test-{number:05d}-of-00002.parquet", rows)
    else:
        table = datasets.Dataset.from_list([row for rows in parts for row in rows])
        datasets.DatasetDict({"test": table}).save_to_disk(str(folder))
    assert loaded(f"mme:{folder}").counts == {"count": 4}


def test_what_is_wrong_with_mme_is_one_sentence(tmp_path: Path) -> None:
    folder = mme_folder(tmp_path / "mme")
    (folder / "count" / "1.txt").write_text("Is it red?\tYes\n")
    with pytest.raises(DataError, match=r"image count/1\.png of .* has 1 questions: expected 2"):
        loaded(f"mme:{folder}")
    for nothing in ("", "\n \n"):
        (folder / "count" / "1.txt").write_text(nothing)
        with pytest.raises(DataError, match=r"image count/1\.png of .* has 0 questions: expected 2"):
            loaded(f"mme:{folder}")
    (folder / "count" / "1.txt").unlink()
    with pytest.raises(DataError, match=r"image count/1\.png of .* has 0 questions: expected 2"):
        loaded(f"mme:{folder}")
    (folder / "count" / "1.txt").write_text("Is it red? Yes\n")
    with pytest.raises(DataError, match=r"count/1\.txt line 1 is 'Is it red\? Yes': expected a question and its"):
        loaded(f"mme:{folder}")
    (folder / "count" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.txt has no image: expected 1\.jpg or \.png"):
        loaded(f"mme:{folder}")
    rows = [{"question_id": "1.png", "image": stored(0), "question": "?", "answer": "Yes", "category": "cuont"}]
    with pytest.raises(UnknownNameError, match=r"row 1 'cuont'.*did you mean 'count'"):
        loaded(f"mme:{parquet(tmp_path / 'test.parquet', rows)}")


@pytest.mark.parametrize("name", ["cuont", "Count"])
def test_a_folder_of_mme_with_another_name_is_refused(name: str, tmp_path: Path) -> None:
    """Its questions would be missing in the total."""
    folder = mme_folder(tmp_path / "mme")
    (folder / "eval_tool").mkdir()
    (folder / "eval_tool" / "existence.txt").write_text("what a model answered")
    assert len(loaded(f"mme:{folder}")) == 4
    (folder / "count").rename(folder / name)
    with pytest.raises(UnknownNameError, match=rf"folder in .* '{name}'.*did you mean 'count'"):
        loaded(f"mme:{folder}")


def test_texts_of_mme_are_utf_8(tmp_path: Path) -> None:
    folder = mme_folder(tmp_path / "mme")
    (folder / "count" / "1.txt").write_bytes("Is it a café?\tYes\nIs it red?\tNo\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"count/1\.txt is not UTF-8 \(.*\): expected a text file"):
        loaded(f"mme:{folder}")


# --- MMVP -----------------------------------------------------------------------------------------


def mmvp_folder(folder: Path, index: str = "Index") -> Path:
    (folder / "MMVP Images").mkdir(parents=True)
    lines = [f"{index},Question,Options,Correct Answer"]
    for number in (1, 2, 99, 100):
        (folder / "MMVP Images" / f"{number}.jpg").write_bytes(png(number))
        answer = "(a)" if number % 2 else "(b)"
        lines.append(f'{number},"Is it open, or closed?",(a) Open (b) Closed,{answer}')
    (folder / "Questions.csv").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("index", ["Index", "lndex"])
def test_mmvp_labels_are_corrected_by_index(tmp_path: Path, index: str) -> None:
    folder = mmvp_folder(tmp_path / "mmvp", index)
    data = loaded(f"mmvp:{folder}")
    assert [sample.answer for sample in data] == ["Open", "Closed", "Closed", "Open"]
    assert [sample.pair for sample in data] == ["0", "0", "49", "49"]
    assert data[0].options == ("Open", "Closed")
    assert data.version == "corrected labels, unknown copy"
    original = loaded(f"mmvp:{folder}?labels=original")
    assert [sample.answer for sample in original] == ["Open", "Closed", "Open", "Closed"]
    assert original.fingerprint != data.fingerprint
    rows = [
        {"Index": number, "Question": "Is it open?", "Options": "(a) Open (b) Closed", "image": stored(number)}
        | {"Correct Answer": "(b)" if number == 99 else "(a)"}
        for number in (99, 100)
    ]
    already = loaded(f"mmvp:{parquet(tmp_path / 'train.parquet', rows)}")
    assert [sample.answer for sample in already] == ["Closed", "Open"]


@pytest.mark.parametrize("first", [0, 1])
def test_mmvp_of_vlmevalkit_counts_from_0_or_1(tmp_path: Path, first: int) -> None:
    """Rows 99 and 100 have exchanged labels, wherever the file begins to count; pairs are (1, 2), (3, 4), ..."""
    cells = [
        [n + first, base64.b64encode(png(n)).decode(), "Is it open?", "Open", "Closed", "AB"[n % 2]] for n in range(100)
    ]
    table = pd.DataFrame(cells, columns=["index", "image", "question", "A", "B", "answer"])
    table.to_csv(tmp_path / "MMVP.tsv", sep="\t", index=False)
    data = loaded(f"mmvp:{tmp_path / 'MMVP.tsv'}")
    assert [sample.answer for sample in list(data)[:4]] == ["Open", "Closed", "Open", "Closed"]
    assert [(sample.id, sample.answer) for sample in list(data)[98:]] == [("99", "Closed"), ("100", "Open")]
    assert [sample.pair for sample in data] == [str(n // 2) for n in range(100)]
    table[50:].to_csv(tmp_path / "part.tsv", sep="\t", index=False)
    with pytest.raises(DataError, match=rf"part.tsv has index from {50 + first}: expected all rows, with index from 0"):
        loaded(f"mmvp:{tmp_path / 'part.tsv'}")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("(a) Open (b) Closed", ("Open", "Closed")),
        ("(A) 007 (B) 1.50", ("007", "1.50")),
        ("(a) cup(s) (b) bottle(s)", ("cup(s)", "bottle(s)")),
        ("(a)NA(b)None (of these)", ("NA", "None (of these)")),
        ("(a) x (b) y (c) z", ("x", "y", "z")),
    ],
)
def test_mmvp_options_are_split_at_their_letters(text: str, options: tuple[str, ...]) -> None:
    assert mmvp_options("row 1", text) == options


@pytest.mark.parametrize(
    "text", ["", "Open", "(a) Open", "(b) Open (a) Closed", "(a) x (b) y (d) z", "(a) (b) y", "x (a) y (b) z"]
)
def test_mmvp_options_in_another_form_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="expected a text such as"):
        mmvp_options("row 1", text)


def test_what_is_wrong_with_mmvp_is_one_sentence(tmp_path: Path) -> None:
    folder = mmvp_folder(tmp_path / "mmvp")
    with pytest.raises(UnknownNameError, match="labels of mmvp 'corected'"):
        loaded(f"mmvp:{folder}?labels=corected")
    file, header = folder / "Questions.csv", "Index,Question,Options,Correct Answer\n"
    for row, message in (
        ("1,Is it?,(a) Open (c) Closed,(a)", r"row 1 has the options '\(a\) Open \(c\) Closed'"),
        ("1,Is it?,(a) Open (b) Closed,(c)", r"row 1 has the answer '\(c\)': expected a letter from A to B"),
        ("0,Is it?,(a) Open (b) Closed,(a)", "row 1 has Index '0': expected a number from 1"),
        ("1,,(a) Open (b) Closed,(a)", "row 1 has Question '': expected a text"),
        ("7,Is it?,(a) Open (b) Closed,(a)", r"row 1: 1 image of mmvp is not below .*7\.jpg"),
    ):
        file.write_text(header + row)
        with pytest.raises(DataError, match=message):
            loaded(f"mmvp:{folder}")
    file.write_text("Index,Question,Correct Answer\n1,Is it?,(a)\n")
    with pytest.raises(DataError, match="has no column Options: expected it beside Index, Question, Correct Answer"):
        loaded(f"mmvp:{folder}")


# --- CV-Bench and MMStar --------------------------------------------------------------------------


def cv_bench_rows(tasks: Sequence[str], choices: Any = None) -> list[dict[str, Any]]:
    return [
        {
            "idx": number,
            "type": "2D",
            "task": task,
            "question": f"How many {number}?",
            "choices": ["2", "1", "12"] if choices is None else choices,
            "answer": "(C)",
            "prompt": f"How many {number}? Select from the following choices.\n(A) 2\n(B) 1\n(C) 12",
            "filename": f"img/{number}.png",
            "source": ("ADE20K", "COCO")[number % 2],
        }
        for number, task in enumerate(tasks)
    ]


def test_cv_bench_from_parquet_and_json_lines_is_the_same(tmp_path: Path) -> None:
    two, three = cv_bench_rows(["Count", "Relation"]), cv_bench_rows(["Depth"])
    (tmp_path / "lines" / "img").mkdir(parents=True)
    (tmp_path / "tables").mkdir()
    for number in range(2):
        (tmp_path / "lines" / "img" / f"{number}.png").write_bytes(png(number))
    for name, rows in (("test_2d", two), ("test_3d", three)):
        jsonl(tmp_path / "lines" / f"{name}.jsonl", rows)
        parquet(tmp_path / "tables" / f"{name}.parquet", [row | {"image": stored(row["idx"])} for row in rows])
    lines, tables = (loaded(f"cv_bench:{tmp_path / name}") for name in ("lines", "tables"))
    for data in (lines, tables):
        assert data.counts == {"Count": 1, "Relation": 1, "Depth": 1}
        assert data[0].options == ("2", "1", "12")
        assert {sample.answer for sample in data} == {"12"}
        assert [sample.source for sample in data] == ["ADE20K", "COCO", "ADE20K"]
        assert data.prompts["Count-0"].endswith("(C) 12")
    assert list(lines) == list(tables)
    assert loaded(f"cv_bench:{tmp_path / 'lines'}?part=2d").counts == {"Count": 1, "Relation": 1}
    assert loaded(f"cv_bench:{tmp_path / 'tables' / 'test_3d.parquet'}").counts == {"Depth": 1}


def test_a_table_of_letters_with_a_gap_is_refused(tmp_path: Path) -> None:
    """The answer C would be the option D otherwise."""
    image = base64.b64encode(png(0)).decode()
    row = {"index": 0, "image": image, "question": "How many?", "answer": "C", "A": "1", "B": "", "C": "2", "D": "3"}
    more = {"category": "count", "task": "Count", "prompt": "p", "source": "COCO"}
    pd.DataFrame([row | more]).to_csv(tmp_path / "CV-Bench-2D.tsv", sep="\t", index=False)
    with pytest.raises(DataError, match="row 1 has the options A, C, D: expected letters from A without a gap"):
        loaded(f"cv_bench:{tmp_path / 'CV-Bench-2D.tsv'}")


@pytest.mark.parametrize("choices", ["lack", []])
def test_cv_bench_without_options_is_one_sentence(choices: Any, tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    for number in range(2):
        (tmp_path / "img" / f"{number}.png").write_bytes(png(number))
    rows = cv_bench_rows(["Count", "Count"])
    rows[1] |= {"choices": choices}
    if choices == "lack":
        del rows[1]["choices"]
    jsonl(tmp_path / "test_2d.jsonl", rows)
    with pytest.raises(DataError, match="row 2 has no options: expected some"):
        loaded(f"cv_bench:{tmp_path}")


def test_a_table_of_letters_without_images_is_one_sentence(tmp_path: Path) -> None:
    image = base64.b64encode(png(0)).decode()
    row = {"index": 0, "image": image, "question": "How many?", "answer": "A", "A": "1", "B": "2", "category": "count"}
    row |= {"task": "Count", "prompt": "p", "source": "COCO"}
    file = tmp_path / "test_2d.jsonl"
    for number, other in enumerate(({"image": "0"}, {"image": None}, {})):
        second = {name: value for name, value in row.items() if name != "image"} | {"index": 1} | other
        rows = [row | {"image": None}, second] if number == 0 else [row, second]
        with pytest.raises(DataError, match=r"row 2 has (the image 0: expected the index|0 images)"):
            loaded(f"cv_bench:{jsonl(file, rows)}")


def test_texts_of_a_benchmark_are_valid(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "0.png").write_bytes(png(0))
    (row,) = cv_bench_rows(["Count"])
    jsonl(tmp_path / "test_2d.jsonl", [row | {"question": "How many \ud800?"}])
    with pytest.raises(DataError, match="row 1: its question has half a character"):
        loaded(f"cv_bench:{tmp_path}")


def test_cv_bench_options_may_be_the_text_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "0.png").write_bytes(png(0))
    jsonl(tmp_path / "test_2d.jsonl", cv_bench_rows(["count"], choices="['2', '1', '007']"))
    data = loaded(f"cv_bench:{tmp_path}")
    assert data[0].options == ("2", "1", "007")
    assert data[0].answer == "007"
    assert data[0].category == "Count"
    jsonl(tmp_path / "test_2d.jsonl", cv_bench_rows(["Count"], choices=["2", "1"]))
    with pytest.raises(DataError, match=r"row 1 has the answer '\(C\)': expected a letter from A to B"):
        loaded(f"cv_bench:{tmp_path}")
    with pytest.raises(UnknownNameError, match="part of cv_bench '4d'"):
        loaded(f"cv_bench:{tmp_path}?part=4d")


def test_mmstar_options_in_the_question_or_in_columns(tmp_path: Path) -> None:
    common = {"category": "math", "l2_category": "geometry", "answer": "B"}
    end = "\nOptions: A: 30, B: 1.50, C: a cat, a dog, D: None"
    rows = [{"index": n, "question": f"What is {n}?{end}", "image": stored(n), **common} for n in range(2)]
    data = loaded(f"mmstar:{parquet(tmp_path / 'mmstar.parquet', rows)}")
    columns = ["index", "image", "question", "A", "B", "C", "D", "answer", "category", "l2_category"]
    cells = [
        [n, base64.b64encode(png(n)).decode(), f"What is {n}?", "30", "1.50", "a cat, a dog", "None"] for n in range(2)
    ]
    cells = [[*row, "B", "math", "geometry"] for row in cells]
    pd.DataFrame(cells, columns=columns).to_csv(tmp_path / "MMStar.tsv", sep="\t", index=False)
    written = loaded(f"mmstar:{tmp_path / 'MMStar.tsv'}")
    assert list(data) == list(written)
    assert data[0].options == ("30", "1.50", "a cat, a dog", "None")
    assert (data[0].question, data[0].answer, data[0].source) == ("What is 0?", "1.50", "geometry")
    assert data.prompts["0"] == f"What is 0?{end}"
    assert not written.prompts
    rows[1]["question"] = "What?\nOptions: A: , B: y"
    with pytest.raises(DataError, match="row 2 has an empty option A: expected a text"):
        loaded(f"mmstar:{parquet(tmp_path / 'mmstar.parquet', rows)}")


def test_mmstar_questions_without_options_are_left_as_they_are() -> None:
    assert _split("Which?\nOptions: A: x. B: y") == ("Which?", ("x", "y"))
    assert _split("Which? Options: A: vitamin C. and D, B: E. coli") == ("Which?", ("vitamin C. and D", "E. coli"))
    assert _split("Which? Options: A. 1, B. 2") == ("Which?", ("1", "2"))
    assert _split("What Options: are there?") == ("What Options: are there?", ())
    assert _split("Which? Options: B: x, A: y") == ("Which? Options: B: x, A: y", ())


# --- What's Up and GQA ----------------------------------------------------------------------------


LINKS = {"left_of": "to the left of", "right_of": "to the right of", "in-front_of": "in front of"}


def whatsup_photographs(folder: Path, relations: Sequence[str], file: str) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, relation in enumerate(relations):
        name = f"coffee_mug_{relation}_table"
        (folder / "images" / f"{name}.jpeg").write_bytes(png(number))
        order = sorted(relations, key=lambda other: other != relation)
        captions = [f"A coffee mug {LINKS.get(other, other)} a table" for other in order]
        rows.append({"image_path": f"data/images/{name}.jpeg", "caption_options": captions})
    (folder / file).write_text(json.dumps(rows))
    return folder


def whatsup_captions(folder: Path, file: str, captions: Sequence[tuple[str, str]]) -> Path:
    (folder / "val2017").mkdir(parents=True, exist_ok=True)
    for number in range(len(captions)):
        (folder / "val2017" / f"{number:012d}.jpg").write_bytes(png(number))
    (folder / file).write_text(json.dumps([[number, *pair] for number, pair in enumerate(captions)]))
    return folder


@pytest.mark.parametrize(
    ("subset", "file", "relations", "answers"),
    [
        (
            "a",
            "controlled_images_dataset.json",
            ("on", "under", "left_of", "right_of"),
            ("on", "under", "left", "right"),
        ),
        (
            "b",
            "controlled_clevr_dataset.json",
            ("left_of", "right_of", "in-front_of", "behind"),
            ("left", "right", "front", "behind"),
        ),
    ],
)
def test_whatsup_photographs(
    tmp_path: Path, subset: str, file: str, relations: Sequence[str], answers: Sequence[str]
) -> None:
    data = loaded(f"whatsup:{whatsup_photographs(tmp_path, relations, file)}?subset={subset}")
    assert [sample.answer for sample in data] == list(answers)
    assert data[0].options == tuple(answers)
    assert data[0].question == "Where is the coffee mug in relation to the table?"
    assert {sample.source for sample in data} == {"coffee mug, table"}
    assert len({sample.pair for sample in data}) == 2
    assert data[0].pair == data[1].pair != data[2].pair == data[3].pair
    assert data.benchmark == f"whatsup {subset}"
    of_captions = loaded(f"whatsup:{tmp_path}?subset={subset}&options=captions")
    assert [sample.options for sample in of_captions] == [tuple(answers)] * 4
    with pytest.raises(UnknownNameError, match="options of whatsup 'caption'"):
        loaded(f"whatsup:{tmp_path}?subset={subset}&options=caption")
    rows = json.loads((tmp_path / file).read_text())
    rows[1]["caption_options"][-1] = "A coffee mug and a table"  # leaving it out would raise the chance level
    (tmp_path / file).write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"row 2 has the captions .*: expected another relation in each"):
        loaded(f"whatsup:{tmp_path}?subset={subset}&options=captions")
    rows[0]["caption_options"] = ["A coffee mug", "A table"]
    (tmp_path / file).write_text(json.dumps(rows))
    with pytest.raises(DataError, match=rf"row 1 has the captions .*: expected that of {answers[0]} and another one"):
        loaded(f"whatsup:{tmp_path}?subset={subset}&options=captions")


def test_whatsup_captions_and_prompts(tmp_path: Path) -> None:
    captions = [
        ("A photo of a dog on the right.", "A photo of a dog on the left."),
        ("A photo of a traffic light on the top", "A photo of a traffic light on the bottom"),
    ]
    folder = whatsup_captions(tmp_path, "coco_qa_one_obj.json", captions)
    data = loaded(f"whatsup:{folder / 'coco_qa_one_obj.json'}")
    assert [(sample.answer, sample.question) for sample in data] == [
        ("right", "Where in the image is the dog?"),
        ("top", "Where in the image is the traffic light?"),
    ]
    captions = [
        ("A photo of a cat to the left of an old dog", "A photo of a cat to the right of an old dog"),
        ("A photo of a lamp above a bed", "A photo of a lamp below a bed"),
    ]
    whatsup_captions(tmp_path, "coco_qa_two_obj.json", captions)
    prompts = jsonl(
        tmp_path / "prompts.jsonl",
        [
            {"id": 0, "question": "USER: Where is the cat?", "answer": ["Left"]},
            {"question": "lamp?", "answer": "Above"},
        ],
    )
    data = loaded(f"whatsup:{folder}?subset=coco_two&prompts={prompts}")
    assert [sample.answer for sample in data] == ["left", "above"]
    assert [sample.question for sample in data] == ["Where is the cat?", "lamp?"]
    assert data.version == "the authors' labels, unknown copy, prompts of prompts.jsonl (unknown copy)"
    assert data[0].options == ("left", "right", "above", "below")
    both = loaded(f"whatsup:{folder}?subset=coco_two&options=captions")
    assert both[0].question == "Where is the cat in relation to the old dog?"
    assert [sample.options for sample in both] == [("left", "right"), ("above", "below")]
    assert both[0].chance == 0.5
    assert data.prompts == {"1": "USER: Where is the cat?", "2": "lamp?"}
    prompts.write_text(prompts.read_text().replace("Above", "Below"))
    with pytest.raises(DataError, match=r"prompts\.jsonl row 2 has the answer 'Below', but .* row 2 has above"):
        loaded(f"whatsup:{folder}?subset=coco_two&prompts={prompts}")
    whatsup_captions(tmp_path, "coco_qa_two_obj.json", captions[:1])
    with pytest.raises(DataError, match="has 2 prompts for 1 rows"):
        loaded(f"whatsup:{folder}?subset=coco_two&prompts={prompts}")


def test_what_is_wrong_with_whatsup_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"subset of whatsup 'coco_tow'.*did you mean 'coco_two'"):
        loaded(f"whatsup:{tmp_path}?subset=coco_tow")
    with pytest.raises(DataError, match=r"coco_qa_one_obj\.json does not exist"):
        loaded(f"whatsup:{tmp_path}?subset=coco_one")
    folder = whatsup_captions(tmp_path, "coco_qa_one_obj.json", [("A photo of a dog", "A photo of a cat")])
    with pytest.raises(DataError, match="row 1 has the captions 'A photo of a dog' and 'A photo of a cat'"):
        loaded(f"whatsup:{folder}?subset=coco_one")
    whatsup_photographs(tmp_path, ["behind"], "controlled_images_dataset.json")
    with pytest.raises(DataError, match="row 1 has the relation behind: expected on, under, left, right"):
        loaded(f"whatsup:{folder}?subset=a")


def gqa_row(**changed: str) -> dict[str, str]:
    row = {"question_id": "091057558", "img_id": "7", "question": "Is the cup to the left or to the right of the box?"}
    row |= {"answer": "left", "true option": "left", "false option": "right", "image_w": "200", "image_h": "100"}
    row |= {"object1 name": "cup", "object1 x": "20", "object1 y": "10", "object1 w": "40", "object1 h": "20"}
    row |= {"object2 name": "box", "object2 x": "150", "object2 y": "50", "object2 w": "60", "object2 h": "50"}
    return row | changed


def test_gqa_relations_have_both_boxes(tmp_path: Path) -> None:
    (tmp_path / "7.jpg").write_bytes(png(0))
    file = tmp_path / "gqa.csv"
    pd.DataFrame([gqa_row()]).to_csv(file, index=False)
    data = loaded(f"gqa_relation:{file}")
    assert data[0].id == "091057558"
    assert data[0].options == ("left", "right")
    assert [obj.name for obj in data[0].objects] == ["cup", "box"]
    assert data[0].objects[0].box == pytest.approx((0.1, 0.1, 0.3, 0.3))
    assert data[0].objects[1].box == pytest.approx((0.75, 0.5, 1.0, 1.0))
    assert data[0].asked == data[0].objects
    for changed, message in (
        ({"answer": "front"}, "has the answer 'front': expected one of its two options"),
        ({"object1 w": "0"}, "has the box 20, 10, 0, 20 in an image of 200 x 100 pixels"),
        ({"object2 x": "a"}, "has object2 x 'a': expected a number of pixels"),
    ):
        pd.DataFrame([gqa_row(**changed)]).to_csv(file, index=False)
        with pytest.raises(DataError, match=message):
            loaded(f"gqa_relation:{file}")
    pd.DataFrame([gqa_row()]).drop(columns="object1 name").to_csv(file, index=False)
    with pytest.raises(DataError, match="has no column object1 name"):
        loaded(f"gqa_relation:{file}")
