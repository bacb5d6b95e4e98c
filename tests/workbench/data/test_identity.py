"""What counts as one image: rows, files and copies of one image are one, a limit counts images, and images are known by
what they hold."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.worlds import load_or_skip
from trainer.evaluation import summary
from workbench.data import images as door
from workbench.data import load_data
from workbench.data.conversations import mixed
from workbench.data.selection import rows_of_images, subset
from workbench.errors import UnknownNameError

IMAGES, QUESTIONS = 12, 3


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8))


def questions(root: Path, names: list[str]) -> Path:
    """JSON lines of several questions of each image, those of one image far from each other."""
    root.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        if not (root / name).exists():
            noise(number).save(root / name)
    rows = [
        {"image": name, "question": f"what {'a ' * q}?", "answer": "yes", "options": ["yes", "no"]}
        for q in range(QUESTIONS)
        for name in names
    ]
    file = root / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def chats(root: Path, names: list[str]) -> Path:
    """The same as conversations, between texts alone."""
    file = questions(root, names)
    rows = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        said = [{"from": "human", "value": f"<image>\n{row['question']}"}, {"from": "gpt", "value": "yes"}]
        rows += [
            {"image": row["image"], "conversations": said},
            {"conversations": [{"from": "human", "value": "and now ?"}, said[1]]},
        ]
    (root / "mix.json").write_text(json.dumps(rows))
    return root / "mix.json"


def table(root: Path, names: list[str]) -> Path:
    """The same as a table that holds the images."""
    datasets = import_module("datasets") if os.environ.get("CI") else pytest.importorskip("datasets")
    rows = [json.loads(line) for line in questions(root, names).read_text().splitlines()]
    columns = {key: [row[key] for row in rows] for key in ("question", "answer", "options")}
    whole = datasets.Dataset.from_dict(
        {"image": [{"bytes": (root / row["image"]).read_bytes(), "path": None} for row in rows], **columns}
    )
    whole.cast_column("image", datasets.Image(decode=False)).to_parquet(root / "train.parquet")
    return root / "train.parquet"


def spec_of(kind: str, root: Path, names: list[str]) -> str:
    if kind == "folder":
        questions(root, names)
        return f"folder:{root}"
    if kind == "table":
        return f"hf:{table(root, names)}"
    return f"llava_json:{chats(root, names)}" if kind == "llava_json" else f"hf:{questions(root, names)}"


NAMES = [f"{n}.bmp" for n in range(IMAGES)]
ON_DISK = ["folder", "hf", "table", "llava_json"]


# --- limits ---------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.data())
def test_a_subset_lies_within_every_larger_one(count: int, seed: int, data: st.DataObject) -> None:
    small, large = sorted(data.draw(st.lists(st.integers(1, 50), min_size=2, max_size=2)))
    few, many = subset(count, small, seed), subset(count, large, seed)
    assert set(few) <= set(many) <= set(subset(count, None, seed)) == set(range(count))
    assert few == sorted(few)
    assert len(few) == min(small, count)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30), st.integers(0, 1000), st.integers(1, 4))
def test_rows_of_a_limit_are_nested_and_show_that_many_images(places: list[int], seed: int, copies: int) -> None:
    """Where places `p` and `p + 1` may hold the same pixels: a limit counts pixels."""
    total = len({place // copies for place in places})
    before: set[int] = set()
    for limit in range(1, total + 2):
        rows = rows_of_images(places, limit, seed, lambda row: places[row] // copies)
        assert before <= set(rows)
        assert rows == sorted(rows)
        assert len({places[row] // copies for row in rows}) == min(limit, total)
        assert all(other in rows for row in rows for other in range(len(places)) if places[other] == places[row])
        before = set(rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*ON_DISK, "shapes:val", "easy_vqa:val", "photos:val"])
@pytest.mark.parametrize("decode", [None, False])
def test_every_data_set_is_nested_over_its_limits_and_counts_images(
    kind: str, decode: bool | None, tmp_path: Path
) -> None:
    spec = spec_of(kind, tmp_path / "w", NAMES) if kind in ON_DISK else kind
    before: set[str] = set()
    for limit in (1, 2, 5, 11):
        data = load_or_skip(spec, limit=limit, seed=3, decode=decode)
        texts = [c.id for c in data.conversations if not c.loads] if kind == "llava_json" else []
        units = {scene[0].image_id for scene in data.scenes} | set(texts)  # a text alone counts as one image does
        assert len(units) == limit
        assert before <= units
        before = units
    if kind in ON_DISK:
        whole = load_data(spec, decode=decode)
        assert before <= {sample.image_id for sample in whole} | {
            c.id for c in (whole.conversations if kind == "llava_json" else ())
        }


# --- one image ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hf", "table", "llava_json"])
@pytest.mark.parametrize("decode", [None, False])
def test_all_questions_of_an_image_are_one_scene(kind: str, decode: bool | None, tmp_path: Path) -> None:
    data = load_data(spec_of(kind, tmp_path / "w", NAMES), decode=decode)
    assert len(data.scenes) == IMAGES
    assert all(len(scene) == QUESTIONS for scene in data.scenes)
    assert len({s.id for s in data}) == IMAGES * QUESTIONS
    few = load_data(spec_of(kind, tmp_path / "w", NAMES), limit=5, decode=decode)
    assert all(len(scene) == QUESTIONS for scene in few.scenes)


def test_files_with_equal_pixels_are_one_image_where_they_are_looked_at(tmp_path: Path) -> None:
    names = ["a.png", "b.png", "c.bmp", "d.png"]
    for kind in ("hf", "table", "llava_json"):
        root = tmp_path / kind
        root.mkdir()
        noise(0).save(root / "a.png")
        shutil.copy(root / "a.png", root / "b.png")
        noise(0).save(root / "c.bmp")  # other bytes
        spec = spec_of(kind, root, names)
        looked, unseen = load_data(spec), load_data(spec, decode=False)
        assert [len(scene) for scene in looked.scenes] == [3 * QUESTIONS, QUESTIONS]
        assert len(unseen.scenes) == (4 if kind != "table" else 3)  # of a table all bytes are read
        for limit in (1, 2):
            assert len({s.image_id for s in load_data(spec, limit=limit)} - {""}) <= limit
    assert (
        load_data(f"hf:{tmp_path / 'hf' / 'q.jsonl'}")[0].image_id
        == load_data(f"hf:{tmp_path / 'table' / 'train.parquet'}")[0].image_id
    )


def test_links_to_one_file_are_one_image_without_a_look(tmp_path: Path) -> None:
    root = tmp_path / "w"
    root.mkdir()
    noise(0).save(root / "a.png")
    (root / "b.png").symlink_to(root / "a.png")
    os.link(root / "a.png", root / "c.png")
    assert len(load_data(f"hf:{questions(root, ['a.png', './b.png', 'c.png', 'd.png'])}", decode=False).scenes) == 2


def test_rows_of_one_image_are_held_out_together(tmp_path: Path) -> None:
    file = chats(tmp_path / "w", NAMES)
    train, val = (load_data(f"llava_json:{file}?split={split}&held=20", decode=False) for split in ("train", "val"))
    assert not {s.image_id for s in train} & {s.image_id for s in val}
    assert len(train.conversations) + len(val.conversations) == 2 * IMAGES * QUESTIONS
    assert len(val.scenes) + sum(not c.loads for c in val.conversations) == 20


def test_an_image_with_two_names_is_held_out_under_both(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    file = chats(tmp_path, ["a.png", "link.png", "b.png", "c.png"])
    for held in range(1, 11):
        train, val = (load_data(f"llava_json:{file}?split={split}&held={held}") for split in ("train", "val"))
        assert not {s.image_id for s in train} & {s.image_id for s in val}
        assert len(train.conversations) + len(val.conversations) == len(load_data(f"llava_json:{file}").conversations)


def test_the_interval_of_a_loss_resamples_images() -> None:
    """Five conversations about each image, all alike, say no more than one."""
    losses = np.random.default_rng(0).normal(3, 1, 20)
    once = pd.DataFrame({"id": range(20), "image_id": range(20), "tokens": 7, "lm_loss": losses, "chance": 5.0})
    often = pd.concat([once.assign(id=once["id"] + 100 * copy) for copy in range(5)], ignore_index=True)
    single, several = (summary(table, 0).iloc[0] for table in (once, often))
    assert (several["low"], several["high"]) == pytest.approx((single["low"], single["high"]))
    assert several["lm_loss"] == pytest.approx(losses.mean())


# --- known by content -----------------------------------------------------------------------------


def replace_pixels(file: Path, seed: int, *, keep_time: bool) -> None:
    """Other pixels in as many bytes; with the old time of change, as `cp -p` and archives leave it."""
    stat = file.stat()
    noise(seed).save(file)
    assert file.stat().st_size == stat.st_size
    if keep_time:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("decode", [None, False])
@pytest.mark.parametrize("kind", ["folder", "hf", "llava_json"])
def test_twenty_of_twenty_replaced_images_are_noticed(
    kind: str, decode: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRAL_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "w"
    spec = spec_of(kind, root, NAMES)
    seen = {load_data(spec, decode=decode).fingerprint}
    for opening in range(20):
        file = root / NAMES[opening % IMAGES]
        replace_pixels(file, 100 + opening, keep_time=bool(opening % 2))
        seen.add(load_data(spec, decode=decode).fingerprint)
        assert len(seen) == opening + 2
    first, second = (root / name for name in NAMES[:2])  # the same images in another order
    aside = root / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    seen.add(load_data(spec, decode=decode).fingerprint)
    assert len(seen) == 22


@pytest.mark.parametrize("decode", [None, False])
@pytest.mark.parametrize("kind", ON_DISK)
def test_what_does_not_matter_changes_no_fingerprint(kind: str, decode: bool | None, tmp_path: Path) -> None:
    """The folder's name, times, inodes; a limit that leaves nothing out."""
    before = load_data(spec_of(kind, tmp_path / "w", NAMES), decode=decode)
    shutil.copytree(tmp_path / "w", tmp_path / "elsewhere", copy_function=shutil.copyfile)
    os.utime(tmp_path / "elsewhere" / NAMES[0], (1, 1))
    spec = before.name.replace(str(tmp_path / "w"), str(tmp_path / "elsewhere"))
    assert (
        load_data(spec, decode=decode).fingerprint
        == before.fingerprint
        == load_data(spec, limit=1000, seed=5, decode=decode).fingerprint
    )


