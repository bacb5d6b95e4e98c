"""The texts of the twins' questions, in the words of the synthetic data sets and in those of the benchmarks.

A model trained on `shapes` or `photos` knows a closed list of words: most of "Is there a mug in the image?" is unknown
to it. So the questions are by default worded as it learned them (`synthetic`); `benchmark` has each benchmark's words.
"""

from __future__ import annotations

from typing import Literal

from workbench.data.base import COLOR_TERMS
from workbench.data.photos import EXIST
from workbench.data.scenes import COUNT, RELATION_X, RELATION_Y, SIDE_X, SIDE_Y
from workbench.data.shapes import COLOR, SHAPE

Wording = Literal["synthetic", "benchmark"]
YES_OR_NO = " Please answer yes or no."
TEXTS: dict[str, tuple[str, str]] = {  # {question: (synthetic, benchmark)}
    "pope exist": (EXIST, "Is there {an_a} in the image?"),
    "whatsup side_x": (SIDE_X, "Where is the {a} in the photo? Answer with left, right, top or bottom."),
    "whatsup side_y": (SIDE_Y, "Where is the {a} in the photo? Answer with left, right, top or bottom."),
    "whatsup relation_x": (
        RELATION_X,
        "Where is the {a} in relation to the {b}? Answer with left, right, above or below.",
    ),
    "whatsup relation_y": (
        RELATION_Y,
        "Where is the {a} in relation to the {b}? Answer with left, right, above or below.",
    ),
    "mmvp exist": (EXIST, "Is there {an_a} in the image?"),
    "mmvp color": (COLOR, "What is the color of the {a}?"),
    "mmvp side_x": (SIDE_X, "Is the {a} on the left or on the right side of the image?"),
    "mmvp side_y": (SIDE_Y, "Is the {a} at the top or at the bottom of the image?"),
    "mmvp relation_x": (RELATION_X, "Is the {a} to the left or to the right of the {b}?"),
    "mmvp relation_y": (RELATION_Y, "Is the {a} above or below the {b}?"),
    "cv_bench count": (COUNT, "How many {a}s are in the image?"),
    "cv_bench relation_x": (
        RELATION_X,
        "Considering the relative positions of the {a} and the {b} in the image provided, where is the {a} located with"
        " respect to the {b}?",
    ),
    "cv_bench relation_y": (
        RELATION_Y,
        "Considering the relative positions of the {a} and the {b} in the image provided, where is the {a} located with"
        " respect to the {b}?",
    ),
    "mmstar exist": (EXIST, "Does the image show {an_a}?"),
    "mmstar count": (COUNT, "How many {a}s does the image show?"),
    "mmstar color": (COLOR, "What is the color of the {a}?"),
    "mmstar shape": (SHAPE, "What is the shape of the {a}?"),
    "mmstar side_x": (SIDE_X, "On which side of the image is the {a}?"),
    "mmstar side_y": (SIDE_Y, "In which half of the image is the {a}?"),
    "mmstar relation_x": (RELATION_X, "On which side of the {b} is the {a}?"),
    "mmstar relation_y": (RELATION_Y, "Is the {a} above or below the {b}?"),
    "mme existence": (EXIST, "Is there {an_a} in this image?" + YES_OR_NO),
    "mme color": (EXIST, "Is there {an_a} in the image?" + YES_OR_NO),
    "mme count": ("any {n} {a} ?", "Is the number of {a}s in this image {n}?" + YES_OR_NO),
    "mme left": ("any {a} left of {b} ?", "Is the {a} on the left of the {b}?" + YES_OR_NO),
    "mme right": ("any {a} right of {b} ?", "Is the {a} on the right of the {b}?" + YES_OR_NO),
    "mme above": ("any {a} above {b} ?", "Is the {a} above the {b}?" + YES_OR_NO),
    "mme below": ("any {a} below {b} ?", "Is the {a} below the {b}?" + YES_OR_NO),
}


def worded(question: str, wording: Wording, a: str, b: str = "", n: str = "") -> str:
    """Return the text of a question.

    Args:
        question: a key of TEXTS.
        wording: whose words.
        a: name of the object that is asked about, such as "red", "circle" or "red circle".
        b: name of the object that it is related to.
        n: a number.
    """
    synthetic, benchmark = TEXTS[question]
    if wording == "synthetic":
        return synthetic.format(a=a, b=b, n=n)
    a, b = (f"{name} object" if name in COLOR_TERMS else name for name in (a, b))
    return benchmark.format(a=a, b=b, n=n, an_a=f"{'an' if a[0] in 'aeiou' else 'a'} {a}")
