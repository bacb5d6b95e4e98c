"""Images as users have them: every mode reads as upright RGB, the same for models and VFMs, and a bad one is one
sentence, wherever it lies."""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from io import BytesIO
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image

from workbench.data import load_data
from workbench.data.image_files import walk
from workbench.data.images import embedded, image_size, read_image, readable, upright_rgb
from workbench.errors import DataError


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


def test_grey_cmyk_and_palettes_keep_their_colours(photo: Image.Image, tmp_path: Path) -> None:
    for mode, suffix in (("L", "png"), ("CMYK", "tif"), ("P", "png"), ("1", "png"), ("I;16", "png")):
        photo.convert("L").convert(mode).save(tmp_path / f"{mode[0]}.{suffix}")
        read = read_image(tmp_path / f"{mode[0]}.{suffix}")
        assert read.mode == "RGB"
        assert read.size == photo.size
    assert np.array_equal(np.asarray(read_image(tmp_path / "L.png"))[..., 0], np.asarray(photo.convert("L")))


def test_sixteen_bits_keep_their_shades_and_unknown_whites_are_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(4, 0)
    for name, levels in (("deep.png", ramp), ("deep.tif", ramp), ("wide.tif", ramp.astype(np.int32))):
        Image.fromarray(levels).save(tmp_path / name)
        assert np.abs(np.asarray(read_image(tmp_path / name))[0, :, 0].astype(int) - np.arange(256)).max() <= 1
    for brightest in (200, 300):  # of 65535, in a portable graymap
        header = b"P5 2 1 65535\n"
        (tmp_path / "dark.pgm").write_bytes(header + np.array([100, brightest], ">u2").tobytes())
        assert np.asarray(read_image(tmp_path / "dark.pgm")).max() == 1
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_in_the_header_is_that_of_the_upright_image(kind: str, orientation: int) -> None:
    content, exif = BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(content, kind, exif=exif)
    upright = (20, 30) if orientation >= 5 else (30, 20)
    assert image_size(content.getvalue()) == read_image(content.getvalue()).size == upright


def test_bad_pictures_are_one_sentence(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"image .*cut\.png cannot be read"):
        read_image(tmp_path / "cut.png")
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"image .*text\.jpg cannot be read"):
        read_image(tmp_path / "text.jpg")


