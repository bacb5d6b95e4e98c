"""Rows that `drop` leaves out: every other row stays where it was, in a random subset and on its side of a split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.students import noise_image
from workbench.data import load_data
from workbench.errors import DataError

COUNT = 40
ROW = 17


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA JSON of 40 rows with an image each."""
    folder = tmp_path_factory.mktemp("drop")
    made = []
    for n in range(COUNT):
        noise_image(n, 8, 8).save(folder / f"{n}.png")
        turns = [{"from": "human", "value": "<image>\nwhat is this ?"}, {"from": "gpt", "value": f"cat {n}"}]
        made.append({"id": n, "image": f"{n}.png", "conversations": turns})
    (folder / "mix.json").write_text(json.dumps(made))
    questions = [{"image": f"{n}.png", "question": "what is this ?", "answer": f"cat {n}"} for n in range(COUNT)]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return folder / "mix.json"


def answers(spec: str, limit: int | None = None, *, decode: bool | None = None) -> list[str]:
    return [c.turns[0][1] for c in load_data(spec, limit=limit, seed=3, decode=decode).conversations]


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("kind", ["llava_json", "hf"])
@pytest.mark.parametrize("row", [1, ROW, COUNT])
def test_the_others_of_a_random_subset_stay(kind: str, row: int, decode: bool, file: Path) -> None:
    if kind == "hf":
        pytest.importorskip("datasets")
    spec = f"{kind}:{file if kind == 'llava_json' else file.with_name('q.jsonl')}"
    for limit in (None, 15):
        whole = answers(spec, limit, decode=decode)
        assert answers(f"{spec}?drop={row}", limit, decode=decode) == [a for a in whole if a != f"cat {row - 1}"]


@pytest.mark.parametrize("row", range(1, COUNT, 5))
def test_no_validation_image_is_trained_on(row: int, file: Path) -> None:
    spec = f"llava_json:{file}?held=10&split="
    train, val = answers(f"{spec}train"), answers(f"{spec}val")
    gone = f"cat {row - 1}"
    assert answers(f"{spec}train&drop={row}") == [a for a in train if a != gone]
    assert answers(f"{spec}val&drop={row}") == [a for a in val if a != gone]


@pytest.mark.parametrize("kind", ["llava_json", "hf"])
def test_the_image_of_a_row_that_is_left_out_may_be_gone(kind: str, file: Path, tmp_path: Path) -> None:
    if kind == "hf":
        pytest.importorskip("datasets")
    name = "mix.json" if kind == "llava_json" else "q.jsonl"
    for path in file.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spec = f"{kind}:{tmp_path / name}"
    whole = answers(spec, 15)
    (tmp_path / f"{ROW - 1}.png").unlink()
    with pytest.raises(DataError, match=f"{ROW - 1}.png"):
        load_data(spec, limit=15, seed=3)
    assert answers(f"{spec}?drop={ROW}", 15) == [a for a in whole if a != f"cat {ROW - 1}"]
    (tmp_path / f"{ROW - 1}.png").write_bytes(b"no image")
    assert answers(f"{spec}?drop={ROW}", 15, decode=True) == [a for a in whole if a != f"cat {ROW - 1}"]


def test_equal_images_of_a_row_that_is_left_out_count_once(file: Path, tmp_path: Path) -> None:
    """The same pixels in several files are one image of the limit, whether one of their rows is dropped or not."""
    for n in range(COUNT):
        noise_image(n // 2, 8, 8).save(tmp_path / f"{n}.png")
    (tmp_path / "mix.json").write_bytes(file.read_bytes())
    spec = f"llava_json:{tmp_path / 'mix.json'}"
    whole = answers(spec, 8, decode=True)
    assert len(whole) > 8
    for row in range(1, COUNT + 1):
        assert answers(f"{spec}?drop={row}", 8, decode=True) == [a for a in whole if a != f"cat {row - 1}"]


def test_a_row_that_is_left_out_is_not_counted_as_missing_too(file: Path, tmp_path: Path) -> None:
    (tmp_path / "mix.json").write_bytes(file.read_bytes())
    for n in range(2, COUNT):
        (tmp_path / f"{n}.png").write_bytes((file.parent / f"{n}.png").read_bytes())
    data = load_data(f"llava_json:{tmp_path / 'mix.json'}?missing=skip&drop=1,{ROW}")
    assert len(data.conversations) == COUNT - 3
    assert any(sentence.endswith(f": 1 of {COUNT - 2} rows are left out") for sentence in data.left_out)
    with pytest.raises(DataError, match=r"2 images of mix\.json are not below"):
        load_data(f"llava_json:{tmp_path / 'mix.json'}?missing=skip&drop={','.join(map(str, range(3, COUNT + 1)))}")


def test_a_row_that_cannot_be_read_can_be_left_out(file: Path, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in json.loads(file.read_text())]
    lines[ROW - 1] = "{broken"
    (tmp_path / "mix.jsonl").write_text("\n".join(lines))
    spec = f"llava_json:{tmp_path / 'mix.jsonl'}?images={file.parent}"
    with pytest.raises(DataError, match=f"row {ROW} is not valid JSON"):
        load_data(spec)
    data = load_data(f"{spec}&drop={ROW}")
    assert len(data.conversations) == COUNT - 1
    assert list(data.left_out) == [f"left out by drop: 1 row, first row {ROW}"]
    with pytest.raises(DataError, match=r"drop names row 41, which .*mix\.jsonl does not have"):
        load_data(f"{spec}&drop={ROW},41")
