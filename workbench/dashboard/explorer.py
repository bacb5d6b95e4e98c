"""Explorer: what one image and one question look like inside the models; the only page that loads models."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import streamlit as st

from workbench import runs
from workbench.analysis.discover import load_analysis
from workbench.analysis.exported import caption_of
from workbench.dashboard import again, asking, engine, token_maps, token_umap, viewer
from workbench.dashboard.analysis_figures import chosen_runs
from workbench.dashboard.asking import Asked
from workbench.dashboard.beside import ranked_heads, spread_of
from workbench.dashboard.engine import Engine
from workbench.dashboard.papers import chart, save_button, seeds_of
from workbench.dashboard.site import NOBODY, Site, cached, choice, plain, whole_number
from workbench.dashboard.thumbnails import as_asked
from workbench.dashboard.viewer_figure import Shown, Vfm, view_figure, what_is_shown
from workbench.data import named_objects
from workbench.errors import WorkbenchError
from workbench.figures import plain_name
from workbench.figures.caption import Caption
from workbench.looking import Alignment, Look, aligned_with, vfm_patches
from workbench.overview.answers import read_answers
from workbench.runs import Run
from workbench.vfm import CATALOGUE
from workbench.weights.fetch import available_without_hub

VIEWS = {
    "look": "One image and question",
    "maps": "Maps of stored images",
    "umap": "UMAP of tokens",
    "attention": "Attention maps",
    "words": "Words (logit lens)",
}
STORED = {"maps": "tokens", "umap": "tokens", "attention": "attention", "words": "logit_lens"}
DRAWN = {"attention": ("Attention over the image",), "words": ("Words over image",)}
VIEWER = "viewer"
TRAIN = "Train one with `python -m trainer shapes_viral`, or run `viral demo`."


def page(site: Site) -> None:
    """Draw one of the views."""
    st.title("What happens with this image and this question?")
    view = choice("view", list(VIEWS), "look", "View", format_func=VIEWS.__getitem__, label_visibility="collapsed")
    if view == "look":
        _look(site)
        return
    lists = site.stored.of(STORED[view], site.chosen)
    if not lists:
        models = shlex.join(site.words_of_models(site.chosen)) or "runs/baseline runs/viral"
        st.info(f"This view needs stored runs: `python -m analyses.{STORED[view]} --model {models}`")
        return
    shown = chosen_runs(site, STORED[view], f"run-{STORED[view]}-{view}")
    compared = {run.model: _loaded(str(run.folder), run.stamp) for run in shown}
    if view in DRAWN:
        _figures(STORED[view], DRAWN[view], compared)
    else:
        {"maps": token_maps.maps, "umap": token_umap.umap}[view](site, _same_images(compared))


@cached
def _loaded(folder: str, stamp: tuple[object, ...]) -> Run:
    from pathlib import Path

    return runs.load(Path(folder))


def _same_images(compared: Mapping[str, Run]) -> dict[str, Run]:
    """Return the runs that have the images of the first one, and warn of the others."""
    images = next(iter(compared.values())).record["data_fingerprint"]
    left_out = [label for label, run in compared.items() if run.record["data_fingerprint"] != images]
    if left_out:
        st.warning(plain(f"Not shown, because of other images: {', '.join(left_out)}."))
    return {label: run for label, run in compared.items() if label not in left_out}


def _figures(analysis: str, titles: tuple[str, ...], compared: Mapping[str, Run]) -> None:
    """Draw the figures of an analysis over stored images."""
    named = {plain_name(label): run for label, run in compared.items()}
    for title, figure in load_analysis(analysis).figures(named).items():
        if title.startswith(titles):
            st.subheader(plain(title))
            chart(figure, title, caption_of(title, figure, compared))


# --- one image and question -----------------------------------------------------------------------


def _look(site: Site) -> None:
    """Draw the choice of models, image and question, and what the models do with them."""
    finished = [key for key in site.chosen if site.models.by_key[key].state == "finished"]
    if not finished:
        st.info(f"No finished model is chosen. {TRAIN}")
        return
    pair = [model.key for model in site.pair.shared[0]] if site.pair else []
    two = [key for key in pair if key in finished] or finished[:2]
    left, middle, right = st.columns([2, 3, 2], vertical_alignment="bottom")
    with left:
        keys = [choice("left", finished, two[0], "Model on the left", listed=True)]
    if others := [key for key in finished if key != keys[0]]:
        with middle:
            default = next((key for key in two if key != keys[0]), others[0])
            beside = choice("right", [*others, NOBODY], default, "Model on the right")
            keys += [beside] if beside != NOBODY else []
    with right:
        vfm = _vfm_choice(site, two)
    asked = asking.choose(site, keys)
    answers = st.container(horizontal=True)
    ready: dict[str, tuple[Engine, Look]] = {}
    loaded: set[str] = st.session_state.setdefault("loaded", set())
    stored = {key: st.empty() for key in keys}
    for key in keys:
        if key not in loaded:  # it takes seconds to load; what its training stored is here at once
            with stored[key].container():
                _stored_answer(site, key, asked)
    for key in keys:
        try:
            with st.spinner(f"Asking {key}"):
                model = engine.engine_of(site, key)
                ready[key] = model, engine.seen_by(model, asked.image, asked.pixels, asked.sample)
            loaded.add(key)
            stored[key].empty()
        except WorkbenchError as error:
            loaded.discard(key)
            with stored[key].container():
                st.warning(f"{plain(key)} cannot be asked: {plain(error)}")
                _stored_answer(site, key, asked)
    if not ready:
        return
    with answers:
        for key, (model, seen) in ready.items():
            _answer(key, model, seen, asked)
    _right_answer(asked)
    _inside(site, ready, asked, vfm)


def _vfm_choice(site: Site, keys: Sequence[str]) -> str:
    """Draw the choice among VFMs on this machine; at first, the one that a model is aligned with."""
    here = [name for name in CATALOGUE if available_without_hub(CATALOGUE.get(name).weights)]
    aligned = [name for key in keys for name in site.models.by_key[key].vfms if name in here]
    if not here:
        return ""
    return choice("v", here, (aligned or here)[0], "Vision foundation model", listed=True)


def _answer(key: str, model: Engine, seen: Look, asked: Asked) -> None:
    """Draw a model's answer with the probabilities of the options."""
    sample = asked.sample
    with st.container(border=True):
        verdict = verdict_of(seen.answer, seen.options, sample.answer)
        answer = plain(seen.answer) or "(empty)"
        st.markdown(f"{plain(key)}: **{answer}** {verdict}{f' (cut at {len(seen.tokens)} tokens)' * seen.cut}")
        if seen.options:
            ranked = sorted(seen.options.items(), key=lambda item: -item[1])
            shares = " · ".join(f"{plain(option)} {share:.2f}" for option, share in ranked[:6])
            more = f" · and {len(ranked) - 6} more" if len(ranked) > 6 else ""
            st.caption(f"Probability among the {len(ranked)} options: {shares}{more}")
        if unknown := unknown_words(model, sample.question):
            st.caption(
                f"{plain(key)} does not know {plain(', '.join(unknown))}: each is read as one and the same token."
            )