def test_nothing_is_decoded_of_a_training_set_and_its_files_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRAL_CACHE", str(tmp_path / "cache"))
    spec = spec_of("llava_json", tmp_path / "w", NAMES)
    old = 1_000_000_000
    for name in NAMES:
        os.utime(tmp_path / "w" / name, (old, old))
    files = import_module("workbench.data.image_files")
    read: list[Path] = []
    count: Callable[[Path], bytes] = files._hash
    monkeypatch.setattr(files, "_hash", lambda path: read.append(path) or count(path))
    monkeypatch.setattr(files, "RECENT", -(10**15))  # as if all had been written long ago
    monkeypatch.setattr(door, "_look", lambda *_: pytest.fail("decoded"))
    data = load_data(spec, decode=False)
    assert not read, "nothing is read before the fingerprint is asked for"
    both = mixed([data, data], [1.0, 1.0])
    assert not read
    _ = data.fingerprint, both.fingerprint, load_data(spec, decode=False).fingerprint
    assert len(read) == IMAGES
    replaced = tmp_path / "w" / NAMES[3]
    replaced.write_bytes(replaced.read_bytes()[:-1] + b"?")
    os.utime(replaced, (old, old))
    assert load_data(spec, decode=False).fingerprint != data.fingerprint
    assert len(read) == IMAGES + 1


