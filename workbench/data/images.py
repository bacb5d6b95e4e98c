"""Reading images: files, bytes inside a table, base64 text and `data:` URLs all go through this module.

An image is read as upright RGB: the first frame, turned as its EXIF tag says, with transparency on white. Its colors
are those in the file; a color profile is not applied. Metadata of a PNG or JPEG (texts, profiles, EXIF) may be broken
or large without harm; broken pixels are an error of one sentence.
"""

from __future__ import annotations

import base64
import binascii
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image, features

from workbench.errors import DataError

Image.MAX_IMAGE_PIXELS = 120_000_000  # a larger image is refused, not decoded

ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FORMATS = {  # endings of image files, and PIL's name of their format
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    **dict.fromkeys((".jp2", ".j2k", ".jpf", ".jpx"), "JPEG2000"),
    **dict.fromkeys((".avif", ".avifs"), "AVIF"),
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIF"),
    ".gif": "GIF",
    ".webp": "WEBP",
    ".tga": "TGA",
    ".qoi": "QOI",
    # formats that PIL does not read, or not as photographs
    **dict.fromkeys((".jxl", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"), ""),
}
LFS = b"version https://git-lfs.github.com/spec/"
MAX_SHOWN = 100  # characters of a value in a message
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
# the first bytes of image formats, by which base64 text is recognized as an image
MAGIC = (PNG, JPEG, b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6")

T = TypeVar("T")


@dataclass(frozen=True)
class StoredImage:
    """A stored image, read again at each call, so that photographs do not fill the memory.

    Attributes:
        name: what messages call the image.
        content: the file, or a function that returns the bytes.
        place: identifies the image before it is decoded; equal places hold equal images.
        pixels: `image_hash` that its pixels must have; None if it has not been decoded yet.
    """

    name: str
    content: Path | Callable[[], bytes] = field(compare=False, repr=False)
    place: str
    pixels: bytes | None = field(default=None, compare=False, repr=False)

    @property
    def image_id(self) -> str:
        """The image's identity: a hash of its pixels if it has been decoded, else its place."""
        return self.place if self.pixels is None else self.pixels.hex()[:16]

    def with_pixels(self, pixels: bytes | None) -> StoredImage:
        """Return the same image, identified by the hash of its pixels."""
        return replace(self, pixels=pixels)

    def __call__(self) -> Image.Image:
        """Return the image in RGB, upright.

        Raises:
            DataError: it cannot be read, or its pixels have changed since it was first decoded.
        """
        image = read_image(self.content if isinstance(self.content, Path) else self.content(), self.name)
        if self.pixels is not None and image_hash(image) != self.pixels:
            raise DataError(
                f"image {shown(self.name)} has been replaced since it was first read: expected the same pixels;"
                " restore it or start again"
            )
        return image

    def size(self) -> tuple[int, int]:
        """Return width and height of the upright image in pixels, from its header.

        Raises:
            DataError: it cannot be read.
        """
        return image_size(self.content if isinstance(self.content, Path) else self.content(), self.name)


def read_image(source: Path | bytes, name: str = "") -> Image.Image:
    """Read an image as RGB, turned upright, transparency on white, first frame of an animation.

    Args:
        source: the file, or its bytes.
        name: what messages call the image; by default the file's path.

    Raises:
        DataError: truncated, not an image, or too large.
    """
    return look_at(source, name, upright_rgb)


def image_size(source: Path | bytes, name: str = "") -> tuple[int, int]:
    """Return width and height of the upright image in pixels, without decoding it.

    Raises:
        DataError: not an image, or too large.
    """
    return look_at(source, name, lambda image: image.size[::-1] if _turned(image) else image.size)


def image_hash(image: Image.Image) -> bytes:
    """Return a hash (16 bytes) of size, mode and pixels."""
    return blake2b(f"{image.mode} {image.size}|".encode() + image.tobytes(), digest_size=16).digest()


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return the first frame as RGB, turned as its EXIF tag says, with transparency on white.

    Every model thus receives the same pixels. 16 bits are scaled to 8.

    Raises:
        DataError: a mode whose white level is unknown (32 bits, floating point).
    """
    sixteen_bits = image.format == "PPM"  # whose levels PIL scales to 16 bits
    image = upright(image)
    if image.mode[0] in "IF":
        levels = np.asarray(image)
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise DataError(
                f"an image of mode {image.mode} with levels {levels.min():g} to {levels.max():g}: expected 8 or 16 bits"
            )
        deep = sixteen_bits or image.mode != "I" or levels.max() > 255
        return Image.fromarray((levels / (257 if deep else 1)).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Return the first frame, turned as its EXIF tag says."""
    image.load()  # before EXIF is read: that of a PNG would load the pixels too, and errors in EXIF are ignored
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if the EXIF block is broken or has none."""
    try:
        turn = image.getexif().get(ORIENTATION, 1)
    # PIL raises what the broken bytes lead to: struct.error, KeyError, SyntaxError, ZeroDivisionError ...
    except Exception:  # noqa: BLE001
        return 1
    return turn if isinstance(turn, int) and turn in TURNS else 1


def _turned(image: Image.Image) -> bool:
    """Return whether turning exchanges `image.size`; EXIF after the pixels of a PNG is not read here.

    Of a TIFF, PIL gives the size of the upright image before it is decoded.
    """
    return image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info) and orientation(image) >= 5


def readable(suffix: str) -> bool:
    """Return whether the installed PIL reads image files with this ending, such as ".jpg"."""
    kind = FORMATS.get(suffix.lower(), "")
    Image.init()
    return kind in Image.OPEN and (kind != "JPEG2000" or bool(features.check("jpg_2000")))


def shown(value: object, most: int = MAX_SHOWN) -> str:
    """Return a value for a message: on one line, and without its middle if it has more than `most` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[: most // 4]}...{text[-(most - most // 4 - 3) :]}"


# --- decoding -------------------------------------------------------------------------------------


def look_at(source: Path | bytes, name: str, look: Callable[[Image.Image], T]) -> T:
    """Return what `look` returns for an image; if PIL fails because of broken metadata, try again without it."""
    name = name or (str(source) if isinstance(source, Path) else "of a table")
    try:
        return _look(source, look)
    # PIL raises what the broken bytes lead to: OSError, SyntaxError, struct.error, zlib.error, TypeError ...
    except Exception as error:
        try:
            data = source.read_bytes() if isinstance(source, Path) else source
        except OSError as failure:
            raise DataError(f"image {shown(name)} cannot be read ({shown(failure.strerror or failure)})") from failure
        for bare in _without_metadata(data):
            with suppress(Exception):
                return _look(bare, look)
        raise DataError(f"image {shown(name)} cannot be read ({_reason(data, error)})") from error


def _look(source: Path | bytes, look: Callable[[Image.Image], T]) -> T:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about EXIF, palettes, profiles
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(source if isinstance(source, Path) else BytesIO(source)) as image:
            return look(image)


def _reason(data: bytes, error: Exception) -> str:
    """Return why bytes are no image, judged by their beginning, or else PIL's error."""
    if not data:
        return "it has 0 bytes"
    if data.startswith(LFS):
        return "it is a git-lfs pointer: run git lfs pull"
    beginning = data[:512].removeprefix(b"\xef\xbb\xbf")
    is_markup = re.match(rb"\s*<(!doctype|html|head|body|\?xml|error)", beginning, re.IGNORECASE)
    if is_markup and b"<svg" not in data[:4096]:
        return "it is a web page or XML, perhaps of a failed download"
    if isinstance(error, Image.UnidentifiedImageError):
        return "PIL does not know its format"
    return shown(error) or type(error).__name__


def _without_metadata(data: bytes) -> list[bytes]:
    """Return a PNG or JPEG without its metadata, once with EXIF (for the orientation) and once without."""
    walk = _png_parts if data.startswith(PNG) else _jpeg_parts if data.startswith(JPEG) else None
    if walk is None:
        return []
    parts = list(walk(data))
    return [b"".join(part for kind, part in parts if kind in kinds) for kinds in (("pixels", "exif"), ("pixels",))]


def _png_parts(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the chunks of a PNG: critical ones and transparency ("pixels"), "exif", and "other" (texts, profiles)."""
    yield "pixels", PNG
    at = len(PNG)
    while at + 8 <= len(data):
        end, kind = at + 12 + int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        is_needed = kind[:1].isupper() or kind == b"tRNS"
        yield "pixels" if is_needed else "exif" if kind == b"eXIf" else "other", data[at:end]
        at = end


def _jpeg_parts(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the segments of a JPEG: "exif", "other" (XMP, profiles: APP1 to APP15), and "pixels".

    APP14 says how colors are stored, so it belongs to the pixels.
    """
    yield "pixels", data[:2]
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        is_app = 0xE1 <= marker <= 0xEF and marker != 0xEE
        yield "exif" if is_app and data[at + 4 : at + 8] == b"Exif" else "other" if is_app else "pixels", data[at:end]
        at = end
    yield "pixels", data[at:]


# --- text -----------------------------------------------------------------------------------------


def embedded(text: str) -> bytes | None:
    """Return the bytes of an image that a text holds as a `data:` URL or base64; None if the text is a path.

    Raises:
        DataError: a `data:` URL that does not decode.
    """
    if text[:5].lower() == "data:":
        return _data_url(text)
    if len(text) < 64 or not re.fullmatch(r"[A-Za-z0-9+/_-]{16}", text[:16]):
        return None
    packed = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        data = base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if data.startswith(MAGIC) or data[4:8] == b"ftyp" or data[4:8] == b"jP  " else None


def _data_url(text: str) -> bytes:
    head, comma, body = text.partition(",")
    if not comma:
        raise DataError(f"image '{shown(text, 40)}' is a data: URL without a comma: expected data:image/png;base64,...")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(unquote(body).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"image '{shown(text, 40)}' is a data: URL that does not decode ({error})") from error
