"""Page Explorer: what it shows is what the library computes, what it is asked may be anything, and the address
restores it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from streamlit.testing.v1 import AppTest

from tests.workbench.dashboard.test_dashboard import CHROMIUM, chromium_or_skip, open_page, serve, share, text_of
from tests.workbench.overview.folders import train
from workbench.capture.attention import attention
from workbench.changing import Change, ask_again
from workbench.dashboard import again, asking, engine, viewer
from workbench.dashboard.beside import ranked_heads, spread_of
from workbench.dashboard.explorer import verdict_of
from workbench.dashboard.site import Site
from workbench.dashboard.viewer_figure import Shown, view_figure, what_is_shown
from workbench.data import Object, load_data
from workbench.data.base import asked_object
from workbench.errors import DataError
from workbench.figures.point_table import drawn_points
from workbench.looking import Alignment, Look, aligned_with, look, vfm_patches
from workbench.metrics.geometry import joint_pca_rgb, similarity_to
from workbench.mllm import MLLM
from workbench.overview.models import read_models
from workbench.overview.stored import read_stored
from workbench.vfm import load_vfm


def decoded(text: str, kind: type = np.float32) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


# --- what the viewer receives ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def mllm(runs_folder: Path) -> MLLM:
    return MLLM.load(str(runs_folder / "viral"), validate=False)


@pytest.fixture(scope="module")
def seen(mllm: MLLM) -> Look:
    sample = load_data("shapes:val", limit=1)[0]
    return look(mllm, sample.image, sample.question, options=sample.options)


def test_the_viewer_receives_the_numbers_of_the_library(mllm: MLLM, seen: Look) -> None:
    sample = load_data("shapes:val", limit=1)[0]
    panel = viewer.panel_of("viral", "#123456", seen, sample.objects, (), None, (0, 0))
    json.dumps(panel)
    batch = mllm.encode([sample.image], [sample.question])
    blocks = torch.stack([block[0] for block in attention(mllm, batch, rows=[[-1]])])
    index = mllm.visual_tokens(batch)[0][0].index
    rows = len(panel["rows"])
    shape = (rows, panel["layers"] - 1, panel["heads"], 64)
    sent = decoded(panel["attention"]["v"]).reshape(shape)
    assert np.allclose(sent[0], blocks[:, :, 0, index].float(), atol=1e-6)
    assert np.allclose(decoded(panel["mass"]).reshape(shape[:3])[0], blocks[:, :, 0, index].sum(-1), atol=1e-6)
    cosine = decoded(panel["cosine"]["v"]).reshape(64, panel["layers"], 64)
    for patch, layer in ((0, 0), (9, 2), (63, 3)):
        assert np.allclose(cosine[patch, layer], similarity_to(seen.hidden[layer].float(), patch), atol=1e-6)
    colors, basis = viewer.colors_of([seen, seen])
    expected = joint_pca_rgb([seen.hidden.float()] * 2)
    assert (decoded(colors[1], np.uint8) == (expected[1] * 255).round().astype(np.uint8).ravel()).all()
    assert basis == "One basis for all layers of both models"
    assert panel["x"][0][0] == panel["y"][0][0] == 0
    assert panel["x"][-1][1] == panel["y"][-1][1] == 1
    for item, covered in zip(sample.objects, panel["covered"], strict=True):
        assert sum(covered) / 64 == pytest.approx(item.mask.mean(), abs=1e-6)  # the object's share of the image


def test_the_saved_figure_has_the_numbers_of_the_library(seen: Look) -> None:
    sample = load_data("shapes:val", limit=1)[0]
    corners = (2, 3, 4, 5)

    def drawn(view: str, head: int | None = None) -> pd.DataFrame:
        shown = Shown(view, 2, 0, head, corners)
        points = drawn_points(view_figure(shown, {"<b>m</b>": seen}, sample.image, None))
        assert points["panel"].str.startswith("<b>m</b>").all()
        return points

    edges = np.linspace(0, sample.image.width, 9)
    attended = drawn("attention", 1)
    assert attended["value"].to_numpy() == pytest.approx(seen.attention[0, 1, 1].numpy())
    assert attended["x"].to_numpy()[:8] == pytest.approx((edges[:-1] + edges[1:]) / 2)
    assert f"on the image: {seen.mass[0, 1, 1]:.1%} (chance {seen.uniform[0]:.1%})" in attended["panel"][0]
    assert drawn("attention")["value"].to_numpy() == pytest.approx(seen.attention[0, 1].mean(0).numpy())
    cosine = similarity_to(seen.hidden[2].float(), 2 * 8 + 3)
    assert drawn("similarity")["value"].to_numpy() == pytest.approx(cosine.numpy())
    colors = (joint_pca_rgb([seen.hidden.float()])[0][2] * 255).round().astype(int)
    assert drawn("pca")["label"].tolist() == ["#{:02x}{:02x}{:02x}".format(*color) for color in colors]
    assert seen.words is not None
    words = drawn("words")
    best = [seen.words.texts[token] for token in seen.words.ids[2, :, 0].tolist()]
    assert all(best[n].startswith(text.rstrip("…")) for n, text in enumerate(words["label"].dropna()))
    assert words["value"].dropna().to_numpy() == pytest.approx(seen.words.probabilities[2, :, 0].numpy())
    large = view_figure(Shown("pca", 2, 0, None, corners), {"m": seen}, Image.new("RGB", (6000, 3000)), None)
    assert len(large.to_json()) < 100_000
    assert what_is_shown(Shown("attention", 0, 0, None, corners), {"m": seen}) == (
        "Attention from the end of the question on each patch, layer 0 (the projector), mean of heads"
    )


def test_objects_of_other_images_are_compared_by_where_they_are(seen: Look) -> None:
    left, right = (Object("x", (at, 0.0, at + 0.5, 1.0)) for at in (0.0, 0.5))
    panel = viewer.panel_of("m", "", seen, [left], [left, right], None, (0, 0))
    assert panel["others"] == pytest.approx([1.0] * 64)
    panel = viewer.panel_of("m", "", seen, [left], [left], None, (0, 0))
    assert panel["others"] == pytest.approx([2.0, 2, 2, 2, 0, 0, 0, 0] * 8)
    assert viewer.panel_of("m", "", seen, [], [left], None, (0, 0))["others"] == []


def test_arrays_that_are_too_large_come_for_what_is_chosen(seen: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = viewer.panel_of("m", "", seen, (), (), None, (0, 0))
    monkeypatch.setattr(viewer, "LIMIT", 1000)
    panel = viewer.panel_of("m", "", seen, (), (), None, (9, 0))
    assert (panel["cosine"]["at"], panel["attention"]["at"]) == (9, 0)
    length = 64 * panel["layers"]
    all_of_it = decoded(whole["cosine"]["v"])
    assert (decoded(panel["cosine"]["v"]) == all_of_it[9 * length : 10 * length]).all()


def test_a_region_of_the_address(seen: Look) -> None:
    assert again.patches_of("1,2", (8, 8)) == (1, 2, 1, 2)
    assert again.patches_of("1,2-3,0", (8, 8)) == (1, 2, 3, 0)
    for wrong in ("", "8,0", "0,8", "1", "1,2-9,1", "-1,2", "a,b", "1,2-"):
        assert again.patches_of(wrong, (8, 8)) is None
    assert again.region_of("1,2-3,0", seen) == (0.0, 0.125, 0.375, 0.5)
    assert again.region_of("77,1", seen) == (0.5, 0.5, 0.625, 0.625)  # the central patch


# --- stored runs beside one image -----------------------------------------------------------------


def site_of(root: Path) -> Site:
    stored = read_stored(root)
    return Site(root, stored, read_models(root, stored.runs), {})


def test_an_image_of_a_stored_run_has_its_place_among_the_others(
    runs_folder: Path, mllm: MLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(runs_folder)])
    site = site_of(runs_folder)
    sample = load_data("shapes:val", limit=3)[0]
    seen = look(mllm, sample.image, sample.question)
    aligned = aligned_with(seen, vfm_patches(load_vfm("dinov2-small"), sample.image, seen.place))
    assert isinstance(aligned, Alignment)
    table = site.stored.of("cknna", ["viral"])[0][0].table("per_image")
    mine = table[table["image_id"] == sample.image_id].sort_values("layer")["score"]
    assert aligned.scores == pytest.approx(mine.tolist(), abs=2e-3)  # hidden states of a look are float16
    aligned = replace(aligned, scores=tuple(mine + 1e-9))
    spread = spread_of(site, "viral", "dinov2-small", aligned)
    assert spread is not None
    assert (spread.images, spread.data) == (6, "shapes:val")
    for layer, part in table.groupby("layer")["score"]:
        assert spread.below[int(layer)] == pytest.approx((part <= mine.iloc[int(layer)]).mean())
        assert spread.low[int(layer)] == pytest.approx(part.quantile(0.05))
    assert spread_of(site, "viral", "efficientnet-lite0", aligned) is None
    assert spread_of(site, "nobody", "dinov2-small", aligned) is None


def test_heads_are_ranked_by_the_newest_run_that_read_the_end_of_the_question(tmp_path: Path) -> None:
    def stored(key: str, created: str, heads: list[int], **config: object) -> None:
        folder = tmp_path / f"attention-{key}"
        folder.mkdir()
        numbers = {"pointing": 0.5, "low": 0.4, "high": 0.6, "null_mean": 0.1, "p_holm": 0.01, "n_images": 9, "n": 20}
        pd.DataFrame([{"rank": n, "layer": 2, "head": head} | numbers for n, head in enumerate(heads)]).to_parquet(
            folder / "heads.parquet"
        )
        save_file({"values": torch.zeros(1)}, folder / "tensors.safetensors")
        record = {"analysis": "attention", "model": "m", "label": "m", "config": config, "key": key, "seed": 0}
        record |= {"tables": ["heads"], "created": created, "data": "shapes:val"}
        (folder / "run.json").write_text(json.dumps(record))

    train(tmp_path, "m", right=share(0.5))
    stored("a", "2026-02-01", [3, 1])
    stored("b", "2026-02-02", [2, 0])
    stored("c", "2026-02-03", [1], positions="generated")
    heads = ranked_heads(site_of(tmp_path), "m")
    assert [(head.layer, head.head) for head in heads] == [(2, 2), (2, 0)]
    assert (heads[0].share, heads[0].others, heads[0].images, heads[0].questions) == (0.5, 0.1, 9, 20)
    (tmp_path / "attention-b" / "heads.parquet").unlink()
    assert [head.head for head in ranked_heads(site_of(tmp_path), "m")] == [3, 1]
    assert ranked_heads(site_of(tmp_path), "other") == []


# --- waiting and remembering ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "options", "words"),
    [
        ("red", {}, "✓ right"),
        ("Red.", {"red": 0.1, "blue": 0.9}, "✓ right"),
        ("The object is red.", {"red": 0.9, "blue": 0.1}, "its most likely option"),
        ("The object is red.", {"red": 0.1, "blue": 0.9}, "✗ wrong"),
        ("", {}, "✗ wrong"),
    ],
)
def test_an_answer_in_other_words_is_not_simply_wrong(said: str, options: dict[str, float], words: str) -> None:
    assert words in verdict_of(said, options, "red")
    assert not verdict_of(said, options, "")


def test_sessions_take_turns_in_order() -> None:
    turns, order, places = engine.Turns(), list[int](), dict[int, list[int]]()
    ready = threading.Event()

    def session(number: int) -> None:
        with turns.turn(places.setdefault(number, []).append):
            order.append(number)

    with turns.turn(lambda _: None):
        threads = []
        for number in range(3):
            threads.append(threading.Thread(target=session, args=(number,)))
            threads[-1].start()
            deadline = time.monotonic() + 10
            while not places.get(number):
                assert time.monotonic() < deadline
                ready.wait(0.01)
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2]
    assert [places[number][0] for number in range(3)] == [1, 2, 3]


def test_who_leaves_while_waiting_does_not_block_the_others() -> None:
    turns = engine.Turns()

    def leave(_: int) -> None:
        raise KeyboardInterrupt

    with turns.turn(lambda _: None), pytest.raises(KeyboardInterrupt), turns.turn(leave):
        pass
    with turns.turn(leave):  # nobody is before
        pass


def test_looks_are_forgotten_by_bytes(seen: Look) -> None:
    looks = engine.Looks(limit=int(2.5 * seen.nbytes))
    for key in "abc":
        looks.add(key, seen)
        looks.get("a")
    assert [looks.get(key) is not None for key in "abc"] == [True, False, True]


# --- an image of the user's own -------------------------------------------------------------------


def file_of(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **more)
    return content.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A PNG that says it is large, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_uploaded_images() -> None:
    red = Image.new("RGB", (40, 20), "red")
    image, notes = asking.own_image(file_of(red), "a.png")
    assert (image.size, image.getpixel((0, 0)), notes) == ((40, 20), (255, 0, 0), "")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert asking.own_image(file_of(red, "JPEG", exif=exif), "a.jpg")[0].size == (20, 40)
    frames = [red, Image.new("RGB", (40, 20), "blue")]
    image, notes = asking.own_image(file_of(red, "GIF", save_all=True, append_images=frames[1:]), "a.gif")
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert notes == "The first of 2 frames is shown."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"<!doctype html><html>", "it is a web page"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 50, "cannot be read"),
        (huge_png(10_000, 10_000), "has 10000 x 10000 pixels: expected at most 40 million pixels"),
        (huge_png(100_000, 100_000), "cannot be read"),
        (file_of(Image.new("RGB", (64, 64), "red"))[:60], "cannot be read"),
    ],
)
def test_uploads_that_are_no_image_are_one_sentence(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        asking.own_image(content, "x.png")
    assert "\n" not in str(raised.value)


# --- the page -------------------------------------------------------------------------------------


@pytest.fixture
def explorer(runs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AppTest]:
    app = open_page("explorer", runs_folder, monkeypatch)
    assert not app.error
    yield app
    assert not app.exception


def test_answers_of_both_models(explorer: AppTest, mllm: MLLM) -> None:
    sample = load_data("shapes:val", limit=100)[0]
    answer = mllm.generate(mllm.encode([sample.image], [sample.question]), max_new_tokens=16)[0]
    assert re.search(rf"viral: \*\*{re.escape(answer or '(empty)')}", text_of(explorer).replace("\\", ""))
    image = explorer.selectbox(key="i").options[5]
    explorer.selectbox(key="i").set_value(image).run()
    assert explorer.query_params["i"] == image
    explorer.button(key="next").click().run()
    assert explorer.selectbox(key="i").value == explorer.selectbox(key="i").options[6]
    explorer.button(key="previous").click().run()
    explorer.button(key="previous").click().run()
    assert explorer.selectbox(key="i").value == explorer.selectbox(key="i").options[4]


def test_the_model_on_the_right_can_be_left_out_and_the_two_exchanged(explorer: AppTest) -> None:
    def shown() -> list[str]:
        return re.findall(r"(baseline|viral): \*\*", text_of(explorer))

    assert shown() == ["baseline", "viral"]
    explorer.button_group(key="right").set_value("(none)").run()
    assert shown() == ["baseline"]
    assert explorer.query_params["right"] == "(none)"
    explorer.selectbox(key="left").set_value("viral").run()
    assert shown()[0] == "viral"
    assert "baseline" in explorer.button_group(key="right").options


def test_an_answer_is_cut_at_the_models_own_length(mllm: MLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = mllm.model.generation_config
    for own, expected in ((None, engine.ANSWER), (7, 7), (engine.LONGEST + 1, engine.LONGEST)):
        monkeypatch.setattr(settings, "max_new_tokens", own)
        assert engine._longest(mllm) == expected


def test_what_the_viewer_shows_is_saved_for_a_paper(explorer: AppTest) -> None:
    explorer.button(key="save-viewer").click().run()
    caption, script = (block.value for block in explorer.code[-2:])
    assert caption.startswith("Attention from the end of the question on each patch, layer 2, mean of heads. Image ")
    assert "an example, not a measurement; one training each (baseline seed 0, viral seed 0)." in caption
    assert re.search(r"on the image: [\d.]+% \(chance [\d.]+%\)", caption)
    assert "read_json" in script


def test_a_question_of_ones_own(explorer: AppTest, runs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explorer.text_input(key="own-question").set_value("what is the zebra ?").run()
    text = text_of(explorer)
    assert "No right answer is known" in text
    assert re.search(r"viral does not know .*zebra: ", text), text
    assert explorer.query_params["q"] == "text:what is the zebra ?"
    copied = open_page("explorer", runs_folder, monkeypatch, q="text:what is the zebra ?")
    assert copied.text_input(key="own-question").value == "what is the zebra ?"
    explorer.text_input(key="own-question").set_value("").run()
    assert "Right answer" in text_of(explorer)
    assert "q" not in explorer.query_params
    explorer.text_input(key="own-question").set_value("is <image> here ?").run()
    assert "placeholder" in text_of(explorer)


def test_the_question_is_asked_again(
    explorer: AppTest, mllm: MLLM, runs_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = load_data("shapes:val", limit=100)[0]
    before = look(mllm, sample.image, sample.question, options=sample.options, max_new_tokens=engine.ANSWER)
    explorer.selectbox(key="change").set_value("all").run()
    explorer.selectbox(key="change-at").set_value("layer").run()
    assert not len(explorer.dataframe)
    explorer.button(key="ask-again").click().run()
    table = explorer.dataframe[0].value
    assert list(table.columns) == ["baseline before", "baseline after", "viral before", "viral after"]
    reply = ask_again(mllm, sample, Change("mean", at=2), max_new_tokens=engine.ANSWER)  # layer 2 is aligned
    for name, one in (("viral before", before), ("viral after", reply)):
        assert table.loc["answer", name] == (one.answer or "(empty)")
        for option, share_of_it in one.options.items():
            assert float(table.loc[f"p of {option}", name]) == pytest.approx(share_of_it, abs=6e-4)
    address = {key: explorer.query_params[key] for key in list(explorer.query_params)}
    assert (address["change"], address["change-at"]) == ("all", "layer")
    copied = open_page("explorer", runs_folder, monkeypatch, **address)
    assert copied.dataframe[0].value.equals(table)
    explorer.selectbox(key="change").set_value("permute").run()
    assert not len(explorer.dataframe)  # no old answer under a new change


def test_links_that_no_longer_fit(runs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page("explorer", runs_folder, monkeypatch, i="gone", v="nothing", left="away")
    said = text_of(app)
    assert "The link names image gone, which is not here; shown is val-0-00000." in said
    assert "The link names VFM nothing" in said
    assert "The link names the model away" in said
    uploaded = open_page("explorer", runs_folder, monkeypatch, i="upload:12345678")
    assert "The link names image upload:12345678, which" in text_of(uploaded)


def test_other_data(explorer: AppTest, runs_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    photo = runs_folder / "photos" / "<b>x **y**.png"
    photo.parent.mkdir(exist_ok=True)
    Image.new("RGB", (50, 30), "green").save(photo)
    app = open_page("explorer", runs_folder, monkeypatch, data=f"folder:{photo.parent}")
    assert app.selectbox(key="i").value == photo.name
    assert "what is this ?" in text_of(app)
    Image.new("RGB", (50, 30), "green").save(tmp_path / "elsewhere.png")
    for spec, why in (
        (f"folder:{tmp_path}", "is outside"),
        ("folder:/etc", "is outside"),
        ("hf:someone/something", "does not exist"),
        ("nothing:val", "nothing"),
        ("shapes:vall", "val"),
    ):
        app = open_page("explorer", runs_folder, monkeypatch, data=spec)
        assert len(app.error) == 1, spec
        assert why in app.error[0].value.replace("\\", "")
        assert app.selectbox(key="data").value != spec


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("hf:someone/something", "does not exist"),
        ("hf:someone/something?images=.", "does not exist"),
        ("hf:someone/something?split=photos&images=photos", "does not exist"),
        ("llava_json:{outside}/a=b/x.json?images=.", "is outside"),
        ("llava_json:{outside}/a=b/x.json", "is outside"),
        ("llava_json:rows.json?images={outside}", "is outside"),
        ("llava_json:rows.json?images=photos&held={outside}", "is outside"),
        ("whatsup:rows.json?prompts=link", "is outside"),
        ("image:link/a=b/p.png?question=rows.json?x=", "is outside"),
        ("photos:val:{outside}", "is outside"),
        ("llava_json:rows.json", ""),
        ("llava_json:a=b.json?images=photos", ""),
        ("hf:rows.json?split=train&images=photos", ""),
        ("folder:photos", ""),
    ],
)
def test_data_of_an_address_are_files_below_the_folder_of_the_server(
    spec: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else may be opened or fetched, whatever else of the spec exists."""
    here, outside = tmp_path / "here", tmp_path / "outside"
    for folder in (here / "photos", outside / "a=b"):
        folder.mkdir(parents=True)
    for file in (here / "rows.json", here / "a=b.json", outside / "a=b" / "x.json", outside / "a=b" / "p.png"):
        file.write_text("[]")
    (here / "link").symlink_to(outside)
    monkeypatch.chdir(here)
    monkeypatch.setattr(asking, "check_here", lambda spec: None)
    site = Site(here, read_stored(here), read_models(here), {})
    spec = spec.format(outside=outside)
    if not why:
        asking.check_spec(site, spec)
        return
    with pytest.raises(DataError, match=why):
        asking.check_spec(site, spec)


