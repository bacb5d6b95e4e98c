"""The laptop world: deterministic, disjoint splits, and nothing to be learnt from the text alone."""

import numpy as np
import pytest

from tests.worlds import answer_p_value, assert_at_chance, hashes_in_fresh_processes
from workbench.data import Dataset, load_data
from workbench.data.shapes import CATEGORIES, COLORS, SHAPES, SIZE, draw_scene, layout
from workbench.errors import DataError, UnknownNameError


@pytest.mark.slow
def test_scenes_are_the_same_in_every_process_and_order() -> None:
    assert len(hashes_in_fresh_processes("shapes:val")) == 1
    assert draw_scene("val", 0, 3).tobytes() == load_data("shapes:val", limit=5).scenes[3][0].image.tobytes()


def test_splits_share_no_scene() -> None:
    pictures = [draw_scene(split, 0, i).tobytes() for split in ("train", "val", "test") for i in range(60)]
    assert len(set(pictures)) == len(pictures)
    assert draw_scene("val", 0, 0).tobytes() != draw_scene("val", 1, 0).tobytes()


@pytest.fixture(scope="module")
def train() -> Dataset:
    return load_data("shapes:train", limit=3000)


@pytest.mark.slow
@pytest.mark.parametrize("category", CATEGORIES)
def test_answers_are_balanced_given_the_text(category: str, train: Dataset) -> None:
    """Chi-square over answers, with the options renamed so that all question texts of a type can be pooled."""
    assert answer_p_value(train, category) > 1e-4


@pytest.mark.slow
def test_a_text_only_model_is_at_chance(train: Dataset) -> None:
    test = load_data("shapes:test")
    for category in CATEGORIES:
        assert_at_chance(train, test, category)


def test_answers_are_true_of_the_objects() -> None:
    for sample in load_data("shapes:val", limit=80):
        names = [o.name.split() for o in sample.objects]
        assert sample.answer in sample.options
        if sample.category == "count":
            word = sample.question.split()[2]
            assert sum(word in name for name in names) == int(sample.answer)
        if sample.category == "exist":
            assert (sample.question.split()[1:3] in names) == (sample.answer == "yes")
        if sample.category in ("colour", "shape"):
            word = sample.question.split()[3]
            (name,) = [name for name in names if word in name]
            assert sample.answer in name
        if sample.category == "relation_x":
            first, second = sample.question.split()[1], sample.question.split()[6]
            centre = {
                w: (o.box[0] + o.box[2]) / 2 for o in sample.objects for w in o.name.split() if w in (first, second)
            }
            assert (sample.answer == "left") == (centre[first] < centre[second])


def test_masks_lie_in_boxes_and_do_not_overlap() -> None:
    for scene in load_data("shapes:val", limit=40).scenes:
        masks = [o.mask for o in scene[0].objects]
        assert (np.sum(masks, axis=0) <= 1).all()
        for thing in scene[0].objects:
            rows, columns = np.nonzero(thing.mask)
            left, top, right, bottom = (v * SIZE for v in thing.box)
            gaps = np.abs([columns.min() - left, columns.max() - right, rows.min() - top, rows.max() - bottom])
            assert gaps.max() <= 2.5  # a star's tip is thinner than a pixel


def test_every_number_of_objects_color_and_shape_occurs() -> None:
    scenes = [layout("train", 0, i) for i in range(300)]
    assert {len(s) for s in scenes} == {1, 2, 3, 4, 5, 6}
    assert {i.color for s in scenes for i in s} == set(COLORS)
    assert {i.shape for s in scenes for i in s} == set(SHAPES)


def test_bad_specs_name_what_exists() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown data set 'shape': .*did you mean 'shapes'"):
        load_data("shape:val")
    with pytest.raises(UnknownNameError, match=r"unknown split of shapes 'vall': .*did you mean 'val'"):
        load_data("shapes:vall")
    with pytest.raises(DataError, match="limit is 0"):
        load_data("shapes:val", limit=0)
