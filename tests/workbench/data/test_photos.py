"""The photographic world: its pictures are the pinned ones, scenes are the same everywhere, and nothing can be learnt
from the text alone."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.conftest import SMALL, recipe, run
from tests.worlds import answer_p_value, assert_at_chance, hashes_in_fresh_processes, load_or_skip
from trainer.build.toy_llava import build_processor
from trainer.model_config import ModelConfig
from workbench.data import Dataset, asked_object, load_data, sources
from workbench.data.photos import CATEGORIES, OBJECTS, SIZE, STAMPS, cut_out, object_name
from workbench.data.scenes import CENTER_MARGIN, RELATION_MARGIN
from workbench.data.sources import source_folder
from workbench.errors import DataError, PackageError, UnknownNameError


@pytest.fixture(scope="module")
def train() -> Dataset:
    return load_or_skip("photos:train", limit=2500)


@pytest.fixture(scope="module")
def test() -> Dataset:
    return load_or_skip("photos:test")


@pytest.fixture(scope="module")
def val() -> Dataset:
    return load_or_skip("photos:val", limit=100)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with eight cut-outs of the user's own, one of which has two pictures: discs of different colours on
    nothing."""
    folder = tmp_path / "own"
    folder.mkdir()
    for number, name in enumerate(
        ("Fire Engine", "mug-1", "mug-2", "sofa", "lamp", "vase", "bowl", "tea-cup", "plate")
    ):
        picture = Image.new("RGBA", (40, 30))
        ImageDraw.Draw(picture).ellipse((4, 4, 35, 25), fill=(20 * number, 255 - 20 * number, 90, 255))
        picture.save(folder / f"{name}.png")
    return folder


@pytest.mark.slow
def test_scenes_are_the_same_in_every_process_and_order(val: Dataset) -> None:
    assert len(hashes_in_fresh_processes("photos:val")) == 1
    few = load_data("photos:val", limit=5)
    assert few.scenes[3][0].image.tobytes() == val.scenes[3][0].image.tobytes()
    assert [s.question for s in few.scenes[3]] == [s.question for s in val.scenes[3]]


def test_splits_share_no_scene(val: Dataset) -> None:
    splits = [load_data(f"photos:{split}", limit=30) for split in ("train", "val", "test")]
    pictures = [scene[0].image.tobytes() for data in splits for scene in data.scenes]
    assert len(set(pictures)) == len(pictures) == 90
    assert len({data.fingerprint for data in splits}) == 3
    assert load_data("photos:val", limit=1, seed=1)[0].image.tobytes() != val[0].image.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("category", CATEGORIES)
def test_answers_are_balanced(category: str, train: Dataset) -> None:
    assert answer_p_value(train, category) > 1e-4


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_text_only_model_is_at_chance(category: str, train: Dataset, test: Dataset) -> None:
    assert_at_chance(train, test, category)


def test_the_test_of_chance_sees_a_leak(train: Dataset, test: Dataset) -> None:
    """A world in which existence can be guessed from the name fails it."""
    leaky = [
        replace(s, answer="yes" if s.question.split()[1] < "k" else "no") if s.category == "exist" else s
        for s in [*train, *test]
    ]
    with pytest.raises(AssertionError, match=r"exist: .*chance 0\.5"):
        assert_at_chance(leaky[: len(train)], leaky[len(train) :], "exist")


