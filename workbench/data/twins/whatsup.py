"""The twin of What's Up: COCO one and two and half of A, made of scenes of `shapes:test`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from workbench.data.base import COLOR_TERMS, Sample
from workbench.data.scenes import SIDE_X, SIDE_Y
from workbench.data.twins.edits import edited
from workbench.data.twins.files import save_image, write_lines
from workbench.data.twins.select import KINDS, NAMES, OPPOSITE, Scenes, Wanted, balanced, names_in, pairs_of, relations
from workbench.data.twins.wordings import Wording, worded
from workbench.data.whatsup import COCO, SUBSETS

LINKS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
PAIRS = 40  # of A
# of an image with a relation: with more objects, or closer ones, a model of 300 images is near chance
OBJECTS, APART = 3, 1 / 3


def write_whatsup(folder: Path, seed: int, wording: Wording) -> None:
    """Write the three subsets, and a file of prompts for each.

    Of A, only the images with left and right are there: `shapes` has nothing on or under anything.
    """
    scenes, rng = Scenes(seed), np.random.default_rng([seed, 5])
    simple = Scenes(seed, OBJECTS, APART, scenes.taken)
    sides = product(NAMES, ((SIDE_X, ("left", "right")), (SIDE_Y, ("top", "bottom"))))
    one: Wanted = Counter({(text.format(a=name), answer): 5 for name, (text, both) in sides for answer in both})
    _write_captions(folder, "coco_one", balanced(scenes, one), wording)
    _write_captions(folder, "coco_two", balanced(simple, relations(pairs_of(rng, NAMES))), wording)
    _write_controlled(folder, seed, pairs_of(rng, NAMES)[:PAIRS], wording, scenes.taken)


def _caption(names: Sequence[str], answer: str) -> str:
    a, b = (f"a {name} object" if name in COLOR_TERMS else f"a {name}" for name in (names[0], names[-1]))
    if len(names) == 1:
        return f"A photo of {a} {'on' if answer in ('left', 'right') else 'at'} the {answer}"
    return f"A photo of {a} {LINKS[answer]} {b}"


def _prompt(number: int, names: Sequence[str], kind: str, answer: str, wording: Wording) -> dict[str, object]:
    """Return a row in AdaptVis's format of prompts."""
    text = worded(f"whatsup {kind}", wording, names[0], names[-1])
    return {"id": number, "question": f"<image>\nUSER: {text}\nASSISTANT:", "answer": [answer.capitalize()]}


def _write_captions(folder: Path, subset: str, samples: Sequence[Sample], wording: Wording) -> None:
    rows: list[object] = []
    prompts: list[dict[str, object]] = []
    for number, sample in enumerate(samples):
        names, image = names_in(sample), int(sample.image_id.rsplit("-", 1)[1])
        rows.append([image, *(_caption(names, answer) for answer in (sample.answer, OPPOSITE[sample.answer]))])
        prompts.append(_prompt(number, names, KINDS.get(sample.category, sample.category), sample.answer, wording))
        save_image(sample.image, folder / COCO.format(image))
    (folder / SUBSETS[subset].file).write_text(json.dumps(rows), encoding="utf-8")
    write_lines(prompts, folder / f"prompts_{subset}.jsonl")


def _write_controlled(
    folder: Path, seed: int, pairs: Sequence[tuple[str, str]], wording: Wording, taken: set[int]
) -> None:
    """Write two images of each pair: a scene, and the same with the two objects exchanged."""
    rows: list[object] = []
    prompts: list[dict[str, object]] = []
    edits = {(edit.a, edit.b): edit for edit in edited(seed, "relation_x", Counter(pairs), taken, OBJECTS, APART)}
    for (a, b), relation in product(pairs, ("left", "right")):
        name = f"{a}_{relation}_of_{b}"
        captions = [_caption((a, b), answer) for answer in (relation, OPPOSITE[relation])]
        rows.append({"image_path": f"data/controlled_images/{name}.jpeg", "caption_options": captions})
        prompts.append(_prompt(len(prompts), (a, b), "relation_x", relation, wording))
        edit = edits[a, b]
        save_image(edit.images[edit.answers.index(relation)], folder / "controlled_images" / f"{name}.jpeg")
    (folder / SUBSETS["a"].file).write_text(json.dumps(rows), encoding="utf-8")
    write_lines(prompts, folder / "prompts_a.jsonl")
