"""The Scene page: one image and question, the answers of several models, and maps of their visual tokens.

The maps show principal components of the tokens of each layer, beside those of a VFM's patches. They are for looking
at: a single answer or map is no measurement.
"""

from __future__ import annotations

import streamlit as st
from PIL import Image

from workbench.capture.hidden_states import read
from workbench.dashboard.folders import below_root, default_models, trained_models
from workbench.data import Dataset, Sample, load_data
from workbench.metrics.geometry import joint_pca_rgb
from workbench.mllm import MLLM
from workbench.spatial.grids import colors_to_image, whole_image
from workbench.training_folder import RECORD_FILE
from workbench.vfm import CATALOGUE, VFM, load_vfm
from workbench.weights.fetch import available_without_hub

SCENES = 100  # of the validation split, to browse


@st.cache_resource(max_entries=4, show_spinner="Loading the model")
def _model(folder: str, changed: float) -> MLLM:
    return MLLM.load(folder)


@st.cache_resource(max_entries=2, show_spinner="Loading the vision foundation model")
def _vfm(name: str) -> VFM:
    return load_vfm(name)


@st.cache_resource(max_entries=2)
def _data(spec: str) -> Dataset:
    return load_data(spec, limit=SCENES)


def page() -> None:
    """Draw one scene: the question, the chosen models' answers and their maps."""
    st.title("Scene")
    models = trained_models(finished=True)
    if not models:
        st.info(
            "No finished model is stored yet. Train one with `python -m trainer shapes_viral`, or run `viral demo`."
        )
        return
    with st.sidebar:
        chosen = st.multiselect(
            "Models", models, default=default_models(models), key="models", max_selections=4, bind="query-params"
        )
        vfms = [name for name in CATALOGUE if available_without_hub(CATALOGUE.get(name).weights)]
        vfm = st.selectbox("Vision foundation model", vfms, key="vfm", bind="query-params")
        scenes = _data("shapes:val").scenes
        number = st.number_input("Scene", 0, len(scenes) - 1, 0, key="scene", bind="query-params")
    if not chosen:
        st.info("Choose one or more models.")
        return
    samples = scenes[number]
    loaded = {name: _model(str(below_root(name)), (below_root(name) / RECORD_FILE).stat().st_mtime) for name in chosen}
    left, right = st.columns([1, 2], gap="large")
    with left:
        sample = _question(samples)
        st.image(sample.image.resize((448, 448), Image.Resampling.LANCZOS), width="stretch")
        st.caption("In the scene: " + ", ".join(obj.name for obj in sample.objects))
    with right:
        _answers(loaded, sample)
        _maps(loaded, vfm, sample)


def _question(samples: list[Sample]) -> Sample:
    by_text = {f"{sample.question}  ({sample.category})": sample for sample in samples}
    return by_text[st.selectbox("Question", list(by_text), key="question")]


def _answers(loaded: dict[str, MLLM], sample: Sample) -> None:
    st.subheader(sample.question)
    for column, (name, mllm) in zip(st.columns(len(loaded) + 1), loaded.items(), strict=False):
        answer = mllm.generate(mllm.encode([sample.image], [sample.question]), max_new_tokens=4)[0]
        column.metric(
            name,
            answer or "(empty)",
            "right" if answer == sample.answer else "wrong",
            delta_color="normal" if answer == sample.answer else "inverse",
            delta_arrow="off",
        )
    st.caption(f"Right answer: **{sample.answer}** · chance {sample.chance:.0%} · one question, so no interval")


def _maps(loaded: dict[str, MLLM], vfm_name: str, sample: Sample) -> None:
    tokens = {}
    for name, mllm in loaded.items():
        batch = mllm.encode([sample.image], [sample.question])
        part, whole = whole_image(mllm.visual_tokens(batch)[0])
        assert whole.grid is not None
        tokens[name] = read(mllm, batch)[0].values[:, part], whole.grid
    grid = next(iter(tokens.values()))[1]
    layers = min(values.shape[0] for values, _ in tokens.values())
    layer = st.slider("Layer", 0, layers - 1, layers // 2, key="layer", bind="query-params")
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
