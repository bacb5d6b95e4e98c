"""The synthetic data set `photos`: cut-out photographs of objects on photographic backgrounds.

Only the image answers its questions.

    sample:  <224 x 224 image>  "what is left of mug ?"  ->  "owl"

    photos:train   photos:val   photos:test      12 objects from Debian's tuxpaint-stamps-default, 12 backgrounds from
                   its mate-backgrounds
    photos:val:FOLDER                            the user's own cut-outs: every RGBA image below FOLDER, named by its
                                                 file name

Every scene is a function of (split, seed, index) and the image files alone. An object may be mirrored; it is scaled to
fill a disc whose place and size do not depend on the object, so that each question type is balanced given its text
(`scenes.py`). A background is a random square of a photograph, mirrored or not. Splits share the objects and the
photographs, but no scene: what is held out is the composition, not the appearance of an object.

In a folder, "fire engine.png" is the object `fire_engine`; "mug-1.png" and "mug-2.png" are two images of one object
`mug`, of which each scene draws one at random.
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
from workbench.data.images import look_at, upright
from workbench.data.scenes import (
    COUNT,
    COUNTS,
    FURTHEST,
    NEIGHBOR,
    RELATION_X,
    RELATION_Y,
    SIDE_X,
    SIDE_Y,
    Question,
    SyntheticScenes,
    draw_repeated,
    shuffled_samples,
    template_words,
    unique,
)
from workbench.data.sources import Source, source_folder
from workbench.data.specs import path_of
from workbench.errors import DataError
from workbench.files import sha256, state_of

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
SCENES = SyntheticScenes(
    name="photos",
    version=2,
    splits={"train": 4000, "val": 500, "test": 1000},
    size=SIZE,
    objects=(0.2, 0.2, 0.25, 0.2, 0.15),
    radius=(32, (68, 60, 50, 42, 36)),
)
EXIST = "any {a} ?"
TEMPLATES = (COUNT, EXIST, SIDE_X, SIDE_Y, RELATION_X, RELATION_Y, *FURTHEST.values(), *NEIGHBOR.values())
RESERVED = template_words(TEMPLATES) | {*COUNTS, "yes", "no"}
MIN_NAMES = 8  # more than a scene has objects, so that there is always an absent one to ask for
MIN_PIXELS = 16  # of a cut-out's longer side

OBJECTS = {
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
    patterns=tuple(OBJECTS.values()),
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
    """Load `photos:train`, `photos:val` or `photos:test`, or `photos:val:FOLDER` for the user's own cut-outs.

    Args:
        rest: split, or split and folder.
        limit: number of scenes; None for all.
        seed: of the scenes.
        draw: seed of a random selection of scenes; None takes the first ones.
        decode: has no effect; a scene is identified without being drawn.

    Raises:
        DataError: the packages that contain the images cannot be fetched, or the folder has no usable cut-outs.
    """
    split, _, folder = rest.partition(":")
    material = user_material(path_of(folder)) if folder else default_material()
    scene = partial(scene_samples, material)
    return SCENES.dataset(split, seed, limit, draw, scene, vocabulary(material), material.fingerprint, spec=rest)


@dataclass(frozen=True)
class Material:
    """The cut-outs and backgrounds that scenes are composed of.

    Attributes:
        cut_outs: {name of an object: files that show it}.
        backgrounds: files of photographs.
        fingerprint: hash of all files.
    """

    cut_outs: dict[str, tuple[Path, ...]]
    backgrounds: tuple[Path, ...]
    fingerprint: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.cut_outs)


def default_material() -> Material:
    """Return the 12 objects of `OBJECTS` and the backgrounds."""
    stamps = source_folder(STAMPS)
    return _material({name: (stamps / path,) for name, path in sorted(OBJECTS.items())})


def user_material(folder: Path) -> Material:
    """Return every image below `folder`, named by its file name, and the backgrounds.

    Raises:
        DataError: too few objects, a name that is a word of the questions, or an image that is no cut-out.
    """
    if not folder.is_dir():
        raise DataError(f"folder '{folder}' does not exist")
    cut_outs: dict[str, tuple[Path, ...]] = {}
    files, left_out = photographs(folder)
    for sentence in left_out:
        log.warning("folder %s: left out %s", folder, sentence)
    for file in (Path(image.name) for image in files):
        name = object_name(file)
        if name in RESERVED or not name:
            raise DataError(
                f"cut-out {file} would be called '{name}', a word of the questions: expected the name of an object"
            )
        cut_out(file)
        cut_outs[name] = (*cut_outs.get(name, ()), file)
    if len(cut_outs) < MIN_NAMES:
        raise DataError(
            f"folder '{folder}' has {len(cut_outs)} differently named cut-outs: expected at least {MIN_NAMES}, as RGBA"
            " images"
        )
    return _material(dict(sorted(cut_outs.items())))


def object_name(file: Path) -> str:
    """Return the name of the object in a file as one word: lower case, `_` between words, without a final number."""
    words = re.sub(r"[\W_]+", "_", file.stem.lower()).strip("_")
    return re.sub(r"_*\d+$", "", words)


def _material(cut_outs: dict[str, tuple[Path, ...]]) -> Material:
    backgrounds = tuple(BACKGROUNDS.files(source_folder(BACKGROUNDS)))
    content = [(name, *map(sha256, files)) for name, files in cut_outs.items()]
    return Material(cut_outs, backgrounds, content_hash(content, BACKGROUNDS.digest))


def vocabulary(material: Material) -> list[str]:
    """Return all words that a question or an answer can contain."""
    return sorted(RESERVED | set(material.names))


# --- layout ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """An object in a scene: its cut-out, whether it is mirrored, and the disc it lies in (pixels)."""

    name: str
    file: Path
    mirrored: bool
    x: float
    y: float
    radius: float


def layout(material: Material, split: str, seed: int, index: int) -> list[Placed]:
    """Return the objects of a scene; one name occurs 0 to 3 times, so that counts vary."""
    rng = SCENES.generator(split, seed, index, 0)
    number = SCENES.draw_number(rng)
    names = draw_repeated(rng, list(material.names), number)
    files = [material.cut_outs[name][int(rng.integers(len(material.cut_outs[name])))] for name in names]
    mirrored = [bool(rng.integers(2)) for _ in names]
    places = SCENES.draw_places(rng, number)
    return [Placed(n, f, m, *place) for n, f, m, place in zip(names, files, mirrored, places, strict=True)]


# --- image ----------------------------------------------------------------------------------------


def cut_out(file: Path) -> Image.Image:
    """Return a cut-out as RGBA, cropped to its visible part.

    Raises:
        DataError: the file is no image, has no transparency, or shows next to nothing.
    """
    stat = file.stat() if file.exists() else None
    return _cut_out(file, stat and state_of(stat))


@lru_cache(maxsize=512)
def _cut_out(file: Path, hints: object) -> Image.Image:
    """Read a cut-out; it is cached for as long as `hints` of the file do not change."""
    transparent, image = look_at(
        file, str(file), lambda image: (image.has_transparency_data, upright(image).convert("RGBA"))
    )
    visible = image.getchannel("A").point(lambda alpha: 255 * (alpha >= 128))
    box = visible.getbbox()
    if not transparent or visible.getextrema()[0]:
        raise DataError(f"image {file} has no transparent pixel: expected a cut-out, as RGBA")
    if box is None or max(box[2] - box[0], box[3] - box[1]) < MIN_PIXELS:
        raise DataError(
            f"cut-out {file} shows next to nothing: expected at least {MIN_PIXELS} visible pixels in a row or column"
        )
    image = image.crop(box)
    image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)  # no scene shows it larger
    return image


def extent(item: Placed) -> tuple[int, int, int, int]:
    """Return left, top, width and height of an object in pixels; its diagonal is the diameter of its disc."""
    width, height = cut_out(item.file).size
    scale = 2 * item.radius / np.hypot(width, height)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    return round(item.x - width / 2), round(item.y - height / 2), width, height


def stamp(item: Placed) -> Image.Image:
    """Return the cut-out as it appears in the scene."""
    image = cut_out(item.file).resize(extent(item)[2:], Image.Resampling.LANCZOS)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if item.mirrored else image


@lru_cache(maxsize=64)  # all questions about a scene share its image
def draw_scene(key: tuple[str, int, int], items: tuple[Placed, ...], backgrounds: tuple[Path, ...]) -> Image.Image:
    """Draw the scene `key` = (split, seed, index) as a 224 x 224 RGB image."""
    image = _background(SCENES.generator(*key, 1), backgrounds)
    for item in items:
        cut = stamp(item)
        image.paste(cut, extent(item)[:2], cut)
    return image


def _background(rng: np.random.Generator, files: Sequence[Path]) -> Image.Image:
    """Return a random square of a random photograph, a quarter of its height to all of it, mirrored or not."""
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
    """Return name, box in 0..1 and pixel mask of every object; objects do not overlap."""
    objects = []
    for item in items:
        left, top, width, height = extent(item)
        box = (left / SIZE, top / SIZE, (left + width) / SIZE, (top + height) / SIZE)
        objects.append(DrawnObject(item.name, box, partial(_mask, item)))
    return tuple(objects)


def _mask(item: Placed) -> np.ndarray:
    alpha = Image.new("L", (SIZE, SIZE))
    alpha.paste(stamp(item).getchannel("A"), extent(item)[:2])
    return np.asarray(alpha) >= 128


# --- questions ------------------------------------------------------------------------------------


def scene_samples(material: Material, split: str, seed: int, index: int) -> list[Sample]:
    """Return all questions about scene `index`, in random order; the image is drawn only when it is used."""
    items = layout(material, split, seed, index)
    rng = SCENES.generator(split, seed, index, 2)
    all_named = [(item.name, item) for item in items]
    named = unique(all_named, lambda pair: pair[0])
    questions = [
        *SCENES.count_questions(rng, [item.name for item in items], material.names),
        *_exist(rng, items, material.names),
    ]
    questions += SCENES.position_questions(named)
    questions += SCENES.relation_questions(rng, named)
    questions += SCENES.furthest_questions(all_named, material.names)
    questions += SCENES.neighbor_questions(named, all_named, material.names)
    load = partial(draw_scene, (split, seed, index), tuple(items), material.backgrounds)
    return shuffled_samples(rng, f"{split}-{seed}-{index:05d}", load, questions, scene_objects(items))


def _exist(rng: np.random.Generator, items: Sequence[Placed], names: Sequence[str]) -> list[Question]:
    present = sorted({item.name for item in items})
    absent = [name for name in names if name not in present]
    asked = [(present[int(rng.integers(len(present)))], "yes"), (absent[int(rng.integers(len(absent)))], "no")]
    return [Question(EXIST.format(a=name), answer, ("yes", "no"), "exist") for name, answer in asked]