def verdict_of(said: str, options: Mapping[str, float], right: str) -> str:
    """Return whether an answer is right, as Markdown, "" where no right answer is known.

    A sentence, as pretrained models give, may be right in other words: trainings on conversations are scored by the
    most likely option, so the verdict names it where it is the right one.
    """
    if not right:
        return ""
    if _bare(said) == _bare(right):
        return ":green[✓ right]"
    if options and max(options, key=lambda option: options[option]) == right:
        return f":orange[other words than “{plain(right)}”, which is its most likely option]"
    return ":red[✗ wrong]"


def _bare(text: str) -> str:
    return text.strip().rstrip(".").casefold()


def unknown_words(model: Engine, question: str) -> list[str]:
    """Return the words of a question for which the model's tokenizer has no token."""
    tokenizer = model.mllm.processor.tokenizer
    if tokenizer.unk_token_id is None:
        return []
    return [
        word
        for word in dict.fromkeys(question.split())
        if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False)["input_ids"]
    ]


def _stored_answer(site: Site, key: str, asked: Asked) -> None:
    """Draw the answer that a model's training stored, where it cannot be asked."""
    if not asked.stored:
        return
    try:
        table = read_answers(site.models.by_key[key])
    except WorkbenchError as error:
        st.caption(plain(error))
        return
    rows = table[table["id"] == asked.sample.id]
    rows = rows[as_asked(rows, [asked.sample] * len(rows), of=table)]
    if rows.empty or "given" not in rows:
        st.caption(plain(f"No answer of {key} to this question is stored."))
        return
    row = rows.iloc[0]
    verdict = ":green[✓ right]" if row["correct"] else ":red[✗ wrong]"
    chance = f", p of the right answer {row['p_right']:.2f}" if "p_right" in row else ""
    st.markdown(f"{plain(key)}, as stored when its training ended: **{plain(row['given'])}** {verdict}{chance}")


