"""One image of the user's own, with a question about it: no answer, nothing to score.

image:photo.jpg?question=what is left of the mug ?

Everything after the first `?question=` is the question; without it, that of a `folder:`. An analysis that needs several
images says so.
"""

from __future__ import annotations

from workbench.data.base import DATASETS, Dataset, Sample, content_hash
from workbench.data.folder import QUESTION
from workbench.data.images import StoredImage, image_hash, read_image, shown
from workbench.data.specs import path_of
from workbench.errors import DataError

MARK = "?question="


@DATASETS.register("image")
def image(
    spec: str, *, limit: int | None = None, seed: int = 0, draw: int | None = None, decode: bool | None = None
) -> Dataset:
    """Load the image and its question; see the module's docstring.

    Args:
        spec: the file, and the question.
        limit, seed, draw, decode: have no effect on a single image.

    Raises:
        DataError: there is no such file, it is not an image that can be read, or the question is empty.
    """
    del limit, seed, draw, decode
    name, marked, text = (spec, "", "") if path_of(spec).is_file() else spec.partition(MARK)
    file, question = path_of(name), text.strip() if marked else QUESTION
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise DataError(f"image '{shown(name)}' {what}: expected image:FILE{MARK}TEXT with an image file")
    if not question:
        raise DataError(f"image '{shown(name)}' has an empty question: expected text after {MARK}")
    pixels = image_hash(read_image(file))
    stored = StoredImage(str(file), file, file.name).with_pixels(pixels)
    sample = Sample(file.name, file.name, stored, question=question)
    return Dataset(f"image:{spec}", [sample], content_hash("image", pixels, question), origin="image")