def test_a_hint_is_not_trusted_while_its_file_may_still_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is written twice within a tick of the clock has the same hints."""
    monkeypatch.setenv("VIRAL_CACHE", str(tmp_path / "cache"))
    files = import_module("workbench.data.image_files")
    noise(0).save(tmp_path / "1.bmp")
    stored = files.image_files(tmp_path, ["1.bmp"])
    before = files.file_hashes(stored, "toy")
    noise(1).save(tmp_path / "1.bmp")
    assert files.file_hashes(stored, "toy") != before, "the same hints, and another content"


def test_a_damaged_list_of_hashes_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRAL_CACHE", str(tmp_path / "cache"))
    spec = spec_of("llava_json", tmp_path / "w", NAMES)
    before = load_data(spec, decode=False).fingerprint
    for file in (tmp_path / "cache" / "images").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert load_data(spec, decode=False).fingerprint == before


# --- specs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["R&D", "what?", "a=b", "x?images=y", "50%", "q?split=val", "plain"])
def test_a_spec_names_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    root = home / name
    home.mkdir()
    file = chats(root, NAMES[:2])
    monkeypatch.setenv("HOME", str(home))
    elsewhere = shutil.copy(file, tmp_path / "mix.json")
    escaped = str(root).replace("%", "%25").replace("?", "%3F").replace("&", "%26").replace("=", "%3D")
    for spec in (
        f"llava_json:{file}",
        f"llava_json:~/{name}/mix.json",
        f"llava_json:{escaped}/mix.json",
        f"llava_json:{file}?split=val&held=3",
        f"llava_json:{elsewhere}?images={root}",
        f"llava_json:{elsewhere}?images=~/{name}",
        f"llava_json:{elsewhere}?split=all&images={root}",
        f"llava_json:{elsewhere}?images={root}&missing=skip",
        f"llava_json:{elsewhere}?images={escaped}",
        f"folder:{root}",
        f"folder:~/{name}",
        f"folder:{escaped}",
    ):
        assert load_data(spec).conversations if spec.startswith("llava_json") else len(load_data(spec)) == 2
    with pytest.raises(UnknownNameError, match="did you mean 'images'"):
        load_data(f"llava_json:{file}?imags={root}")