def _right_answer(asked: Asked) -> None:
    sample = asked.sample
    if sample.answer:
        st.caption(
            f"{plain(sample.question)} Right answer: **{plain(sample.answer)}** · chance {sample.chance:.0%} · one"
            " question, so no interval: an example, not a measurement"
        )
    else:
        st.caption(f"{plain(sample.question)} No right answer is known. An example, not a measurement.")


# --- inside the models ----------------------------------------------------------------------------


@st.fragment
def _inside(site: Site, ready: Mapping[str, tuple[Engine, Look]], asked: Asked, vfm: str) -> None:
    """Draw the viewer, keep what is chosen in it in the address, and let the question be asked again."""
    chosen = dict((st.session_state.get(VIEWER) or {}).get("chosen") or {})
    if not chosen:  # just opened
        count = max(len(one.hidden) for _, one in ready.values())
        numbers = [whole_number(name) for name in st.session_state.get("l-address", ())]
        of_layers = [str(number) for number in numbers if number is not None and number < count]
        st.session_state["viewer-start"] = dict(zip("l", of_layers, strict=False)) | {
            name: st.query_params[name] for name in viewer.STATE if name in st.query_params
        }
    start = st.session_state.get("viewer-start", {})
    layer = _first_layer(site, ready)
    seen = {name: one for name, (_, one) in ready.items()}
    now = _current(start | chosen, seen, layer)
    models = tuple((name, model.mllm.fingerprint, site.colors.get(name, "")) for name, (model, _) in ready.items())
    data = dict(_data(models, asked.pixels, asked.key, vfm, _parts(now, seen), layer, seen, asked))
    runs_here = tuple((run.key, run.changed) for run in site.stored.runs if run.analysis in ("attention", "cknna"))
    data["panels"] = [
        panel | _beside(model, asked.pixels, asked.key, vfm, runs_here, site, panel)
        for model, panel in zip(models, data["panels"], strict=True)
    ]
    result = viewer.viewer({**data, "start": start}, VIEWER)
    state = {name: str(result[name]) for name in viewer.STATE if name in result}
    if any(st.query_params.get(name) != value for name, value in state.items()):
        st.query_params.update(state)
        st.session_state["l-address"] = [state["l"]]  # Layers shows the same one
    now = _current(start | state, seen, layer)
    _save(site, now, seen, asked, vfm)
    engines = {name: model for name, (model, _) in ready.items()}
    again.draw(engines, seen, asked, now)


