"""The choice of an image and a question on page Explorer: of a data set, or the user's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st
from PIL import Image

from workbench.dashboard.site import Site, choice, complain, plain, write_address
from workbench.dashboard.strip import strip
from workbench.dashboard.thumbnails import FETCHED, check_here, dataset, paths_of
from workbench.data import DATASETS, Object, Sample
from workbench.data.folder import QUESTION
from workbench.data.images import embedded, image_hash, image_size, look_at, read_image, shown
from workbench.data.sources import is_here
from workbench.errors import DataError, WorkbenchError

BROWSED = 100  # images to browse, unless the address names another one
OTHERS = 30  # images with whose objects a map is compared
MEGABYTES, MEGAPIXELS = 20, 40  # of an image of the user's own, at most
OWN_IMAGE, OWN_QUESTION = "upload:", "text:"  # how the address names what is not of a data set
FILES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
PASTE = """
export default function({ parentElement, setTriggerValue, data }) {
  const paste = (event) => {
    const item = [...(event.clipboardData?.items ?? [])].find((one) => one.type.startsWith('image/'));
    if (!item) return;
    const reader = new FileReader();
    reader.onload = () => setTriggerValue('image', reader.result);
    const file = item.getAsFile();
    if (file.size > data.limit) setTriggerValue('image', 'too large');
    else reader.readAsDataURL(file);
  };
  document.addEventListener('paste', paste);
  return () => document.removeEventListener('paste', paste);
}
"""


@dataclass(frozen=True)
class Asked:
    """An image and a question.

    Attributes:
        sample: the question; one of the user's own has no answer and no options.
        image: upright and in RGB.
        pixels: `image_hash` of it.
        stored: whether the question is one of a data set, so that models may have stored an answer to it.
        data: the data set, "" for an image of the user's own.
        others: objects of other images of it.
    """

    sample: Sample
    image: Image.Image
    pixels: bytes
    stored: bool
    data: str = ""
    others: tuple[Object, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """What of the question decides what is shown."""
        return self.sample.id, self.sample.question, self.sample.options


def choose(site: Site, keys: list[str]) -> Asked:
    """Draw the choice of data, image and question.

    Args:
        site: the models.
        keys: of the models that are looked at; the data of the first one's evaluation is shown at first.

    Raises:
        DataError: the data set or the image cannot be read.
    """
    left, middle, right = st.columns([3, 3, 2], vertical_alignment="bottom")
    with right:
        own = _own_image()
    spec: str = ""
    others: tuple[Object, ...] = ()
    if own is not None:
        image = own.image
        left.text_input("Image", own.name, disabled=True)
        scene = [Sample(own.image_id, own.image_id, lambda: image)]
        write_address("i", [own.image_id])
    else:
        spec, scene, others = _scene(site, keys, left, middle)
        image = scene[0].image
    sample, stored = _question(scene, own=own is not None)
    return Asked(sample, image, image_hash(image), stored, spec, others)


# --- images of a data set -------------------------------------------------------------------------


def _scene(site: Site, keys: list[str], left: Any, right: Any) -> tuple[str, list[Sample], tuple[Object, ...]]:
    """Draw the choice of a data set and of one of its images.

    Returns:
        The data set, the questions about the image, and objects of other images.
    """
    listed = _listed(site, keys)
    with left:
        spec = _spec(site, listed)
    named, asked = st.query_params.get("i", ""), st.query_params.get("q", "")
    if named.startswith(OWN_IMAGE):  # what was uploaded stays with the session that did it
        if named != st.session_state.get("own-left"):
            complain("i", named, f"the first of {spec} (an uploaded image stays in its session)")
        del st.query_params["i"]
        named = ""
    scenes = _scenes(spec, BROWSED)
    if (named and named not in scenes) or (asked and not asked.startswith(OWN_QUESTION)):
        of_question = next((i for i, scene in scenes.items() if any(s.id == asked for s in scene)), None)
        if of_question is None or named not in ("", of_question):
            scenes = _scenes(spec, None)
            of_question = next((i for i, scene in scenes.items() if any(s.id == asked for s in scene)), None)
        if not named and of_question is not None:  # a question names its image
            st.query_params["i"] = of_question
    names = list(scenes)
    with right, st.container(horizontal=True, vertical_alignment="bottom"):
        image = choice("i", names, names[0], "Image", listed=True)
        st.button("←", key="previous", help="Previous image", on_click=_step, args=(names, image, -1))
        st.button("→", key="next", help="Next image", on_click=_step, args=(names, image, 1))
    strip(spec, scenes, image, "i")
    beside = [scene[0] for name, scene in scenes.items() if name != image][:OTHERS]
    return spec, list(scenes[image]), tuple(item for sample in beside for item in sample.objects)


def _step(names: list[str], image: str, by: int) -> None:
    st.session_state["i"] = names[(names.index(image) + by) % len(names)]


def _scenes(spec: str, limit: int | None) -> dict[str, list[Sample]]:
    return {scene[0].image_id: scene for scene in dataset(spec, limit).scenes}


def _listed(site: Site, keys: list[str]) -> list[str]:
    """Return the data sets that models were trained and evaluated with, and those that are on this machine."""
    specs: list[object] = [site.models.by_key[key].test_data for key in keys]
    for model in site.models.by_key.values():
        data = model.recipe.get("data", {}) if model.recipe else {}
        specs += [data.get("test"), data.get("val")]
    specs += ["shapes:val", "shapes:test"]
    here = [name for name, sources in FETCHED.items() if all(map(is_here, sources))]
    specs += [f"{name}:{split}" for name in here for split in ("val", "test")]
    return list(dict.fromkeys(spec for spec in specs if isinstance(spec, str) and spec))


def _spec(site: Site, listed: list[str]) -> str:
    named = st.query_params.get("data", "")
    typed = st.session_state.get("data", "")
    for spec in (named, typed):
        if spec and spec not in listed:
            try:
                check_spec(site, spec)
                dataset(spec, 1)
            except WorkbenchError as error:
                st.error(plain(error))
                st.session_state.pop("data", None)
                if spec == named:
                    del st.query_params["data"]
            else:
                listed.append(spec)
    return choice(
        "data",
        listed,
        listed[0],
        "Data",
        listed=True,
        accept_new_options=True,
        help="One of the list, or any spec of a data set below the folder in which the dashboard was started, such as"
        " folder:photographs",
    )


def check_spec(site: Site, spec: str) -> None:
    """Refuse a data set that is outside the folders that the dashboard may read, or that must be fetched.

    Raises:
        UnknownNameError: no such data set.
        DataError: its files are elsewhere, or missing.
    """
    name, _, rest = spec.partition(":")
    DATASETS.get(name)
    roots = (site.root, Path.cwd().resolve())
    paths = paths_of(spec)
    for path in paths:
        if os.path.exists(path) and not any(path.resolve().is_relative_to(root) for root in roots):
            raise DataError(
                f"{shown(path)} is outside {roots[1]}, where the dashboard was started: expected a folder inside it;"
                " start the dashboard from a folder above both"
            )
    check_here(spec)
    if name not in ("shapes", *FETCHED) and not (paths and os.path.exists(paths[0])):  # hf: would ask the hub for it
        raise DataError(f"'{shown(rest)}' does not exist: expected {name}:PATH with a file or folder")


# --- an image of the user's own -------------------------------------------------------------------


@dataclass(frozen=True)
class OwnImage:
    """An image that was uploaded or pasted.

    Attributes:
        image_id: what the address calls it.
        name: its file's name.
        image: upright and in RGB.
        notes: what of it is not shown.
    """

    image_id: str
    name: str
    image: Image.Image
    notes: str


def _own_image() -> OwnImage | None:
    """Draw the upload of an image, and return the image that was uploaded or pasted last, None without one.

    It stays in the memory of this session and is never written.
    """
    state = st.session_state
    popover = st.popover("Your own image", width="stretch")
    with popover:
        file = st.file_uploader("An image file", FILES, key="upload", max_upload_size=MEGABYTES, on_change=_removed)
        st.caption("Or paste one anywhere on this page (Ctrl+V). It stays in this session's memory.")
    with st.container(key="paste-place"):  # takes no room (shell.STYLE)
        pasted = _paste()(key="paste", data={"limit": MEGABYTES << 20}, on_image_change=lambda: None).image
    if pasted:
        _take(lambda: _pasted(pasted), "pasted image")
    elif file is not None and file.file_id != state.get("own-file"):
        _take(file.getvalue, file.name)
    state["own-file"] = file.file_id if file else ""
    if "own-image" in state and popover.button("Back to the data set", key="no-own"):
        state["own-left"] = state.pop("own-image").image_id
        st.rerun()
    if "own-error" in state:
        st.error(plain(state["own-error"]))
    own: OwnImage | None = state.get("own-image")
    if own is not None and own.notes:
        st.caption(plain(own.notes))
    return own


def _removed() -> None:
    """Go back to the data set when the file is taken out of the upload."""
    st.session_state.pop("own-error", None)
    if st.session_state["upload"] is None and "own-image" in st.session_state:
        st.session_state["own-left"] = st.session_state.pop("own-image").image_id


def _take(content: Callable[[], bytes], name: str) -> None:
    """Remember an image, or why it cannot be shown."""
    st.session_state.pop("own-error", None)
    try:
        image, notes = own_image(content(), name)
    except DataError as error:
        st.session_state.pop("own-image", None)
        st.session_state["own-error"] = str(error)
    else:
        image_id = f"{OWN_IMAGE}{image_hash(image).hex()[:8]}"
        st.session_state["own-image"] = OwnImage(image_id, name, image, notes)


def _pasted(text: str) -> bytes:
    """Return the bytes of a pasted image.

    Raises:
        DataError: it is too large.
    """
    content = embedded(text)
    if content is None:
        raise DataError(f"the pasted image has more than {MEGABYTES} MB: expected a smaller one")
    return content


@st.cache_resource(show_spinner=False)
def _paste() -> Any:
    return st.components.v2.component("pasted_image", js=PASTE)


def own_image(content: bytes, name: str) -> tuple[Image.Image, str]:
    """Return an uploaded image, upright and in RGB, and a sentence about what of it is not shown ("" if nothing).

    Raises:
        DataError: it is no image, or larger than MEGAPIXELS.
    """
    width, height = image_size(content, name)
    if width * height > MEGAPIXELS * 1e6:
        raise DataError(
            f"image {shown(name)} has {width} x {height} pixels: expected at most {MEGAPIXELS} million pixels"
        )
    frames = look_at(content, name, lambda opened: int(getattr(opened, "n_frames", 1)))
    return read_image(content, name), f"The first of {frames} frames is shown." if frames > 1 else ""


# --- questions ------------------------------------------------------------------------------------


def _question(scene: list[Sample], *, own: bool) -> tuple[Sample, bool]:
    """Draw the choice of a question of the data, or of one's own; return it, and whether it is one of the data."""
    questions = {sample.id: sample for sample in scene}
    named = st.query_params.get("q", "")
    if named.startswith(OWN_QUESTION) and named != st.session_state.get("own-q-address"):  # opened or followed
        st.session_state["own-question"] = named.removeprefix(OWN_QUESTION)
    typed = str(st.session_state.get("own-question") or "").strip()
    left, right = st.columns(2)
    label = "Your question" if own else "Or a question of your own"
    right.text_input(label, key="own-question", placeholder=QUESTION, max_chars=2000)
    with left:
        if typed or own:
            why = "none: your own question is asked" if typed else "none: the image is your own"
            st.text_input("Question of the data", why, disabled=True, key="no-question")
            st.session_state["own-q-address"] = f"{OWN_QUESTION}{typed}"
            write_address("q", [f"{OWN_QUESTION}{typed}"], shown=bool(typed))
            first = scene[0]
            return Sample(first.id, first.image_id, first.load, typed or QUESTION, objects=first.objects), False
        if named.startswith(OWN_QUESTION):
            del st.query_params["q"]
        chosen = choice(
            "q",
            list(questions),
            next(iter(questions)),
            "Question of the data",
            listed=True,
            format_func=lambda key: f"{questions[key].question}  ({questions[key].category})",
        )
    return questions[chosen], True
