"""Geometry of visual tokens: planted truth, what is kept for maps and UMAP, and the real command line."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from skimage import data as photographs
from torch import Tensor

from analyses import tokens as analysis
from analyses.tokens import ANALYSIS, ENCODER, Config, differences
from analyses.tokens import run as measure
from analyses.tokens.representations import ImageTokens
from analyses.tokens.scores import Measured, cosine_across, isotropic
from analyses.tokens.stored_tokens import Maps
from tests.analyses.test_permutation import picture, planted
from tests.conftest import run
from tests.tiny import build
from tests.workbench.dashboard.test_dashboard import CHROMIUM, chromium_or_skip, serve
from workbench import runs
from workbench.analysis.declaration import Context, Where
from workbench.analysis.execution import execute
from workbench.capture.hidden_states import Activations, read
from workbench.dashboard.token_maps import BASES, _map_colors, _patch_at, _visual_tokens
from workbench.dashboard.token_umap import _separate_planes
from workbench.dashboard.tokens_figures import clickable, framed_patch, small_maps, token_planes
from workbench.data import Dataset, Object, Sample, load_data
from workbench.errors import ConfigError, DataError
from workbench.metrics.geometry import (
    effective_rank,
    joint_pca_rgb,
    massive_tokens,
    mean_cosine,
    norm_ratios,
    similarity_to,
    umap_map,
)
from workbench.mllm import MLLM
from workbench.mllm.family import VisualTokens
from workbench.spatial.grids import whole_image

SMALL = {"vfm": ("efficientnet-lite0",), "null": 10, "umap_images": 0, "maps": 0}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(d: int, seed: int = 1) -> Tensor:
    return torch.linalg.qr(noise(d, d, seed=seed).double()).Q


def test_the_last_layer_is_measured_before_or_after_the_final_norm(llava: MLLM) -> None:
    """Against transformers' own last hidden state, which is after it; other layers stay as they are."""
    data, last = planted(3), llava.n_layers
    config = Config(**SMALL, layers=(1, last))
    before, after = (
        measure(dataclasses.replace(config, final_norm=norm), Context(llava, data, 3)).tables["per_image"]
        for norm in (False, True)
    )
    both = before.merge(after, on=["measure", "at", "image_id"], suffixes=("", "_after")).query("measure == 'cosine'")
    same = np.isclose(both["value"], both["value_after"], atol=1e-7)
    assert set(both[~same]["at"]) == {f"layer {last}"}
    batch = llava.encode([data.scenes[0][0].image], [data.scenes[0][0].question])
    with torch.inference_mode():
        states = llava.model(**batch.inputs, output_hidden_states=True).hidden_states[-1]
    expected = float(mean_cosine(states[0, llava.visual_tokens(batch)[0][0].index]))
    found = both[(both["at"] == f"layer {last}") & (both["image_id"] == data.scenes[0][0].image_id)]
    assert found["value_after"].item() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ConfigError, match=f"final_norm is yes and layers 1: expected {last}, the last layer of"):
        measure(Config(**SMALL, layers=(1,), final_norm=True), Context(llava, data, 3))


# --- metrics --------------------------------------------------------------------------------------


def test_identical_and_orthogonal_tokens() -> None:
    same = noise(1, 8).expand(20, 8)
    assert float(mean_cosine(same)) == pytest.approx(1)
    assert float(effective_rank(same)) == pytest.approx(1, abs=1e-6)
    apart = 7 * rotation(12)
    assert float(mean_cosine(apart)) == pytest.approx(0, abs=1e-9)
    assert float(effective_rank(apart)) == pytest.approx(12)
    assert float(mean_cosine(apart - apart.mean(0))) == pytest.approx(-1 / 11)
    assert float(effective_rank(apart - apart.mean(0))) == pytest.approx(11)