def test_models_without_weights_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, "baseline", right=share(0.5))
    train(tmp_path, "viral", right=share(0.9), aligned=True, layer=[1])
    app = open_page("explorer", tmp_path, monkeypatch)
    warnings = [warning.value.replace("\\", "") for warning in app.warning]
    assert len(warnings) == 2
    assert all("cannot be asked" in warning for warning in warnings)


def test_a_model_whose_weights_are_gone_shows_its_stored_answer(
    runs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    shutil.copytree(runs_folder, root)
    (root / "viral" / "model.safetensors").unlink()
    stored = pd.read_parquet(root / "viral" / "evaluation.parquet")
    row = stored.iloc[len(stored) // 2]
    app = open_page("explorer", root, monkeypatch, q=row["id"])
    said = text_of(app)
    assert "viral cannot be asked" in said
    assert f"viral, as stored when its training ended: **{row['given']}**" in said
    assert f"p of the right answer {row['p_right']:.2f}" in said
    assert f"Right answer: **{row['answer']}**" in said
    assert len(app.button(key="ask-again").label)  # the other model can be asked
    stored.assign(question="of another version ?").to_parquet(root / "viral" / "evaluation.parquet", index=False)
    said = text_of(open_page("explorer", root, monkeypatch, q=row["id"]))
    assert "No answer of viral to this question is stored." in said


@pytest.fixture(scope="module")
def opened(runs_folder: Path) -> Iterator[tuple[str, Any]]:
    """The address of a server and a browser, for all tests of this file: PyTorch and the models are loaded once."""
    from playwright.sync_api import sync_playwright

    chromium = chromium_or_skip()
    with serve(runs_folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        yield address, browser
        browser.close()


@pytest.mark.browser
@pytest.mark.slow
def test_in_a_real_browser(opened: tuple[str, Any]) -> None:
    """Layer, patch, token, head and view by hand; the copied address shows the same elsewhere; no other host is
    asked."""
    from playwright.sync_api import expect

    address, browser = opened
    page = browser.new_page(viewport={"width": 1440, "height": 1400})
    errors: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    asked_about = ((each, asked_object(each)) for each in load_data("shapes:val", limit=100))
    sample, item = next((each, item) for each, item in asked_about if item is not None)
    page.goto(f"{address}/explorer?l=77&p=1,9&t=500&h=x&show=nothing&q={sample.id}")
    said = page.locator(".complaint")
    expect(said).to_be_visible(timeout=90_000)
    for words in ("layer 77", "patch 1,9", "token 500", "head x", "view nothing"):
        expect(said).to_contain_text(words)
    said.get_by_role("button").click()
    slider = page.get_by_role("slider", name="Layer")
    slider.focus()
    slider.press("Home")
    expect(page.get_by_text("has no attention").first).to_be_visible()
    slider.press("End")
    page.get_by_role("combobox", name="Head").select_option("1")
    canvas = page.locator("canvas.map").nth(1)
    box = canvas.bounding_box()
    assert box is not None
    cell = box["width"] / 8
    page.mouse.click(box["x"] + 2.5 * cell, box["y"] + 1.5 * cell)
    page.wait_for_url(re.compile(r"(?=.*l=3)(?=.*p=1%2C2)(?=.*h=1)"), timeout=30_000)
    canvas.press("ArrowDown")
    canvas.press("Shift+ArrowRight")
    page.wait_for_url(re.compile(r"p=2%2C2-2%2C3"), timeout=30_000)
    page.get_by_role("button", name=f"Frame {item.name}").click()
    page.wait_for_url(re.compile(r"p=(?!2%2C2-2%2C3)"), timeout=30_000)
    page.get_by_role("button", name="Similarity").click()
    page.wait_for_url(re.compile(r"show=similarity"), timeout=30_000)
    readings = page.locator(".read").all_inner_texts()
    assert any("Cosine of two tokens" in reading for reading in readings)
    elsewhere = browser.new_context(viewport={"width": 390, "height": 800}).new_page()
    elsewhere.goto(page.url)
    expect(elsewhere.locator(".read").nth(1)).to_have_text(readings[1], use_inner_text=True, timeout=90_000)
    expect(elsewhere.get_by_text("Layer 3 of 3")).to_be_visible()
    assert elsewhere.locator(".complaint").count() == 0
    assert page.locator(".complaint").count() == 0
    for shown in (page, elsewhere):
        assert shown.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert shown.locator("[data-testid=stException]").count() == 0
    assert not errors
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}
    page.close()


PASTE = """async (url) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([await (await fetch(url)).blob()], 'x.png', { type: 'image/png' }));
  document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: transfer }));
}"""


@pytest.mark.browser
@pytest.mark.slow
def test_ones_own_image_in_a_real_browser(opened: tuple[str, Any]) -> None:
    """Uploaded with markup in its name, no image at all, pasted, and left again."""
    from playwright.sync_api import expect

    address, browser = opened
    page = browser.new_page(viewport={"width": 1440, "height": 1400})
    page.goto(f"{address}/explorer")
    expect(page.locator("canvas.map").nth(1)).to_be_visible(timeout=90_000)
    page.get_by_role("group", name="Images of the data set").get_by_role("button").nth(2).click()
    page.wait_for_url(re.compile("i=val-0-00002"), timeout=60_000)
    page.get_by_role("button", name="Your own image").click()
    upload = page.locator("input[type=file]")
    content = file_of(Image.new("RGB", (300, 150), "purple"))
    upload.set_input_files({"name": "<b>a</b> **b**.png", "mimeType": "image/png", "buffer": content})
    page.wait_for_url(re.compile("i=upload%3A"), timeout=60_000)
    expect(page.get_by_text("No right answer is known.").first).to_be_visible(timeout=60_000)
    deadline = time.monotonic() + 60  # the viewer is drawn after the answers
    while (box := page.locator("canvas.map").nth(1).bounding_box()) is None or box["width"] < 1.9 * box["height"]:
        assert time.monotonic() < deadline, box
        page.wait_for_timeout(200)
    page.get_by_role("button", name="Back to the data set").click()
    expect(page.get_by_text("Right answer:").first).to_be_visible(timeout=60_000)
    assert "upload" not in page.url
    assert page.locator("[data-testid=stAlert]").count() == 0
    upload.set_input_files({"name": "b.png", "mimeType": "image/png", "buffer": b"no image"})
    expect(page.get_by_text("image b.png cannot be read")).to_be_visible(timeout=60_000)
    page.keyboard.press("Escape")
    for _ in range(2):  # the next run does not bring back the file
        green = base64.b64encode(file_of(Image.new("RGB", (64, 64), "green"))).decode()
        page.evaluate(PASTE, f"data:image/png;base64,{green}")
        page.wait_for_url(re.compile("i=upload%3A"), timeout=60_000)
        expect(page.get_by_text("No right answer is known.").first).to_be_visible(timeout=60_000)
        expect(page.get_by_text("image b.png cannot be read")).to_have_count(0)
    page.get_by_role("textbox", name="Your question").fill("is this red ?")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"(?=.*i=upload%3A)(?=.*q=text%3A)"), timeout=60_000)
    page.close()
