"""One image and question: the answers of several models, and maps of their visual tokens.

The maps show principal components of the tokens of each layer, beside those of a VFM's patches. They are for looking
at: a single answer or map is no measurement.
"""

from __future__ import annotations

import streamlit as st
from PIL import Image

from workbench.capture.hidden_states import read
from workbench.dashboard.folders import below_root
from workbench.dashboard.site import Site, choice, plain
from workbench.data import Dataset, Sample, load_data
from workbench.metrics.geometry import joint_pca_rgb
from workbench.mllm import MLLM
from workbench.spatial.grids import colors_to_image, whole_image
from workbench.training_folder import RECORD_FILE
from workbench.vfm import CATALOGUE, VFM, load_vfm
from workbench.weights.fetch import available_without_hub

SCENES = 100  # images to browse, unless the address names another one


@st.cache_resource(max_entries=4, show_spinner="Loading the model")
def _model(folder: str, changed: float) -> MLLM:
    return MLLM.load(folder)


@st.cache_resource(max_entries=2, show_spinner="Loading the vision foundation model")
def _vfm(name: str) -> VFM:
    return load_vfm(name)


@st.cache_resource(max_entries=2)
def _data(spec: str, limit: int | None) -> Dataset:
    return load_data(spec, limit=limit)


def page(site: Site) -> None:
    """Draw one image and question: the chosen models' answers and their maps.

    The address names the image (`i`) and the question (`q`); without them it is the first one.
    """
    finished = [key for key in site.chosen if site.models.by_key[key].state == "finished"]
    if not finished:
        st.info("No finished model is chosen. Train one with `python -m trainer shapes_viral`, or run `viral demo`.")
        return
    pair = [model.key for model in site.pair.shared[0]] if site.pair else []
    two = [key for key in pair if key in finished] or finished[:2]
    left, middle, right = st.columns(3)
    chosen = left.multiselect("Models side by side", finished, default=two, key="em", max_selections=4)
    vfms = [name for name in CATALOGUE if available_without_hub(CATALOGUE.get(name).weights)]
    vfm = middle.selectbox("Vision foundation model", vfms, key="v", bind="query-params")
    specs = list(dict.fromkeys([site.models.by_key[two[0]].test_data or "shapes:val", "shapes:val", "shapes:test"]))
    spec = right.selectbox("Data", specs, key="data", bind="query-params")
    if not chosen:
        st.info("Choose one or more models.")
        return
    sample = _sample(spec)
    folders = {name: below_root(name) for name in chosen}
    loaded = {name: _model(str(folder), (folder / RECORD_FILE).stat().st_mtime) for name, folder in folders.items()}
    left, right = st.columns([1, 2], gap="large")
    with left:
        st.image(sample.image.resize((448, 448), Image.Resampling.LANCZOS), width="stretch")
        if sample.objects:
            st.caption(plain("In the image: " + ", ".join(obj.name for obj in sample.objects)))
    with right:
        _answers(loaded, sample)
        _maps(loaded, vfm, sample)


def _sample(spec: str) -> Sample:
    """Draw the choice of an image and a question, and return the question."""
    named, asked = st.query_params.get("i"), st.query_params.get("q")
    scenes = {scene[0].image_id: scene for scene in _data(spec, None if named or asked else SCENES).scenes}
    if named is None and asked is not None:  # a question names its image
        of_question = next((image for image, scene in scenes.items() if any(s.id == asked for s in scene)), None)
        if of_question is not None:
            st.query_params["i"] = of_question
    default = next(iter(scenes))
    left, right = st.columns(2)
    with left:
        image = choice("i", list(scenes), default, "Image", listed=True)
    questions = {sample.id: sample for sample in scenes[image]}
    with right:
        question = choice(
            "q",
            list(questions),
            next(iter(questions)),
            "Question",
            listed=True,
            format_func=lambda key: f"{questions[key].question}  ({questions[key].category})",
        )
    return questions[question]


def _answers(loaded: dict[str, MLLM], sample: Sample) -> None:
    st.subheader(plain(sample.question))
    for column, (name, mllm) in zip(st.columns(len(loaded) + 1), loaded.items(), strict=False):
        answer = mllm.generate(mllm.encode([sample.image], [sample.question]), max_new_tokens=4)[0]
        column.metric(
            name,
            answer or "(empty)",
            "right" if answer == sample.answer else "wrong",
            delta_color="normal" if answer == sample.answer else "inverse",
            delta_arrow="off",
        )
    st.caption(f"Right answer: **{plain(sample.answer)}** · chance {sample.chance:.0%} · one question, so no interval")


def _maps(loaded: dict[str, MLLM], vfm_name: str, sample: Sample) -> None:
    tokens = {}
    for name, mllm in loaded.items():
        batch = mllm.encode([sample.image], [sample.question])
        part, whole = whole_image(mllm.visual_tokens(batch)[0])
        assert whole.grid is not None
        tokens[name] = read(mllm, batch)[0].values[:, part], whole.grid
    grid = next(iter(tokens.values()))[1]
    layers = min(values.shape[0] for values, _ in tokens.values())
    layer = st.slider("Layer", 0, layers - 1, layers // 2, key="l", bind="query-params")
    widths = {values.shape[-1] for values, _ in tokens.values()}
    if len(widths) == 1:
        colors = joint_pca_rgb([values for values, _ in tokens.values()])
    else:
        st.warning(f"The models' widths differ ({sorted(widths)}), so each has a basis of its own.")
        colors = [joint_pca_rgb([values])[0] for values, _ in tokens.values()]
    maps = {name: (rgb, size) for (name, (_, size)), rgb in zip(tokens.items(), colors, strict=True)}
    reference = joint_pca_rgb([_vfm(vfm_name)([sample.image], grid=grid).tokens()])[0][0]
    columns = st.columns(len(maps) + 1)
    for column, (name, (rgb, size)) in zip(columns, maps.items(), strict=False):
        column.image(colors_to_image(rgb[layer], size, 300), caption=f"{name}, layer {layer}", width="stretch")
    columns[-1].image(colors_to_image(reference, grid, 300), caption=f"{vfm_name} (its own basis)", width="stretch")
    for name, (rgb, size) in maps.items():
        shared = " and models" if len(maps) > 1 and len(widths) == 1 else ""
        st.caption(
            f"{name}: layers 0 to {layers - 1}, first three principal components in one basis for all layers{shared}"
        )
        for column, number in zip(st.columns(layers), range(layers), strict=True):
            column.image(colors_to_image(rgb[number], size, 120), caption=str(number), width="stretch")