def test_against_direct_computation_and_invariance() -> None:
    x = noise(3, 20, 6) + torch.linspace(0, 2, 6)
    units = x.double() / x.double().norm(dim=-1, keepdim=True)
    pairs = np.array([[float(u[i] @ u[j]) for i in range(20) for j in range(20) if i != j] for u in units])
    assert np.allclose(mean_cosine(x), pairs.mean(1), atol=1e-6)
    singular = np.linalg.svd(x.double().numpy(), compute_uv=False)
    shares = singular / singular.sum(1, keepdims=True)
    assert np.allclose(effective_rank(x), np.exp(-(shares * np.log(shares)).sum(1)))
    for turned in (x.double() @ rotation(6), 1e4 * x):
        assert torch.allclose(mean_cosine(turned), mean_cosine(x), atol=1e-6)
        assert torch.allclose(effective_rank(turned), effective_rank(x))
    assert not torch.allclose(effective_rank(x * torch.tensor([9.0, 1, 1, 1, 1, 1])), effective_rank(x), rtol=0.01)


def test_sinks_and_massive_activations_by_hand() -> None:
    x = noise(30, 16)
    x[7] *= 100
    ratios = norm_ratios(x)
    assert (ratios > 3).nonzero().flatten().tolist() == [7]
    assert 30 < float(ratios[7]) < 300
    assert not massive_tokens(x).any()  # large everywhere is not massive: no value is 1000 times the median
    x[3, 5] = -5000
    assert massive_tokens(x).nonzero().flatten().tolist() == [3]
    assert not massive_tokens(x / 1000).any()


def test_bad_clouds_are_refused() -> None:
    with pytest.raises(DataError, match="one token has no pair"):
        mean_cosine(noise(1, 4))
    with pytest.raises(DataError, match="all zeros"):
        mean_cosine(torch.zeros(3, 4))
    with pytest.raises(DataError, match="no rank"):
        effective_rank(torch.tensor([[1.0, torch.nan], [0, 1]]))
    with pytest.raises(DataError, match="half of the tokens are zero"):
        norm_ratios(torch.zeros(3, 4))
    with pytest.raises(DataError, match="8 tokens with 15 neighbors"):
        umap_map(noise(8, 4))


def test_joint_pca_of_equal_models_and_of_both_rotated() -> None:
    x = noise(3, 30, 8).exp().double()
    first, second = joint_pca_rgb([x, x])
    assert np.array_equal(first, second)
    turned = joint_pca_rgb([x @ rotation(8), x @ rotation(8)])
    assert np.allclose(turned[0], turned[1])
    assert np.allclose(turned[0], first, atol=1e-6)
    # a basis in common is no alignment: the same model rotated looks different
    one, other = joint_pca_rgb([x, x @ rotation(8)])
    assert not np.allclose(one, other, atol=0.1)


@pytest.mark.slow
def test_umap_is_the_same_twice_and_keeps_clusters_apart() -> None:
    x = torch.cat([noise(40, 8) + 8 * torch.eye(8)[0], noise(40, 8, seed=3) + 8 * torch.eye(8)[1]])
    first, second = umap_map(x, seed=4), umap_map(x, seed=4)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, umap_map(x, seed=5))
    centres = first[:40].mean(0), first[40:].mean(0)
    assert np.linalg.norm(centres[0] - centres[1]) > 3 * first[:40].std()


def test_similarity_of_a_patch() -> None:
    x = noise(16, 6)
    near = similarity_to(x, 5)
    assert float(near[5]) == pytest.approx(1)
    assert np.allclose(near, [float(torch.cosine_similarity(x[5], y, dim=0)) for y in x], atol=1e-6)


def test_cosine_across_images_by_hand() -> None:
    clouds = [noise(n, 5, seed=n) + 1 for n in (4, 6, 7)]
    own = Measured()
    for cloud in clouds:
        own.add(cloud, 3)
    units = [c / c.norm(dim=1, keepdim=True) for c in clouds]

    def direct(images: list[int]) -> float:
        return float(
            np.mean(
                np.concatenate([(units[i] @ units[j].T).flatten().numpy() for i in images for j in images if i != j])
            )
        )

    found = cosine_across(own)
    assert found is not None
    assert found[0] == pytest.approx(direct([0, 1, 2]), abs=1e-6)
    assert np.allclose(found[1], [direct([1, 2]), direct([0, 2]), direct([0, 1])], atol=1e-6)
    assert cosine_across(Measured(sums=own.sums[:2], shapes=own.shapes[:2])) is None


