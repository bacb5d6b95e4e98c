"""The photographic world: cut-out photographs of named things on photographic backgrounds, with questions that only the
image can answer.

    sample:  <224 x 224 image>  "what is left of mug ?"  ->  "owl"

    photos:train   photos:val   photos:test      12 things from Debian's tuxpaint-stamps-default, 12 backgrounds from
                   its mate-backgrounds
    photos:val:FOLDER                            the user's own cut-outs: every RGBA picture below FOLDER, named by its
                                                 file name

Every scene is a function of (split, seed, index) and the pictures alone. A thing may be mirrored; it is scaled to fill
a disc whose place and size do not depend on what it is, so that each question type is balanced given its text
(`scenes.py`). A background is a random square of a photograph, mirrored or not. Splits share the things and the
photographs, never a scene: what is held out is the composition, not the appearance of a thing.

In a folder, "fire engine.png" is the thing `fire_engine`; "mug-1.png" and "mug-2.png" are two pictures of one `mug`, of
which each scene draws one at random.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from workbench.data.base import DATASETS, Dataset, DrawnObject, Object, Sample, content_hash
from workbench.data.folder import photographs
from workbench.data.images import look_at
from workbench.data.scenes import (
    COUNT,
    COUNTS,
    FURTHEST,
    NEIGHBOUR,
    RELATION_X,
    RELATION_Y,
    SIDE_X,
    SIDE_Y,
    Question,
    World,
    draw_repeated,
    shuffled_samples,
    template_words,
    unique,
)
from workbench.data.sources import Source, source_folder
from workbench.data.specs import path_of
from workbench.errors import DataError
from workbench.weights.fetch import sha256

log = logging.getLogger(__name__)
SIZE = 224  # pixels
CATEGORIES = (
    "count",
    "exist",
    "position_x",
    "position_y",
    "relation_x",
    "relation_y",
    "furthest_x",
    "furthest_y",
    "neighbour_x",
    "neighbour_y",
)
WORLD = World(
    name="photos",
    version=2,
    splits={"train": 4000, "val": 500, "test": 1000},
    size=SIZE,
    objects=(0.2, 0.2, 0.25, 0.2, 0.15),
    radius=(32, (68, 60, 50, 42, 36)),
)
EXIST = "any {a} ?"
TEMPLATES = (COUNT, EXIST, SIDE_X, SIDE_Y, RELATION_X, RELATION_Y, *FURTHEST.values(), *NEIGHBOUR.values())
RESERVED = template_words(TEMPLATES) | {*COUNTS, "yes", "no"}
LEAST_NAMES = 8  # more than a scene holds, so that there is always something absent to ask for
LEAST_PIXELS = 16  # of a cut-out's longer side

THINGS = {
    "balloon": "vehicles/flight/balloon360.png",
    "car": "vehicles/auto/beetle.png",
    "duck": "animals/birds/duck.png",
    "elephant": "animals/mammals/elephant.png",
    "flamingo": "animals/birds/pink_flamingo.png",
    "frog": "animals/amphibians/frog.png",
    "guitar": "hobbies/music/string/guitar_classical.png",
    "lemon": "food/fruit/lemon.png",
    "mug": "household/dishes/mug.png",
    "owl": "animals/birds/owl.png",
    "tiger": "animals/mammals/cats/tiger.png",
    "zebra": "animals/mammals/equines/zebra.png",
}
STAMPS = Source(
    name="tuxpaint-stamps",
    deb="tuxpaint-stamps-default",
    root="usr/share/tuxpaint/stamps/",
    patterns=tuple(THINGS.values()),
    digest="0ec991262b91ff9f09cd67cb8c143da93e1fe271ab8eaf9a03b0bc564321846b",
    licence=(
        "GPL-2, Bill Kendrick 2002-2022 (copyright file of Debian's tuxpaint-stamps-default 2022.06.04-1, for all"
        " files). Its changelog names as sources: Childsplay, GPL, Stas Zytkiewicz (duck, elephant, frog, owl, tiger,"
        " zebra; another tiger and zebra and the flamingo Bill Kendrick); Caroline Ford (car, mug); Wikipedia by"
        " Caroline Ford (guitar); Chris Goerner (lemon); Albert Cahalan (balloon)"
    ),
)
BACKGROUNDS = Source(
    name="mate-backgrounds",
    deb="mate-backgrounds",
    root="usr/share/backgrounds/mate/",
    patterns=("nature/*.jpg",),
    digest="60bc9a00f9beb9c843aaa559e62c53e3f930555008fe4ad5dc4ad282e8fa378a",
    licence=(
        "GPL-2 or later (copyright file of Debian's mate-backgrounds 1.26.0-1): Charles Barbin (Aqua, Garden, LadyBird,"
        " YellowFlower; TwoWings with Hylke Bons), Lennart Poettering and Andrea Cimitan (Blinds), Marco Cogoni and"
        " Hylke Bons (Dune), Jens Ansorg (FreshFlower), Timothy Schellhase and Lapo Calamandrei (GreenMeadow),"
        " blackcombwhistler07 (RainDrops), Sergey Nazarov (Storm), Jean-François Fortin Tam (Wood)"
    ),
)


@DATASETS.register("photos")
def photos(
    rest: str, *, limit: int | None = None, seed: int = 0, draw: int | None = None, decode: bool | None = None
) -> Dataset:
    """Load `photos:train`, `photos:val` or `photos:test`, or `photos:val:FOLDER` for cut-outs of the user's own;
    `limit` counts scenes.

    Args:
        seed: names the data set.
        decode: a scene is known without being drawn.

    Raises:
        DataError: the packages that carry the pictures cannot be had, or a folder that holds no usable cut-outs.
    """
    split, _, folder = rest.partition(":")
    cast = own_cast(path_of(folder)) if folder else default_cast()
    return WORLD.dataset(
        split, seed, limit, draw, partial(scene_samples, cast), vocabulary(cast), cast.fingerprint, spec=rest
    )


@dataclass(frozen=True)
class Cast:
    """Which things can appear, before which backgrounds; `pictures[name]` are the files that show it, `fingerprint`
    hashes all files."""

    pictures: dict[str, tuple[Path, ...]]
    backgrounds: tuple[Path, ...]
    fingerprint: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.pictures)


def default_cast() -> Cast:
    """The 12 things of `THINGS`."""
    stamps = source_folder(STAMPS)
    return _cast({name: (stamps / path,) for name, path in sorted(THINGS.items())})


def own_cast(folder: Path) -> Cast:
    """Every picture below `folder`, named by its file name.

    Raises:
        DataError: too few things, a name that is a word of the questions, or a picture that is no cut-out.
    """
    if not folder.is_dir():
        raise DataError(f"folder '{folder}' does not exist")
    found: dict[str, tuple[Path, ...]] = {}
    files, left_out = photographs(folder)
    for sentence in left_out:
        log.warning("folder %s: left out %s", folder, sentence)
    for file in (Path(image.name) for image in files):
        name = thing_name(file)
        if name in RESERVED or not name:
            raise DataError(
                f"cut-out {file} would be called '{name}', a word of the questions: expected the name of a thing"
            )
        cut_out(file)
        found[name] = (*found.get(name, ()), file)
    if len(found) < LEAST_NAMES:
        raise DataError(
            f"folder '{folder}' holds {len(found)} differently named cut-outs: expected at least {LEAST_NAMES}, as RGBA"
            " pictures"
        )
    return _cast(dict(sorted(found.items())))


def thing_name(file: Path) -> str:
    """The one word that names the thing in a file: lower case, `_` between words, without a number at its end."""
    words = re.sub(r"[\W_]+", "_", file.stem.lower()).strip("_")
    return re.sub(r"_*\d+$", "", words)


def _cast(pictures: dict[str, tuple[Path, ...]]) -> Cast:
    backgrounds = tuple(BACKGROUNDS.files(source_folder(BACKGROUNDS)))
    content = [(name, *map(sha256, files)) for name, files in pictures.items()]
    return Cast(pictures, backgrounds, content_hash(content, BACKGROUNDS.digest))


def vocabulary(cast: Cast) -> list[str]:
    """Every word that a question or an answer can contain."""
    return sorted(RESERVED | set(cast.names))


# --- layout ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """A thing in a scene: its picture, whether it is mirrored, and the disc it lies in, in pixels."""

    name: str
    picture: Path
    mirrored: bool
    x: float
    y: float
    radius: float


def layout(cast: Cast, split: str, seed: int, index: int) -> list[Placed]:
    """Return the things of a scene; one name is repeated 0 to 3 times, so that counts vary."""
    rng = WORLD.generator(split, seed, index, 0)
    number = WORLD.draw_number(rng)
    names = draw_repeated(rng, list(cast.names), number)
    pictures = [cast.pictures[name][int(rng.integers(len(cast.pictures[name])))] for name in names]
    mirrored = [bool(rng.integers(2)) for _ in names]
    return [
        Placed(n, p, m, *place)
        for n, p, m, place in zip(names, pictures, mirrored, WORLD.draw_places(rng, number), strict=True)
    ]


# --- picture --------------------------------------------------------------------------------------


def cut_out(file: Path) -> Image.Image:
    """A cut-out as RGBA, cropped to what is visible.

    Raises:
        DataError: not an image, without transparency, or with next to nothing visible.
    """
    stat = file.stat() if file.exists() else None
    return _cut_out(file, stat and (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


@lru_cache(maxsize=512)
def _cut_out(file: Path, hints: object) -> Image.Image:
    transparent, picture = look_at(file, str(file), lambda image: (image.has_transparency_data, image.convert("RGBA")))
    visible = picture.getchannel("A").point(lambda alpha: 255 * (alpha >= 128))
    box = visible.getbbox()
    if not transparent or visible.getextrema()[0]:
        raise DataError(f"picture {file} has no transparent pixel: expected a cut-out, as RGBA")
    if box is None or max(box[2] - box[0], box[3] - box[1]) < LEAST_PIXELS:
        raise DataError(
            f"cut-out {file} shows next to nothing: expected at least {LEAST_PIXELS} visible pixels in a row or column"
        )
    picture = picture.crop(box)
    picture.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)  # no scene shows it larger
    return picture


def extent(item: Placed) -> tuple[int, int, int, int]:
    """Left, top, width and height of a thing in the scene, in pixels; its diagonal is the diameter of its disc."""
    width, height = cut_out(item.picture).size
    scale = 2 * item.radius / np.hypot(width, height)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    return round(item.x - width / 2), round(item.y - height / 2), width, height


def stamp(item: Placed) -> Image.Image:
    """The cut-out as it lies in the scene."""
    picture = cut_out(item.picture).resize(extent(item)[2:], Image.Resampling.LANCZOS)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if item.mirrored else picture


@lru_cache(maxsize=64)  # all questions of a scene ask for the same picture
def draw_scene(key: tuple[str, int, int], items: tuple[Placed, ...], backgrounds: tuple[Path, ...]) -> Image.Image:
    """Draw the scene `key` = (split, seed, index) as a 224 x 224 RGB image."""
    picture = _background(WORLD.generator(*key, 1), backgrounds)
    for item in items:
        cut = stamp(item)
        picture.paste(cut, extent(item)[:2], cut)
    return picture


def _background(rng: np.random.Generator, files: Sequence[Path]) -> Image.Image:
    """A random square of a random photograph, between a quarter of its height and all of it, mirrored or not."""
    photo = _photograph(files[int(rng.integers(len(files)))])
    side = int(rng.integers(photo.height // 4, photo.height + 1))
    left, top = int(rng.integers(photo.width - side + 1)), int(rng.integers(photo.height - side + 1))
    square = photo.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.integers(2) else square


@lru_cache(maxsize=32)
def _photograph(file: Path) -> Image.Image:
    with Image.open(file) as photo:
        whole = photo.convert("RGB")
    height = 3 * SIZE
    return whole.resize((round(whole.width * height / whole.height), height), Image.Resampling.BOX)


def scene_objects(items: Sequence[Placed]) -> tuple[Object, ...]:
    """Name, box in 0..1 and pixel mask of every thing; they do not overlap."""
    found = []
    for item in items:
        left, top, width, height = extent(item)
        box = (left / SIZE, top / SIZE, (left + width) / SIZE, (top + height) / SIZE)
        found.append(DrawnObject(item.name, box, partial(_mask, item)))
    return tuple(found)


def _mask(item: Placed) -> np.ndarray:
    alpha = Image.new("L", (SIZE, SIZE))
    alpha.paste(stamp(item).getchannel("A"), extent(item)[:2])
    return np.asarray(alpha) >= 128


# --- questions ------------------------------------------------------------------------------------


def scene_samples(cast: Cast, split: str, seed: int, index: int) -> list[Sample]:
    """All questions about scene `index`, in random order; the image is drawn only when it is asked for."""
    items = layout(cast, split, seed, index)
    rng = WORLD.generator(split, seed, index, 2)
    things = [(item.name, item) for item in items]
    named = unique(things, lambda thing: thing[0])
    questions = [
        *WORLD.count_questions(rng, [item.name for item in items], cast.names),
        *_exist(rng, items, cast.names),
    ]
    questions += WORLD.position_questions(named)
    questions += WORLD.relation_questions(rng, named)
    questions += WORLD.furthest_questions(things, cast.names)
    questions += WORLD.neighbour_questions(named, things, cast.names)
    load = partial(draw_scene, (split, seed, index), tuple(items), cast.backgrounds)
    return shuffled_samples(rng, f"{split}-{seed}-{index:05d}", load, questions, scene_objects(items))


def _exist(rng: np.random.Generator, items: Sequence[Placed], names: Sequence[str]) -> list[Question]:
    present = sorted({item.name for item in items})
    absent = [name for name in names if name not in present]
    asked = [(present[int(rng.integers(len(present)))], "yes"), (absent[int(rng.integers(len(absent)))], "no")]
    return [Question(EXIST.format(a=name), answer, ("yes", "no"), "exist") for name, answer in asked]
