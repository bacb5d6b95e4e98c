"""One image with a question: the question is what was written, the image upright, and a wrong file one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workbench.data import load_data
from workbench.data.folder import QUESTION
from workbench.errors import DataError


def picture(width: int = 30, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("tail", "question"),
    [
        ("?question=what is left of the mug ?", "what is left of the mug ?"),
        ("?question=cat & dog, a=b?question=no?", "cat & dog, a=b?question=no?"),
        ("?question=  wie groß ist 100% ?\n", "wie groß ist 100% ?"),
        ("", QUESTION),
    ],
)
def test_everything_after_the_mark_is_the_question(tail: str, question: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    data = load_data(f"image:{tmp_path / 'a.png'}{tail}")
    (sample,) = data.samples
    assert (sample.question, sample.answer, sample.options) == (question, "", ())
    assert np.array_equal(np.array(sample.image), np.array(picture()))


def test_question_and_pixels_make_another_data_set_and_a_copy_does_not(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.png")
    picture(31).save(tmp_path / "c.png")
    specs = ["a.png?question=one ?", "b.png?question=one ?", "a.png?question=two ?", "c.png?question=one ?"]
    prints = [load_data(f"image:{tmp_path}/{spec}").fingerprint for spec in specs]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_files_of_every_kind_are_read_upright_from_their_first_frame(tmp_path: Path) -> None:
    turned = picture()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert load_data(f"image:{tmp_path}/turned.png").samples[0].image.size == (20, 30)
    first, second = (Image.new("RGB", (9, 5), color) for color in ("red", "blue"))
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    assert load_data(f"image:{tmp_path}/moving.gif").samples[0].image.getpixel((0, 0)) == (255, 0, 0)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_data(f"image:{tmp_path}/clear.png").samples[0].image.getpixel((0, 0)) == (255, 255, 255)
    picture().save(tmp_path / "what?question=x.png")
    assert load_data(f"image:{tmp_path}/what?question=x.png").samples[0].question == QUESTION


def test_a_wrong_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("<html>not found</html>")
    (tmp_path / "empty.jpg").touch()
    cut = tmp_path / "cut.jpg"
    picture(200, 200).save(cut)
    cut.write_bytes(cut.read_bytes()[:900])
    Image.new("1", (20000, 10000)).save(tmp_path / "huge.png")  # 200 megapixels
    os.mkdir(tmp_path / "folder")
    picture().save(tmp_path / "a.png")
    for spec, message in {
        "none.png?question=what?": "none.png' does not exist: expected image:FILE",
        "folder?question=what?": "is a folder: expected image:FILE",
        "text.png": "text.png cannot be read",
        "empty.jpg?question=a ?": "empty.jpg cannot be read",
        "cut.jpg": "cut.jpg cannot be read",
        "huge.png": "huge.png",
        "a.png?question= ": "a.png' has an empty question: expected text after",
        "a.png?prompt=what": "does not exist",
    }.items():
        with pytest.raises(DataError) as caught:
            load_data(f"image:{tmp_path}/{spec}")
        assert message in str(caught.value), spec
        assert len(str(caught.value)) < 300 + len(str(tmp_path))
        assert "\n" not in str(caught.value)


def test_a_replaced_file_is_noticed(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    data = load_data(f"image:{tmp_path}/a.png")
    picture(31).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="has been replaced"):
        _ = data.samples[0].image