@pytest.mark.slow
def test_a_picture_of_a_hundred_megapixels_is_read_and_a_larger_one_refused(tmp_path: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    assert read_image(tmp_path / "large.png").size == (10_000, 10_000)
    Image.new("1", (12_000, 12_000)).save(tmp_path / "larger.png")
    with pytest.raises(DataError, match=r"larger\.png cannot be read .*decompression bomb"):
        read_image(tmp_path / "larger.png")


# --- one door for all of them ---------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(image: Image.Image, *before: bytes) -> bytes:
    """A PNG with chunks between its header and its pixels."""
    stream = BytesIO()
    image.save(stream, format="PNG")
    whole = stream.getvalue()
    return whole[:33] + b"".join(before) + whole[33:]


def jpeg(image: Image.Image, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with segments at its beginning."""
    stream = BytesIO()
    image.save(stream, format="JPEG", quality=95)
    whole = stream.getvalue()
    return (
        whole[:2]
        + b"".join(b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data for marker, data in segments)
        + whole[2:]
    )


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8))


def ways(data: bytes, folder: Path) -> Iterator[Callable[[], Image.Image]]:
    """The same bytes as a file, inside a parquet file, as base64 text of a column, and as a data: URL of LLaVA's
    layout."""
    (folder / "one.png").write_bytes(data)
    yield lambda: read_image(folder / "one.png")
    code = base64.b64encode(data).decode()
    row = {
        "image": f"data:image/png;base64,{code}",
        "conversations": [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "a cat"}],
    }
    (folder / "mix.json").write_text(json.dumps([row]))
    yield lambda: load_data(f"llava_json:{folder / 'mix.json'}").conversations[0].images[0]
    datasets = pytest.importorskip("datasets") if not os.environ.get("CI") else import_module("datasets")
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": data, "path": None}], "question": ["what ?"], "answer": ["a cat"]}
    )
    table.cast_column("image", datasets.Image(decode=False)).to_parquet(folder / "train.parquet")
    yield lambda: load_data(f"hf:{folder / 'train.parquet'}").samples[0].image
    # as text without a head, bytes are an image by what they begin with
    if data[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe1"):
        (folder / "q.jsonl").write_text(json.dumps({"image": code, "question": "what ?", "answer": "a cat"}))
        yield lambda: load_data(f"hf:{folder / 'q.jsonl'}").samples[0].image


def test_good_pixels_are_read_whatever_surrounds_them(tmp_path: Path) -> None:
    plain = noise()
    big = b"p\0\0" + zlib.compress(bytes(3 << 20))
    torn = chunk(b"tEXt", b"a\0b")[:-1] + b"?"  # a checksum that is wrong
    for data in (png(plain, chunk(b"iCCP", big)), png(plain, chunk(b"zTXt", big)), png(plain, torn)):
        for look in ways(data, tmp_path):
            assert np.array_equal(np.asarray(look()), np.asarray(plain))
    turn = chunk(b"eXIf", b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0))
    for look in ways(png(plain, turn, torn), tmp_path):  # what says how it is turned is kept
        assert np.array_equal(np.asarray(look()), np.rot90(np.asarray(plain), -1))


def test_a_broken_exif_block_does_not_hide_the_pixels_and_a_whole_one_turns_them(tmp_path: Path) -> None:
    plain = noise()
    stream = BytesIO()
    plain.save(stream, format="JPEG", quality=95)
    pixels = np.asarray(Image.open(stream).convert("RGB"))
    head = b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 1, 0x0112, 3, 1)
    for block, turned in (
        (head + struct.pack("<HHI", 6, 0, 0), True),
        (head[:-3], False),
        (head + b"\xff" * 8, False),
        (b"Exif\0\0II*\0\xff\xff\xff\xff", False),
    ):
        xmp = (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>\xa8\xff")
        for look in ways(jpeg(plain, (0xE1, block), xmp), tmp_path):
            assert np.array_equal(np.asarray(look()), np.rot90(pixels, -1) if turned else pixels)
        assert image_size(tmp_path / "one.png") == ((40, 60) if turned else (60, 40))


def bad() -> dict[str, tuple[bytes, str]]:
    """Bytes that are no image, and what is said of them."""
    whole = png(noise())
    at = whole.index(b"IDAT") + 2000
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 13_000, 1, 0, 0, 0, 0)) + whole[33:]
    return {
        "bomb": (bomb, "pixels"),
        "cut": (whole[:at], "truncated"),
        "zeroed": (whole[:at] + bytes(400) + whole[at + 400 :], "broken data stream"),
        "empty": (b"", "it has 0 bytes"),
        "page": (b"\n<!DOCTYPE html><html>404</html>", "it is a web page or XML"),
        "pointer": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "it is a git-lfs pointer: run git lfs pull",
        ),
        "text": (b"no image", "PIL does not know its format"),
    }


@pytest.mark.parametrize("name", list(bad()))
def test_a_bad_image_is_the_same_short_sentence_wherever_it_lies(name: str, tmp_path: Path) -> None:
    data, reason = bad()[name]
    for look in ways(data, tmp_path):
        with pytest.raises(DataError, match="cannot be read") as error:
            look()
        assert reason in str(error.value)
        assert len(str(error.value)) < 300
        assert "\n" not in str(error.value)


def test_text_that_is_no_image_is_a_path_and_never_fills_a_message(tmp_path: Path) -> None:
    assert embedded("coco/train2017/000000033471.jpg") is None
    assert embedded("a" * 5000) is None
    code = base64.b64encode(png(noise())).decode()
    assert (
        embedded(code)
        == embedded(f"data:image/png;base64,{code}")
        == embedded(code.replace("+", "-").replace("/", "_").rstrip("="))
        == png(noise())
    )
    starts = ("", "a/" * 4000, "data:image/png;base64,?", "data:", "http://e.org/", "/", "/b" * 4000, "../")
    for image in (start + "x" * 5000 for start in starts):
        row = {
            "image": image,
            "conversations": [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "a cat"}],
        }
        (tmp_path / "mix.json").write_text(json.dumps([row]))
        (tmp_path / "q.jsonl").write_text(json.dumps({"image": image, "question": "what ?", "answer": "a cat"}))
        for spec in (f"llava_json:{tmp_path / 'mix.json'}", f"hf:{tmp_path / 'q.jsonl'}"):
            with pytest.raises(DataError) as error:
                load_data(spec)
            assert len(str(error.value)) < 300, error.value


def test_odd_names_below_the_image_root_are_read(tmp_path: Path) -> None:
    names = {
        name: name
        for name in (
            "a?.png",
            "b&c=1.png",
            "d#1.png",
            "e%20f.png",
            "g h.png",
            "Übung ö.png",
            "./sub/i.png",
            "sub//j.png",
            "k:l.png",
        )
    }
    names |= {
        "m%20n.png": "m n.png",
        "sub\\o.png": "sub/o.png",
        normalize("NFD", "é.png"): normalize("NFC", "é.png"),
        str(tmp_path / "p.png"): "p.png",
        str(tmp_path / "link.png"): "link.png",
    }
    (tmp_path / "link.png").symlink_to(tmp_path.parent / f"{tmp_path.name}-blob.png")  # as in a cache
    rows = []
    for number, (written, file) in enumerate(names.items()):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / file)
        rows.append(
            {
                "image": written,
                "conversations": [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "a cat"}],
            }
        )
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    read = load_data(f"llava_json:{tmp_path / 'mix.json'}").conversations
    assert [c.images[0].getpixel((0, 0))[0] for c in read] == list(range(len(names)))


# --- a folder of them -----------------------------------------------------------------------------


def test_a_folder_reads_what_pil_reads_and_names_what_is_left_out(
    photo: Image.Image, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = {"1.jfif": "JPEG", "2.jpe": "JPEG", "3.ppm": "PPM", "4.pgm": "PPM", "5.pbm": "PPM", "6.JPG": "JPEG"}
    kinds |= {name: kind for name, kind in (("7.avif", "AVIF"), ("8.jp2", "JPEG2000")) if readable(Path(name).suffix)}
    for number, (name, kind) in enumerate(kinds.items()):
        image = Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 60, 3), dtype=np.uint8))
        image.convert({"4.pgm": "L", "5.pbm": "1"}.get(name, "RGB")).save(tmp_path / name, format=kind)
    for name in ("._1.jpg", ".ipynb_checkpoints/1-checkpoint.jpg", "__MACOSX/1.jpg", "@eaDir/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    for name in ("a.dng", "b.heic") if not readable(".heic") else ("a.dng",):
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "2.jpe", tmp_path / "sub" / "copy.jpg")
    Image.open(tmp_path / "3.ppm").save(tmp_path / "sub" / "other bytes.bmp")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    data = load_data(f"folder:{tmp_path}")
    chosen = {"2.jpe", "3.ppm", "sub/copy.jpg", "sub/other bytes.bmp"} & {sample.id for sample in data}
    assert {sample.id for sample in data} - chosen == set(kinds) - {"2.jpe", "3.ppm"}
    assert len(chosen) == 2
    hidden, unread, copies = data.left_out
    assert hidden == "1 file whose name begins with a dot (._1.jpg)"
    assert ".dng" in unread
    assert "a.dng" in unread
    assert copies.startswith("2 files with the pixels of another, which count once (")
    assert "copy.jpg" in copies
    assert "other bytes.bmp" in copies
    assert all(sentence in caplog.text for sentence in data.left_out)
    for limit in range(1, len(data) + 1):
        assert len(load_data(f"folder:{tmp_path}", limit=limit).scenes) == limit


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"folder .*gone cannot be read \(No such file"):
        list(walk(tmp_path / "gone"))


def test_a_folder_without_readable_images_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.dng").write_bytes(b"raw")
    with pytest.raises(
        DataError,
        match=(
            r"contains no images that can be read: expected files ending in \.jpg, .*; left out: 1 file in a format"
            r" .*a\.dng"
        ),
    ):
        load_data(f"folder:{tmp_path}")


def test_an_image_that_is_replaced_after_it_was_looked_at_is_refused(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "1.bmp")
    data = load_data(f"folder:{tmp_path}")
    photo.rotate(180).save(tmp_path / "1.bmp")
    with pytest.raises(DataError, match=r"1\.bmp has been replaced since it was first read"):
        _ = data[0].image