def test_answers_are_true_of_the_objects(val: Dataset) -> None:
    seen = Counter()
    for sample in val:
        times = Counter(o.name for o in sample.objects)
        centres = {o.name: ((o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2) for o in sample.objects}
        words = sample.question.split()
        assert sample.answer in sample.options
        assert sample.category in CATEGORIES
        seen[sample.category] += 1
        if sample.category == "count":
            assert times[words[2]] == int(sample.answer)
        elif sample.category == "exist":
            assert (words[1] in times) == (sample.answer == "yes")
        elif sample.category.startswith("furthest"):
            axis, sign = int(sample.category.endswith("y")), -1 if words[3] in ("left", "up") else 1
            found = sorted((sign * (o.box[axis] + o.box[axis + 2]) / 2, o.name) for o in sample.objects)
            assert found[-1][1] == sample.answer
            assert len(sample.options) == len(OBJECTS)
            assert len(found) == 1 or found[-1][0] - found[-2][0] > RELATION_MARGIN - 1 / SIZE
        else:
            axis = int(sample.category.endswith("y"))
            low = {"position_x": "left", "position_y": "top", "relation_x": "left", "relation_y": "above"}
            name, *other = [word for word in words if word in OBJECTS]
            assert times[name] == 1
            if sample.category.startswith("position"):
                offset, least = centres[name][axis] - 0.5, CENTER_MARGIN
                assert (sample.answer == low[sample.category]) == (offset < 0)
            elif sample.category.startswith("relation"):
                assert times[other[0]] == 1
                offset, least = centres[name][axis] - centres[other[0]][axis], RELATION_MARGIN
                assert (sample.answer == low[sample.category]) == (offset < 0)
            else:
                others = [o for o in sample.objects if o.name != name]
                gaps = [(o.box[axis] + o.box[axis + 2]) / 2 - centres[name][axis] for o in others]
                sign = -1 if words[2] in ("left", "above") else 1
                assert [o.name for o, gap in zip(others, gaps, strict=True) if sign * gap > 0] == [sample.answer]
                assert any(sign * gap < 0 for gap in gaps)
                assert name not in sample.options
                assert len(sample.options) == len(OBJECTS) - 1
                offset, least = min(gaps, key=abs), RELATION_MARGIN
            assert abs(offset) > least - 1 / SIZE  # a box stands on whole pixels
    assert set(seen) == set(CATEGORIES)


def test_masks_fill_their_boxes_and_lie_where_the_picture_shows_the_thing(val: Dataset) -> None:
    for scene in val.scenes[:25]:
        masks = np.stack([o.mask for o in scene[0].objects])
        assert masks.shape[1:] == (SIZE, SIZE)
        assert masks.dtype == bool
        assert (masks.sum(axis=0) <= 1).all()
        for thing, mask in zip(scene[0].objects, masks, strict=True):
            rows, columns = np.nonzero(mask)
            left, top, right, bottom = (round(v * SIZE) for v in thing.box)
            assert columns.min() >= left
            assert columns.max() < right
            assert rows.min() >= top
            assert rows.max() < bottom
            gaps = (columns.min() - left, right - 1 - columns.max(), rows.min() - top, bottom - 1 - rows.max())
            assert max(gaps) <= 3, (thing, gaps)
    lemons = [(s[0], o) for s in val.scenes for o in s[0].objects if o.name == "lemon"]
    for sample, lemon in lemons[:5]:
        red, green, blue = np.asarray(sample.image)[lemon.mask].mean(axis=0)
        assert red > 150
        assert green > 130
        assert blue < 120


def test_the_asked_object_is_found(val: Dataset) -> None:
    named = [s for s in val if s.category.startswith("position")]
    assert all((thing := asked_object(s)) is not None and thing.name in s.question.split() for s in named)


def test_every_word_is_one_token_of_the_word_tokenizer(val: Dataset, own: Path) -> None:
    for data in (val, load_data(f"photos:val:{own}", limit=40)):
        tokenizer = build_processor(ModelConfig(), sorted(data.vocabulary)).tokenizer
        for sample in data:
            ids = tokenizer(f"{sample.question} {sample.answer}", add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert len(ids) == len(sample.question.split()) + 1


@pytest.mark.slow
def test_a_folder_of_own_cut_outs_is_a_world_of_its_own(own: Path) -> None:
    data = load_or_skip(f"photos:train:{own}", limit=200)
    assert {o.name for s in data for o in s.objects} == {
        "fire_engine",
        "mug",
        "sofa",
        "lamp",
        "vase",
        "bowl",
        "tea_cup",
        "plate",
    }
    assert len(hashes_in_fresh_processes(f"photos:val:{own}")) == 1
    before = data.fingerprint
    Image.open(own / "sofa.png").transpose(Image.Transpose.ROTATE_90).save(own / "sofa.png")
    assert load_data(f"photos:train:{own}", limit=200).fingerprint != before


def test_a_turned_cut_out_stands_upright(own: Path) -> None:
    exif, file = Image.Exif(), own / "sofa.png"
    exif[0x0112] = 6  # to be turned a quarter clockwise when it is shown
    upright = cut_out(file)
    with Image.open(file) as image:
        image.rotate(90, expand=True).save(own / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(cut_out(own / "turned.png")), np.asarray(upright))


def test_names_are_one_word() -> None:
    stems = ("Fire Engine", "tea-cup_2", "mug3", "Käse (alt)", "7")
    assert [object_name(Path(f"{stem}.png")) for stem in stems] == [
        "fire_engine",
        "tea_cup",
        "mug",
        "käse_alt",
        "",
    ]


def test_folders_that_give_no_world_are_one_sentence(own: Path, tmp_path: Path) -> None:
    for name, picture, message in (
        ("left", Image.new("RGBA", (40, 40)), r"left\.png would be called 'left', a word of the questions"),
        ("sofa2", Image.new("RGB", (40, 40)), r"sofa2\.png has no transparent pixel: expected a cut-out"),
        ("sofa3", Image.new("RGBA", (40, 40)), r"sofa3\.png shows next to nothing"),
    ):
        picture.save(own / f"{name}.png")
        with pytest.raises(DataError, match=message):
            load_data(f"photos:val:{own}")
        (own / f"{name}.png").unlink()
    (own / "sofa4.png").write_text("no picture")
    with pytest.raises(DataError, match=r"sofa4\.png cannot be read"):
        load_data(f"photos:val:{own}")
    (own / "sofa4.png").unlink()
    (own / "vase.png").unlink()
    with pytest.raises(DataError, match="has 7 differently named cut-outs: expected at least 8"):
        load_data(f"photos:val:{own}")
    with pytest.raises(DataError, match="does not exist"):
        load_data(f"photos:val:{tmp_path / 'none'}")
    with pytest.raises(UnknownNameError, match=r"unknown split of photos 'vall': .*did you mean 'val'"):
        load_data("photos:vall")


def test_changed_pictures_are_caught(val: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / STAMPS.name
    shutil.copytree(source_folder(STAMPS), copy)
    monkeypatch.setenv("VIRAL_DATA", str(tmp_path))
    source_folder.cache_clear()
    assert source_folder(STAMPS) == copy
    shutil.copy(copy / OBJECTS["mug"], copy / OBJECTS["owl"])
    source_folder.cache_clear()
    with pytest.raises(DataError, match=f"expected {STAMPS.digest}; delete the folder"):
        source_folder(STAMPS)
    source_folder.cache_clear()


def test_without_the_package_there_is_one_sentence_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> str:
        raise PackageError("package tuxpaint-stamps-default could not be downloaded (no network)")

    monkeypatch.setenv("VIRAL_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "unpack_deb", refuse)
    source_folder.cache_clear()
    with pytest.raises(
        DataError,
        match=(
            r"tuxpaint-stamps: package .* could not be downloaded \(no network\); put the folder"
            r" usr/share/tuxpaint/stamps"
        ),
    ):
        source_folder(STAMPS)
    assert list((tmp_path / "data").iterdir()) == []
    source_folder.cache_clear()


def test_licences_name_every_picture() -> None:
    from workbench.data.photos import BACKGROUNDS

    assert all(re.search(rf"\b{name}\b", STAMPS.licence) for name in OBJECTS)
    assert all(file.stem in BACKGROUNDS.licence for file in BACKGROUNDS.files(source_folder(BACKGROUNDS)))


@pytest.mark.slow
def test_the_recipe_trains_by_the_real_command_line(val: Dataset, tmp_path: Path) -> None:
    words = [*SMALL, "--optim.steps", "2", "--data.limit_train", "12", "--data.limit_val", "40"]
    done = run("trainer", recipe("baseline", "photos"), "--stage1", "None", "--output_dir", str(tmp_path / "b"), *words)
    assert "neighbour_x" in done.stdout
    typo = run(
        "trainer",
        recipe("baseline", "photos"),
        "--stage1",
        "None",
        "--output_dir",
        str(tmp_path / "c"),
        "--data.val",
        "photo:val",
        code=2,
    )
    assert "did you mean 'photos'" in typo.stderr
    assert "Traceback" not in typo.stderr
