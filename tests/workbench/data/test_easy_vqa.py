"""easy-VQA: the authors' images, questions and split as they are, a validation split of ours, and how much of it the
text gives away."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import SMALL, recipe, run
from tests.worlds import hashes_in_fresh_processes, load_or_skip, text_only
from trainer.build.toy_llava import build_processor
from trainer.model_config import ModelConfig
from workbench.data import Dataset, load_data
from workbench.data.easy_vqa import OPTIONS, SOURCE, category_of
from workbench.data.sources import source_folder
from workbench.errors import DataError, UnknownNameError
from workbench.stats import bootstrap_ci


@pytest.fixture(scope="module")
def splits() -> dict[str, Dataset]:
    return {split: load_or_skip(f"easy_vqa:{split}") for split in ("train", "val", "test")}


@pytest.mark.slow
def test_rows_are_the_authors_own(splits: dict[str, Dataset]) -> None:
    """The counts in the authors' README, every row once and word for word, and no image in two splits."""
    assert len(splits["train"]) + len(splits["val"]) == 38575
    assert len(splits["test"]) == 9673
    assert [len(splits[split].scenes) for split in ("train", "val", "test")] == [3500, 500, 1000]
    for part, names in (("train", ("train", "val")), ("test", ("test",))):
        rows = json.loads((source_folder(SOURCE) / part / "questions.json").read_text())
        ours = [(s.question, s.answer, int(s.image_id.split("-")[1])) for name in names for s in splits[name]]
        assert sorted(map(tuple, rows)) == sorted(ours)
    images = [{s.image_id for s in data} for data in splits.values()]
    assert not images[0] & images[1]
    assert not images[0] & images[2]
    assert not images[1] & images[2]
    assert len({s.id for data in splits.values() for s in data}) == 38575 + 9673


def test_images_are_those_the_questions_are_about(splits: dict[str, Dataset]) -> None:
    """The colour of the pixels that differ from the ground is the one that the questions name."""
    rgb = {
        "black": (0, 0, 0),
        "blue": (0, 0, 255),
        "brown": (150, 75, 0),
        "gray": (128, 128, 128),
        "green": (0, 128, 0),
        "red": (255, 0, 0),
    }
    rgb |= {"teal": (0, 128, 128), "yellow": (255, 255, 0)}
    right = []
    for scene in splits["test"].scenes[:200]:
        for sample in [s for s in scene if s.category == "colour"][:1]:
            pixels = np.asarray(sample.image).reshape(-1, 3).astype(int)
            assert sample.image.size == (64, 64)
            ground = pixels[0]
            drawn = pixels[np.abs(pixels - ground).sum(1) > 120]
            colour = np.median(drawn, axis=0)
            right.append(min(rgb, key=lambda name: np.abs(np.array(rgb[name]) - colour).sum()) == sample.answer)
    assert np.mean(right) > 0.9
    assert len(right) > 100


def test_chance_is_what_the_text_alone_gives_away(splits: dict[str, Dataset]) -> None:
    """Not ours to balance, so measured: chance covers what a table from question text to its most frequent answer
    reaches, which is far above .5."""
    for name in ("val", "test"):
        for category, options in OPTIONS.items():
            asked = [s for s in splits[name] if s.category == category]
            interval = bootstrap_ci(text_only(splits["train"], asked), groups=[s.image_id for s in asked], level=0.999)
            (chance,) = {s.chance for s in asked}
            assert interval.low <= chance <= interval.high and chance >= 1 / len(options), (
                f"{category}: {chance}, {interval}"
            )
            assert (chance > 0.8) == (len(options) == 2)


def test_types_and_options(splits: dict[str, Dataset]) -> None:
    assert all(s.answer in s.options and s.options == OPTIONS[s.category] for data in splits.values() for s in data)
    assert category_of("does the image not contain a gray shape?", "yes") == "yes_no_negated"
    assert category_of("is no circle present?", "no") == "yes_no_negated"
    assert category_of("is there a circle?", "no") == "yes_no"
    assert category_of("what is the blue shape?", "circle") == "shape"
    with pytest.raises(DataError, match="answer 'pink' to 'what color is it\\?' is of no known type"):
        category_of("what color is it?", "pink")


@pytest.mark.slow
def test_the_same_in_every_process_and_a_limit_is_a_subset(splits: dict[str, Dataset]) -> None:
    assert len(hashes_in_fresh_processes("easy_vqa:val")) == 1
    few, other = load_data("easy_vqa:val", limit=20), load_data("easy_vqa:val", limit=20, seed=1)
    assert len(few.scenes) == 20
    assert {s.id for s in few} <= {s.id for s in splits["val"]}
    assert few.fingerprint != other.fingerprint
    assert few.vocabulary == splits["train"].vocabulary


def test_every_word_is_one_token_of_the_word_tokenizer(splits: dict[str, Dataset]) -> None:
    tokenizer = build_processor(ModelConfig(), sorted(splits["val"].vocabulary)).tokenizer
    for text in {f"{s.question} {s.answer}" for s in splits["test"]}:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == len(text.split())


def test_images_are_rgb(splits: dict[str, Dataset]) -> None:
    assert isinstance(splits["val"][0].image, Image.Image)
    assert splits["val"][0].image.mode == "RGB"


def test_bad_splits_name_what_exists() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown split of easy_vqa 'tets': .*did you mean 'test'"):
        load_data("easy_vqa:tets")


@pytest.mark.slow
def test_the_recipe_trains_by_the_real_command_line(splits: dict[str, Dataset], tmp_path: object) -> None:
    words = [*SMALL, "--optim.steps", "2", "--data.limit_train", "12", "--data.limit_val", "12"]
    done = run("trainer", recipe("baseline", "easy_vqa"), "--output_dir", f"{tmp_path}/b", *words)
    assert "yes_no_negated" in done.stdout
