"""PCA maps: colors by an independent computation, components that can be compared, answers of the model itself, and the
figures of the real command line."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from analyses.tokens import ANALYSIS, Config, figures
from analyses.tokens import run as measure
from tests.analyses.test_permutation import planted
from tests.conftest import run
from tests.tiny import build
from workbench import runs
from workbench.analysis.declaration import Context, Where
from workbench.analysis.execution import execute
from workbench.errors import ConfigError
from workbench.figures.panels import Panel, panels, wrapped
from workbench.metrics.geometry import matched_scores, pca_scores, squashed
from workbench.mllm import MLLM
from workbench.runs import Run

SMALL = {"vfm": ("efficientnet-lite0",), "null": 10, "umap_images": 0, "maps": 2, "answer_tokens": 5}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> MLLM:
    return MLLM.load(str(build("llava", tmp_path_factory.mktemp("model") / "llava")), validate=False)


# --- components -----------------------------------------------------------------------------------


def test_scores_are_those_of_sklearn_with_a_fixed_sign() -> None:
    x = noise(40, 9) * torch.arange(1.0, 10) + 5
    scores, share = pca_scores(x)
    pca = PCA(3).fit(x.double().numpy())
    assert np.allclose(np.abs(scores), np.abs(pca.transform(x.double().numpy())), atol=1e-9)
    assert share == pytest.approx(pca.explained_variance_ratio_.sum())
    assert all(column[np.abs(column).argmax()] > 0 for column in scores.T)
    rotation = torch.linalg.qr(noise(9, 9, seed=1).double()).Q
    for same in (3 * x.double() @ rotation, -x.double(), x.double().flip(1) + 7):
        again = pca_scores(same)[0]
        assert np.allclose(again / np.abs(again).max(), scores / np.abs(scores).max(), atol=1e-9)


def test_tokens_without_three_components_have_zeros() -> None:
    scores, share = pca_scores((noise(10, 1) * torch.tensor([1.0, 2, 3, 4])).half())
    assert share == pytest.approx(1)
    assert (scores[:, 0] != 0).all()
    assert not scores[:, 1:].any()
    constant, none = pca_scores(torch.ones(6, 4))
    assert none == 0
    assert (squashed(constant) == 0.5).all()
    assert pca_scores(noise(2, 5))[0].shape == (2, 3)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_components_in_another_order_and_with_other_signs_are_put_right(
    order: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    reference = noise(50, 3).double().numpy()
    disguised = reference[:, list(order)] * signs * 4 + 0.1 * noise(50, 3, seed=2).double().numpy()
    matched = matched_scores(disguised, reference)
    assert all(np.corrcoef(matched[:, i], reference[:, i])[0, 1] > 0.99 for i in range(3))
    assert sorted(np.abs(matched).sum(0)) == pytest.approx(sorted(np.abs(disguised).sum(0)))
    assert np.isfinite(matched_scores(np.zeros((50, 3)), reference)).all()


def test_colors_are_those_of_the_formula() -> None:
    scores = noise(31, 3).double().numpy() * [1, 5, 0.1] + [0, 3, -1]
    for column, colors in zip(scores.T, squashed(scores).T, strict=True):
        ordered = np.sort(column)  # 31 values: the quartiles are values 7.5, 15 and 22.5
        low, middle, high = (ordered[7] + ordered[8]) / 2, ordered[15], (ordered[22] + ordered[23]) / 2
        assert np.allclose(colors, (1 + np.tanh((column - middle) / (high - low))) / 2)


# --- figures --------------------------------------------------------------------------------------


def pixels(trace: go.Image) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(trace.source.split(",")[1]))))


def test_panels_are_drawn_in_their_true_shape_one_set_at_a_time() -> None:
    image = np.zeros((30, 60, 3), dtype=np.uint8)
    grid = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    row = [Panel("image", image, (0, 0, 60, 30)), Panel("map", grid, (-10, 0, 70, 40))]
    figure = panels({"1": [row], "2": [row[::-1]]}, images=1)
    assert [trace.visible for trace in figure.data] == [True, True, False, False]
    map_trace = figure.data[1]
    assert np.array_equal(pixels(map_trace), grid)
    # the edges of its first and last pixels are those of the box
    assert (map_trace.x0 - map_trace.dx / 2, map_trace.x0 + 3.5 * map_trace.dx) == (-10, 70)
    assert (map_trace.y0 - map_trace.dy / 2, map_trace.y0 + 1.5 * map_trace.dy) == (0, 40)
    assert figure.layout.xaxis2.range == (-10, 70)
    assert [step.args[0]["visible"] for step in figure.layout.sliders[0].steps] == [
        [True, True, False, False],
        [False, False, True, True],
    ]
    assert len(panels({"": [row]}, images=1).layout.sliders) == 0


def test_titles_are_plain_text_of_at_most_three_lines() -> None:
    assert wrapped("is <b>it</b> &\n red ?", 40) == "is &lt;b&gt;it&lt;/b&gt; &amp; red ?"
    assert wrapped("word " * 50, 20).count("<br>") == 2
    assert wrapped("word " * 50, 20).endswith("…")
    assert wrapped("", 20) == ""


def stored(llava: MLLM, **options: object) -> Run:
    config = Config(**SMALL | options)  # type: ignore[arg-type]
    result = measure(config, Context(llava, planted(3), 2))
    record = result.record | {"config": {"map_layer": config.map_layer}, "label": "a", "seed": 0}
    return Run("", record, result.tables, result.tensors)  # type: ignore[arg-type]


def test_figures_show_the_map_of_each_model_with_its_own_answer(llava: MLLM) -> None:
    one = stored(llava, map_layer=2)
    data = planted(3).scenes
    asked = [scene[0].question for scene in data[:2]]
    answers = [
        llava.generate(llava.encode([scene[0].image], [scene[0].question]), max_new_tokens=5)[0] for scene in data[:2]
    ]
    assert one.tables["maps"]["question"].tolist() == asked
    assert one.tables["maps"]["answer"].tolist() == answers
    rotation = torch.linalg.qr(noise(32, 32).double()).Q.float()
    turned = {name: (3 * v.float() @ rotation if v.shape[-1] == 32 else v) for name, v in one.tensors.items()}
    other = Run("", one.record, one.tables | {"maps": one.tables["maps"].assign(answer="<i>cat")}, turned)
    drawn = figures({"a": one, "b": other})
    first = drawn["PCA maps at layer 2, question and answers"]
    titles = [annotation.text for annotation in first.layout.annotations]
    assert titles[0] == asked[0]
    assert (f"“{wrapped(answers[0], 50)}”" in titles[1]) or not answers[0]
    assert "“&lt;i&gt;cat”" in titles[2]
    assert [trace.meta for trace in first.data] == [0] * 6
    tokens = one.tensors["map.0.layer 2"].double()
    expected = (
        (squashed(pca_scores(tokens)[0]) * 255).round().reshape(*one.tables["maps"].loc[0, ["rows", "columns"]], 3)
    )
    assert np.array_equal(pixels(first.data[1]), expected.astype(np.uint8))
    # a model whose features are turned and larger has the same components, so the same colors, up to their rounding
    assert np.abs(pixels(first.data[2]).astype(int) - pixels(first.data[1])).max() <= 2
    by_layer = drawn["PCA maps by layer"]
    shown = [trace for trace in by_layer.data if trace.visible]
    assert len(by_layer.data) == 2 * len(shown)
    assert len(shown) == 2 * (1 + 1 + llava.n_layers + 1)  # image, encoder and layers 0 to L, of two models
    assert [a.text.split(" · ")[0] for a in drawn["PCA maps of vision encoder and VFMs"].layout.annotations[:3]] == [
        "image",
        "vision encoder",
        "efficientnet-lite0",
    ]


def test_maps_of_other_grids_and_older_runs_are_drawn(llava: MLLM) -> None:
    one = stored(llava)
    rows, columns = one.tables["maps"].loc[0, ["rows", "columns"]]
    assert rows * columns == len(one.tensors["map.0.layer 1"])
    fewer = rows // 2 * (columns // 2)
    coarse = {name: v[:fewer] if name.startswith("map.") else v for name, v in one.tensors.items()}
    table = one.tables["maps"].assign(rows=rows // 2, columns=columns // 2).drop(columns=["question", "answer"])
    other = Run("", one.record, one.tables | {"maps": table}, coarse)
    drawn = figures({"a": one, "b": other})["PCA maps at layer 2, question and answers"]
    assert [pixels(trace).shape[:2] for trace in drawn.data[1:3]] == [(rows, columns), (rows // 2, columns // 2)]
    none = Run("", one.record, one.tables | {"maps": table[:0]}, {})
    assert not [title for title in figures({"a": none}) if title.startswith("PCA")]


def test_a_layer_without_maps_is_one_sentence(llava: MLLM) -> None:
    with pytest.raises(ConfigError, match="map_layer is 9: expected one of the layers 1, 2"):
        stored(llava, layers=(1, 2), map_layer=9)


@pytest.mark.slow
def test_a_question_about_an_image_of_the_users_own(tmp_path: Path) -> None:
    """By the real command line; the stored run has the question and the answer."""
    model = build("llava", tmp_path / "llava")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(
        tmp_path / "my cat.png"
    )
    words = ["--model", str(model), "--data", f"image:{tmp_path / 'my cat.png'}?question=what color is this cat ?"]
    words += [
        "--vfm",
        "efficientnet-lite0",
        "--null",
        "10",
        "--umap_images",
        "0",
        "--output_dir",
        str(tmp_path / "runs"),
    ]
    assert run("analyses.tokens", *words).returncode == 0
    (folder,) = (tmp_path / "runs").glob("tokens-*")
    table = runs.load(folder).tables["maps"]
    assert table["question"].tolist() == ["what color is this cat ?"]
    assert len(runs.load(folder).figures()) >= 3
    where = Where(model=(str(model),), output_dir=tmp_path / "runs")
    config = Config(data=words[3], vfm=("efficientnet-lite0",), null=10, umap_images=0)
    assert execute(ANALYSIS, config, where, [])["llava"].tables["maps"]["answer"].tolist() == table["answer"].tolist()
