"""Pictures as users have them: every mode reads as upright RGB, the same for models and VFMs, and a bad one is one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workbench.data.images import read_image, upright_rgb
from workbench.errors import DataError


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


def test_grey_cmyk_and_palettes_keep_their_colours(photo: Image.Image, tmp_path: Path) -> None:
    for mode, suffix in (("L", "png"), ("CMYK", "tif"), ("P", "png"), ("1", "png"), ("I;16", "png")):
        photo.convert("L").convert(mode).save(tmp_path / f"{mode[0]}.{suffix}")
        read = read_image(tmp_path / f"{mode[0]}.{suffix}")
        assert read.mode == "RGB" and read.size == photo.size
    assert np.array_equal(np.asarray(read_image(tmp_path / "L.png"))[..., 0], np.asarray(photo.convert("L")))


def test_sixteen_bits_keep_their_shades_and_unknown_whites_are_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(4, 0)
    for name, levels in (("deep.png", ramp), ("deep.tif", ramp), ("wide.tif", ramp.astype(np.int32))):
        Image.fromarray(levels).save(tmp_path / name)
        assert np.abs(np.asarray(read_image(tmp_path / name))[0, :, 0].astype(int) - np.arange(256)).max() <= 1
    Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32)[None]).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif cannot be read .*expected 8 or 16 bits"):
        read_image(tmp_path / "float.tif")


def test_transparency_lies_on_white(photo: Image.Image, tmp_path: Path) -> None:
    clear = photo.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    assert (np.asarray(read_image(tmp_path / "clear.png")) == 255).all()
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0] * 768)
    palette.save(tmp_path / "palette.png", transparency=3)
    assert (np.asarray(read_image(tmp_path / "palette.png")) == 255).all()


def test_a_turned_photograph_is_upright_and_a_film_is_its_first_frame(photo: Image.Image, tmp_path: Path) -> None:
    turned, exif = photo.rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise when it is shown
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png")), np.asarray(photo))
    assert np.array_equal(np.asarray(upright_rgb(Image.open(tmp_path / "turned.png"))), np.asarray(photo))
    photo.save(tmp_path / "film.png", save_all=True, append_images=[Image.new("RGB", photo.size)])
    assert np.array_equal(np.asarray(read_image(tmp_path / "film.png")), np.asarray(photo))


def test_bad_pictures_are_one_sentence(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"image .*cut\.png cannot be read"):
        read_image(tmp_path / "cut.png")
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"image .*text\.jpg cannot be read"):
        read_image(tmp_path / "text.jpg")


def test_a_picture_of_a_hundred_megapixels_is_read_and_a_larger_one_refused(tmp_path: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    assert read_image(tmp_path / "large.png").size == (10_000, 10_000)
    Image.new("1", (12_000, 12_000)).save(tmp_path / "larger.png")
    with pytest.raises(DataError, match=r"larger\.png cannot be read .*decompression bomb"):
        read_image(tmp_path / "larger.png")