# --- the analysis ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> MLLM:
    return MLLM.load(str(build("llava", tmp_path_factory.mktemp("models") / "llava")))


def scores(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    return tables["scores"].set_index(["at", "measure"])


@pytest.mark.slow
def test_planted_layers(llava: MLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1 repeats one token, layer 2 is isotropic and meets its reference, layer 3 has one sink."""

    def layers(mllm: MLLM, batch: object, *, layers: list[int], **_: object) -> list[Activations]:
        found = []
        for _ in range(len(batch)):  # type: ignore[arg-type]
            layers.seed += 1  # type: ignore[attr-defined]
            x = noise(16, 32, seed=layers.seed)  # type: ignore[attr-defined]
            sink = x.clone()
            sink[6] *= 100
            found.append(Activations(torch.stack([x[:1].expand(16, 32), x, sink]), (1, 2, 3), torch.arange(16)))
        return found

    class Layers(list[int]):
        seed = 100

    chosen = Layers([1, 2, 3])
    monkeypatch.setattr(analysis, "check_layers", lambda mllm, layers, **_: chosen)
    monkeypatch.setattr("analyses.tokens.representations.read", layers)
    result = measure(Config(**SMALL | {"null": 40}), Context(llava, planted(30), batch_size=8))
    found = scores(result.tables)
    assert found.loc[("layer 1", "cosine"), "score"] == pytest.approx(1)
    assert found.loc[("layer 1", "effective_rank"), "score"] == pytest.approx(1, abs=1e-5)
    assert abs(found.loc[("layer 1", "cosine_across"), "score"]) < 0.15
    for name in ("cosine", "cosine_across", "effective_rank", "rank_share", "norm_ratio"):
        row = found.loc[("layer 2", name)]
        assert row["low"] < row["high"] and row["score"] == pytest.approx(
            row["null_mean"], abs=0.02 * max(1, row["null_mean"])
        ), name
    assert found.loc[("layer 2", "rank_share"), "score"] == pytest.approx(
        found.loc[("layer 2", "effective_rank"), "score"] / 16
    )
    assert found.loc[("layer 3", "sinks"), "score"] == pytest.approx(1 / 16)
    assert found.loc[("layer 2", "sinks"), "score"] == 0
    sinks = result.tables["sinks"]
    assert set(sinks["at"]) == {"layer 3"}
    assert (sinks["token"] == 6).all()
    assert len(sinks) == 30
    assert sinks[["left", "top", "right", "bottom"]].iloc[0].tolist() == pytest.approx([0.5, 0.25, 0.75, 0.5])
    assert found.loc[("layer 2", "cosine"), "n_images"] == 30
    assert found.loc[("layer 2", "cosine"), ["n", "d"]].tolist() == [16, 32]


def test_isotropic_reference_takes_the_shapes_of_all_images() -> None:
    null = isotropic([(8, 16)] * 10 + [(64, 16)] * 10, 3, draws=40, seed=0)
    assert "norm" not in null
    assert (null["effective_rank"][:20] <= 8).all()
    assert (null["effective_rank"][20:] > 10).all()
    assert abs(null["cosine"].mean()) < 0.03
    assert abs(null["cosine_across"].mean()) < 0.03


def with_objects() -> Dataset:
    """A red dog in the top left quarter."""
    things = (Object("red dog", (0.0, 0.0, 0.5, 0.5)),)
    return Dataset("planted", [dataclasses.replace(s, objects=things) for s in planted(4)], "planted with objects")


@pytest.mark.slow
def test_what_is_kept_to_look_at(llava: MLLM) -> None:
    """Maps and sampled tokens are those of the model; labels are those of their cells; a patch's map equals a direct
    computation."""
    config = Config(
        **SMALL | {"maps": 2, "umap_images": 3, "umap_tokens": 8, "umap_layers": (0, 4), "umap_neighbors": 5}
    )
    result = measure(config, Context(llava, with_objects(), batch_size=3))
    batch = llava.encode([picture(1)], ["is this red ?"])
    values = read(llava, batch, encoder=True)[0]
    kept = result.tensors["map.1.layer 4"].float()
    direct = torch.nn.functional.cosine_similarity(values.values[4], values.values[4][9], dim=-1)
    assert torch.allclose(similarity_to(kept, 9).float(), direct, atol=2e-3)
    assert torch.allclose(
        similarity_to(result.tensors[f"map.1.{ENCODER}"].float(), 9).float(),
        torch.cosine_similarity(values.encoder_features, values.encoder_features[9]),
        atol=2e-3,
    )
    assert {name for name in result.tensors if name.startswith("map.")} == {
        f"map.{i}.{at}" for i in (0, 1) for at in result.record["map_representations"]
    }
    assert result.record["map_representations"] == [ENCODER, *(f"layer {i}" for i in range(5)), "efficientnet-lite0"]
    table = result.tables["umap"]
    assert table.groupby("at").size().to_dict() == {"layer 0": 24, "layer 4": 24, "efficientnet-lite0": 24}
    assert table[["x", "y"]].notna().all(axis=None)
    assert set(table["token"][table["thing"] == "object"]) == {0, 1, 4, 5}
    assert table["colour"].isin(["red", "background"]).all()
    assert (table[table["thing"] == "object"][["name", "colour", "shape"]] == ["red dog", "red", "dog"]).all(axis=None)
    row = table[(table["at"] == "layer 4") & (table["image"] == 1)].reset_index(drop=True)
    stored = result.tensors["umap.layer 4"].float()[8:16]
    assert torch.allclose(
        torch.cosine_similarity(stored, values.values[4][row["token"].tolist()]), torch.ones(8), atol=1e-3
    )
    again = measure(config, Context(llava, with_objects(), batch_size=1)).tables["umap"]
    assert again[["at", "token", "name"]].equals(table[["at", "token", "name"]])
    twice = measure(config, Context(llava, with_objects(), batch_size=3)).tables["umap"]
    assert twice.equals(table)


def test_maps_keep_to_their_megabytes(llava: MLLM) -> None:
    wide = VisualTokens(torch.arange(64 * 64), (64, 64), (0.0, 0.0, 1.0, 1.0))
    names = [ENCODER, *(f"layer {i}" for i in range(5))]
    # 1 MB each
    seen = ImageTokens(0, planted(1)[0], picture(0), [wide], {name: torch.ones(4096, 128) for name in names})
    maps = Maps(Config(maps=1, map_megabytes=4))
    maps.add(seen)
    assert maps.names == [ENCODER, "layer 0", "layer 2", "layer 4"]
    assert sum(v.numel() * v.element_size() for name, v in maps.tensors.items() if "map" in name) <= 4 * 2**20
    with pytest.raises(ConfigError, match="map_megabytes is 1: expected at least 2 for maps of 1 images in one layer"):
        Maps(Config(maps=1, map_megabytes=1)).add(seen)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next", "internvl", "qwen3_vl"])
def test_photographs_through_tiles_and_free_grids(family: str, tmp_path: Path) -> None:
    """No objects, several rasters, images of different sizes."""
    (tmp_path / "photos").mkdir()
    for name in ("astronaut", "chelsea", "rocket"):
        Image.fromarray(getattr(photographs, name)()).resize((120, 80) if name == "rocket" else (90, 90)).save(
            tmp_path / "photos" / f"{name}.png"
        )
    model, data = MLLM.load(str(build(family, tmp_path / family))), load_data(f"folder:{tmp_path / 'photos'}")
    config = Config(
        data=data.name, layers=(1, 2), **SMALL | {"maps": 3, "umap_images": 3, "umap_tokens": 6, "umap_neighbors": 4}
    )
    result = measure(config, Context(model, data, batch_size=2))
    found = scores(result.tables)
    direct = []
    for sample in data:
        batch = model.encode([sample.image], [sample.question])
        values, places = read(model, batch, layers=[2])[0].values[0], model.visual_tokens(batch)[0]
        direct.append(float(mean_cosine(values)))
        number = len(direct) - 1
        own, raster = whole_image(places)
        row = result.tables["maps"].set_index("number").loc[number]
        assert (row["rows"], row["columns"]) == raster.grid
        assert raster.box[2] - raster.box[0] > 0.9
        assert torch.allclose(
            torch.cosine_similarity(result.tensors[f"map.{number}.layer 2"].float(), values[own]),
            torch.ones(len(raster.index)),
            atol=1e-3,
        )
    assert found.loc[("layer 2", "cosine"), "score"] == pytest.approx(np.mean(direct), abs=1e-4)
    table = result.tables["umap"]
    assert (table[["thing", "name", "colour", "shape"]] == "").all(axis=None)
    assert table["left"].between(-0.5, 1).all()


@pytest.mark.slow
def test_a_tower_that_cannot_be_read_for_one_image_is_left_out_for_all(tmp_path: Path) -> None:
    """OneVision mixes the features of an image of many tiles: the images before it had a tower, and nothing of it
    remains, of the layers all does."""
    model = MLLM.load(str(build("llava_onevision", tmp_path / "llava_onevision")))
    samples = [
        Sample(str(n), str(n), lambda n=n: picture(n, (400, 300) if n == 2 else (60, 60)), "what is this ?")
        for n in range(4)
    ]
    config = Config(layers=(1, 2), sink=1.1, **SMALL | {"maps": 4})  # type: ignore[arg-type]
    result = measure(config, Context(model, Dataset("sizes", samples, "sizes"), batch_size=1))
    assert "its tokens mix several encoder features" in result.record["skipped"]["tower"]
    assert "tower" not in set(result.tables["scores"]["at"]) | set(result.tables["per_image"]["at"]) | set(
        result.tables["sinks"]["at"]
    )
    assert {"layer 1", "layer 2"} <= set(result.tables["sinks"]["at"])
    assert set(result.tables["per_image"]["image_id"]) == {"0", "1", "2", "3"}
    maps = {name for name in result.tensors if name.startswith("map.")}
    assert maps == {f"map.{n}.{at}" for n in range(4) for at in ("layer 1", "layer 2", "efficientnet-lite0")}
    assert "tower" not in result.record["map_representations"]
    assert sum(name.startswith("picture.") for name in result.tensors) == 4


@pytest.mark.slow
def test_two_models_are_compared_in_pairs(llava: MLLM) -> None:
    result = measure(Config(**SMALL), Context(llava, planted(12), batch_size=6))
    own = SimpleNamespace(extra={}, tables=result.tables, record={"seed": 0})
    moved = result.tables["per_image"].copy()
    here = (moved["measure"] == "cosine") & (moved["at"] == "layer 2")
    moved.loc[here, "value"] += 0.1 + np.linspace(0, 0.01, 12)
    found = differences(
        {"a": own, "b": SimpleNamespace(extra={}, tables=result.tables | {"per_image": moved}, record={"seed": 0})}
    )  # type: ignore[dict-item]
    row = found[(found["measure"] == "cosine") & (found["layer"] == 2)].iloc[0]
    assert row["score"] == pytest.approx(0.105)
    assert row["low"] > 0.09
    assert row["p"] < row["p_holm"] < 0.01
    assert row["n_images"] == 12
    assert found.drop(row.name)["score"].eq(0).all()
    assert "efficientnet-lite0" not in str(found)
    drawn = ANALYSIS.figures({"a": own, "b": own})  # type: ignore[dict-item]
    assert len(drawn) == 7
    assert all(
        "%{customdata[1]:.3f}" in t.hovertemplate for f in drawn.values() for t in f.data if t.mode == "lines+markers"
    )


# --- the page's figures ---------------------------------------------------------------------------


def test_views(llava: MLLM) -> None:
    raster = _visual_tokens(pd.Series({"rows": 4, "columns": 4, "left": -0.5, "top": 0.0, "right": 1.5, "bottom": 1.0}))
    assert _patch_at(raster, 0.1, 0.1) == 1
    assert _patch_at(raster, 0.9, 0.9) == 14
    assert _patch_at(raster, 0.0, 1.0) == 13
    x = {"layer 1": noise(16, 6), "layer 2": noise(16, 6, seed=2), "efficientnet-lite0": noise(16, 9)}
    joint = _map_colors({"a": x, "b": x}, BASES[0])
    assert all(np.array_equal(joint["a"][name], joint["b"][name]) for name in x)
    assert list(joint["a"]) == list(x)
    assert np.array_equal(joint["a"]["layer 2"], joint_pca_rgb([torch.stack([x["layer 1"], x["layer 2"]])] * 2)[0][1])
    assert np.array_equal(_map_colors({"a": x}, BASES[2])["a"]["layer 2"], joint_pca_rgb([x["layer 2"]])[0][0])
    other = _map_colors({"a": x, "b": {"layer 1": noise(16, 5)}}, BASES[0])  # widths differ: as if alone
    assert np.array_equal(other["a"]["layer 1"], _map_colors({"a": x}, BASES[1])["a"]["layer 1"])
    figure = small_maps({"a": {"layer 1": np.arange(16.0).reshape(4, 4)}}, {"a": 6}, bounds=(0, 16))
    assert figure.data[0].z[1][2] == 6
    assert min(figure.data[1].x) == 1.5
    assert min(figure.data[1].y) == 0.5
    picture_ = clickable(np.zeros((40, 80, 3), dtype=np.uint8), raster, 5)
    points = picture_.data[-1]
    assert points.customdata.tolist() == list(range(16))
    assert points.x[5] == pytest.approx(20)
    assert points.y[5] == pytest.approx(15)
    framed = framed_patch(np.full((30, 30, 3), 90, dtype=np.uint8), (0.5, 0, 1, 0.5))
    assert (framed[0, 150] == 0).all()
    assert (framed[200, 100] == 90).all()


@pytest.mark.slow
def test_planes_by_place_and_by_kind(llava: MLLM) -> None:
    config = Config(**SMALL | {"umap_images": 3, "umap_tokens": 8, "umap_layers": (4,), "umap_neighbors": 5})
    result = measure(config, Context(llava, with_objects(), batch_size=3))
    stored = SimpleNamespace(extra={}, tables=result.tables, tensors=result.tensors)
    table = _separate_planes({"a": stored, "b": stored})  # type: ignore[dict-item]
    assert table["panel"].unique().tolist() == ["a", "b", "efficientnet-lite0"]
    by_colour = token_planes(table, by="colour")
    assert {(t.name, t.marker.color) for t in by_colour.data} == {("red", "#d62828"), ("background", "#8a8f98")}
    assert sum(t.showlegend for t in by_colour.data) == 2
    assert sum(len(t.x) for t in by_colour.data) == len(table)
    by_row = token_planes(table, by="row")
    assert len(by_row.data) == 3
    assert set(np.round(by_row.data[0].marker.color, 3)) <= {0.125, 0.375, 0.625, 0.875}


POINT = """() => { const chart = document.querySelector('.st-key-token-planes .js-plotly-plot');
  const trace = chart._fullData[0], layout = chart._fullLayout;
  const area = chart.querySelector('.nsewdrag').getBoundingClientRect();
  return {at: [area.x + layout.xaxis.d2p(trace.x[0]), area.y + layout.yaxis.d2p(trace.y[0])]}; }"""
FRAME = (
    "() => { const frame = document.querySelector('.js-plotly-plot')._fullData[1]; return [Math.min(...frame.x),"
    " Math.min(...frame.y)]; }"
)


@pytest.mark.browser
def test_hover_and_click_in_a_real_browser(llava: MLLM, tmp_path: Path) -> None:
    """A clicked patch is framed and its similarities drawn; a token shows its picture on hover and keeps it on
    click."""
    from playwright.sync_api import expect, sync_playwright

    chromium = chromium_or_skip()
    config = Config(**SMALL | {"limit": 4, "maps": 2, "umap_images": 4, "umap_tokens": 6, "umap_neighbors": 5})
    execute(ANALYSIS, config, Where(model=(llava.name,), output_dir=tmp_path), ["python", "-m", "analyses.tokens"])
    with serve(tmp_path) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        page = browser.new_page(viewport={"width": 1400, "height": 1300})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}/explorer?view=maps")
        expect(page.locator(".js-plotly-plot")).to_have_count(3, timeout=90_000)
        page.wait_for_timeout(1000)
        area = page.locator(".js-plotly-plot").first.locator(".nsewdrag").first.bounding_box()
        assert area is not None
        assert page.evaluate(FRAME) == [56, 56]
        page.mouse.click(area["x"] + 0.1 * area["width"], area["y"] + 0.9 * area["height"])
        page.wait_for_function(f"({FRAME})().join() == '0,84'", timeout=30_000)
        page.get_by_text("UMAP of tokens", exact=True).click()
        expect(page.locator(".st-key-token-planes .js-plotly-plot")).to_be_visible(timeout=60_000)
        page.wait_for_timeout(1500)
        x, y = page.evaluate(POINT)["at"]
        page.mouse.move(x - 4, y)
        page.mouse.move(x, y)
        thumbnail = page.get_by_test_id("token-thumbnail")
        expect(thumbnail).to_be_visible(timeout=10_000)
        assert str(thumbnail.locator("img").get_attribute("src")).startswith("data:image/png;base64,")
        page.mouse.click(x, y)
        kept = page.get_by_text(re.compile(r"val-0-0000\d, token \d+: "))
        expect(kept).to_be_visible(timeout=30_000)
        page.wait_for_url(re.compile(r"point=val-0-0000\d"), timeout=30_000)
        elsewhere = browser.new_context(viewport={"width": 1400, "height": 1300}).new_page()
        elsewhere.goto(page.url)  # a copied address has the token
        expect(elsewhere.get_by_text(kept.inner_text(), exact=True)).to_be_visible(timeout=90_000)
        elsewhere.goto(re.sub(r"point=[^&]*", "point=gone", page.url))
        expect(elsewhere.get_by_text("The link names token gone, which is not here")).to_be_visible(timeout=90_000)
        assert not errors
        assert page.locator("[data-testid=stAlert]").count() == 0
        browser.close()


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command(runs_folder: Path, tmp_path: Path) -> None:
    models = [str(runs_folder / "baseline"), str(runs_folder / "viral")]
    done = run(
        "analyses.tokens",
        "--model",
        *models,
        "--limit",
        "4",
        "--null",
        "10",
        "--umap_images",
        "0",
        "--output_dir",
        str(tmp_path),
    )
    found = {stored.label: stored for stored in map(runs.load, runs.index(tmp_path)["folder"])}
    assert set(found) == {"baseline", "viral"}
    assert "cosine_across" in done.stdout
    table = found["viral"].tables["scores"]
    assert set(table["at"]) == {ENCODER, "layer 0", "layer 1", "layer 2", "layer 3", "dinov2-small"}
    assert (table["low"] <= table["high"]).all()
    failed = run("analyses.tokens", "--model", models[0], "--umap_layer", "1", code=2)
    assert "did you mean '--umap_layers'" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"sink": 1.0}, "sink is 1.0: expected above 1"),
        ({"null": 3}, "null is 3: expected at least 10"),
        ({"maps": -1}, "maps is -1: expected at least 0"),
    ],
)
def test_bad_options(words: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**words)  # type: ignore[arg-type]


def test_layers_of_umap_are_layers_that_are_read(llava: MLLM) -> None:
    with pytest.raises(ConfigError, match="umap_layers names layer 3: expected one of the layers 1, 2"):
        measure(Config(layers=(1, 2), umap_layers=(3,), **SMALL), Context(llava, planted(2), 2))


def test_an_image_of_one_raster_is_needed() -> None:
    sample = Sample("0", "0", lambda: picture(0))
    assert sample.image.size == (60, 60)
    parts = [VisualTokens(torch.arange(4), (2, 2), (0, 0, 1, 1)), VisualTokens(torch.arange(16), (4, 4), (0, 0, 1, 1))]
    own, raster = whole_image([*parts, VisualTokens(torch.arange(64), (8, 8), (0, 0, 0.5, 1))])
    assert (own, raster.grid) == (slice(4, 20), (4, 4))