@cached
def _beside(
    model: tuple[str, str, str],
    pixels: bytes,
    question: tuple[object, ...],
    vfm: str,
    stored: tuple[object, ...],
    _site: Site,
    _panel: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what stored runs say about a model: its ranked heads, and the CKNNA of other images."""
    more: dict[str, Any] = {"ranked": [asdict(head) for head in ranked_heads(_site, model[0])]}
    if _panel["aligned"]:
        aligned = Alignment(_panel["aligned"]["s"], _panel["aligned"]["chance"])
        spread = spread_of(_site, model[0], vfm, aligned)
        more["spread"] = spread and asdict(spread)
    return more


def _save(site: Site, now: Mapping[str, str], seen: Mapping[str, Look], asked: Asked, vfm: str) -> None:
    """Draw the button that saves what the viewer shows."""
    first = next(iter(seen.values()))
    corners = again.patches_of(now["p"], first.grid)
    assert corners is not None
    shown = Shown(now["show"], int(now["l"]), int(now["t"]), None if now["h"] == "mean" else int(now["h"]), corners)

    def draw() -> Any:
        beside = Vfm(vfm, _patches(vfm, asked, first), first.place) if vfm else None
        return view_figure(shown, seen, asked.image, beside)

    answers = ", ".join(f"{name} answers “{one.answer or '(empty)'}”" for name, one in seen.items())
    image = f"Image {asked.sample.image_name}{f' of {asked.data}' if asked.data else ''}"
    right = f"; right is “{asked.sample.answer}”" if asked.sample.answer else ""
    caption = Caption(
        f"{what_is_shown(shown, seen)}. {image}, asked “{asked.sample.question}”: {answers}{right}",
        "One image and one question: an example, not a measurement",
        seeds_of(site, list(seen)),
        "",
    )
    save_button(draw, "viewer", caption)


@cached
def _data(
    models: tuple[tuple[str, str, str], ...],
    pixels: bytes,
    question: tuple[object, ...],
    vfm: str,
    chosen: tuple[int, int],
    layer: int,
    _seen: Mapping[str, Look],
    _asked: Asked,
) -> dict[str, Any]:
    """Return all that the viewer shows, but for what is chosen at first.

    Args:
        models: name, fingerprint and color of each.
        pixels: `image_hash` of the image.
        question: `Asked.key`.
        vfm: name of the vision foundation model, "" for none.
        chosen: patch and row to which large arrays are cut (`_parts`).
        layer: to show first.
    """
    objects = list(named_objects(_asked.sample, 2) or named_objects(_asked.sample, 1))
    panels = []
    for name, fingerprint, color in models:
        aligned = _alignment(fingerprint, vfm, pixels, question, _seen[name], _asked) if vfm else None
        panels.append(viewer.panel_of(name, color, _seen[name], objects, _asked.others, aligned, chosen))
    colors, basis = viewer.colors_of(list(_seen.values()))
    first = next(iter(_seen.values()))
    return {
        **viewer.shared(_asked.image, objects, layer),
        "panels": [panel | {"pca": rgb} for panel, rgb in zip(panels, colors, strict=True)],
        "basis": basis,
        "vfm": viewer.panel_of_vfm(vfm, _patches(vfm, _asked, first), first.place) if vfm else None,
    }


def _current(chosen: Mapping[str, str], seen: Mapping[str, Look], layer: int) -> dict[str, str]:
    """Return the view, layer, row, head and region that the viewer shows: what is chosen, unless it does not fit.

    Args:
        chosen: of the address or the viewer.
        seen: the looks of the models.
        layer: that is shown if none, or none that fits, is chosen.
    """
    first = next(iter(seen.values()))
    rows, columns = first.grid
    heads = max(one.attention.shape[2] for one in seen.values())
    layers = max(len(one.hidden) for one in seen.values())
    read = max(len(one.tokens) for one in seen.values()) + 1
    sizes = {"h": heads, "l": layers, "t": read}
    now = {"show": "attention", "l": str(layer), "t": "0", "h": "mean", "p": f"{rows // 2},{columns // 2}"}
    if chosen.get("show") in viewer.SHOW:
        now["show"] = chosen["show"]
    for key, size in sizes.items():
        number = whole_number(chosen.get(key, ""))
        if number is not None and number < size:
            now[key] = str(number)
    if again.patches_of(chosen.get("p", ""), first.grid):
        now["p"] = chosen["p"]
    return now


def _parts(now: Mapping[str, str], seen: Mapping[str, Look]) -> tuple[int, int]:
    """Return the chosen patch and row if the viewer receives large arrays for them alone, else 0 and 0."""
    first = next(iter(seen.values()))
    corners = again.patches_of(now["p"], first.grid)
    if corners is None or not any(map(viewer.is_cut, seen.values())):
        return 0, 0
    return corners[0] * first.grid[1] + corners[1], int(now["t"])


def _first_layer(site: Site, ready: Mapping[str, tuple[Engine, Look]]) -> int:
    """Return the layer to show first: the one that is aligned, else the middle one."""
    aligned = [layer for key in ready for layer in site.models.by_key[key].layers]
    return aligned[0] if aligned else len(next(iter(ready.values()))[1].hidden) // 2


@cached
def _features(vfm: str, pixels: bytes, place: tuple[object, ...], _asked: Asked, _seen: Look):  # type: ignore[no-untyped-def]
    return vfm_patches(engine.vfm_named(vfm), _asked.image, _seen.place)


def _patches(vfm: str, asked: Asked, seen: Look):  # type: ignore[no-untyped-def]
    return _features(vfm, asked.pixels, (seen.grid, seen.place.box), asked, seen)


@cached
def _alignment(
    model: str, vfm: str, pixels: bytes, question: tuple[object, ...], _seen: Look, _asked: Asked
) -> Alignment | str:
    return aligned_with(_seen, _patches(vfm, _asked, _seen))
