"""Attention maps: their mathematics and chance levels, their pixels in every family, planted heads, and the analysis
from its command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from analyses.attention import ANALYSIS, MEASURES, Config, differences
from analyses.attention import run as run_attention
from analyses.attention.measuring import object_chance
from analyses.attention.questions import ENTROPIES
from analyses.attention.tables import score_intervals
from tests.conftest import refused, run
from tests.tiny import BUILDERS, build
from workbench import figures as fig
from workbench import runs
from workbench.analysis.declaration import Context, Result
from workbench.capture.attention import attention, gradient_attention, rollout
from workbench.capture.hidden_states import read
from workbench.data import Object, Sample, asked_object, load_data
from workbench.errors import DataError, ModelError
from workbench.metrics.attention import best_iou, entropies, mass_ratio, pointing, random_iou, renormalized, touched
from workbench.mllm import MLLM, Batch, VisualTokens
from workbench.spatial.grids import canvas, object_coverage, sum_onto_grid

RASTER = VisualTokens(torch.arange(64), (8, 8), (0.0, 0.0, 1.0, 1.0))
SQUARE = Object("red square", (0.25, 0.5, 0.5, 0.75))  # four of 8 x 8 cells: rows 4 and 5, columns 2 and 3


def one_cell(row: int, column: int) -> np.ndarray:
    values = np.zeros((8, 8))
    values[row, column] = 1
    return values


# --- mathematics ----------------------------------------------------------------------------------


def test_entropies_of_known_maps() -> None:
    uniform, two, unequal = np.full((8, 8), 1 / 64), np.zeros((8, 8)), np.zeros((8, 8))
    two[1:3, 1:3] = two[5:7, 5:7] = 1 / 8
    unequal[1, 1], unequal[2, 2], unequal[6, 1] = 0.25, 0.25, 0.5  # the first two touch at a corner: one component
    found = entropies(np.stack([uniform, one_cell(3, 4), two, unequal]))
    assert found.shannon == pytest.approx([1, 0, np.log(8) / np.log(64), 1.5 * np.log(2) / np.log(64)])
    assert np.isnan(found.component[0])
    assert np.isnan(found.per_cells[0])
    assert found.component[1] == 0
    assert found.per_components[1] == 0
    assert found.component[2] == pytest.approx(np.log(2))
    assert found.per_components[2] == pytest.approx(1)
    assert found.per_cells[2] == pytest.approx(np.log(2) / np.log(64))
    excess = np.array([0.5 - 4 / 64, 0.5 - 2 / 64])  # each cell loses twice the mean
    share = excess / excess.sum()
    assert found.component[3] == pytest.approx(-(share * np.log(share)).sum())


def test_component_entropy_equals_a_plain_search() -> None:
    """An oracle that floods each map on its own, and does not mix maps."""
    maps = renormalized(np.random.default_rng(0).random((3, 4, 7, 9)) ** 8)

    def flood(values: np.ndarray) -> float:
        excess = np.maximum(values - 2 * values.mean(), 0)
        left, sums = {tuple(c) for c in np.argwhere(excess > 0.001)}, []
        while left:
            edge, total = [left.pop()], 0.0
            while edge:
                row, column = edge.pop()
                total += excess[row, column]
                near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
                left -= near
                edge += near
            sums.append(total)
        share = np.array(sums) / sum(sums)
        return float(-(share * np.log(share)).sum())

    assert entropies(maps).component == pytest.approx(np.array([[flood(m) for m in row] for row in maps]))


def test_a_uniform_map_is_at_chance() -> None:
    inside, uniform = object_coverage(SQUARE, RASTER), np.full((8, 8), 1 / 64)
    assert mass_ratio(uniform, inside) == pytest.approx(1)
    assert pointing(uniform, inside) == pytest.approx(touched(inside)) == 4 / 64
    assert best_iou(uniform, inside) == pytest.approx(4 / 64)


def test_random_maps_are_at_their_chance_levels() -> None:
    inside = object_coverage(Object("star", (0.2, 0.3, 0.61, 0.77)), RASTER)
    maps = renormalized(np.random.default_rng(1).random((4000, 8, 8)))
    assert pointing(maps, inside).mean() == pytest.approx(touched(inside), abs=0.03)
    assert mass_ratio(maps, inside).mean() == pytest.approx(1, abs=0.02)
    assert best_iou(maps, inside).mean() == pytest.approx(random_iou(inside, n=500), abs=0.01)


def test_a_map_that_is_the_object_is_found_and_its_neighbour_is_not() -> None:
    inside = object_coverage(SQUARE, RASTER)
    right = renormalized(inside)
    assert pointing(one_cell(4, 3), inside) == 1
    assert pointing(one_cell(4, 4), inside) == 0
    assert mass_ratio(right, inside) == pytest.approx(16)
    assert best_iou(right, inside) == pytest.approx(1)
    assert best_iou(one_cell(4, 3), inside) == pytest.approx(1 / 4)
    assert mass_ratio(one_cell(0, 0), inside) == 0


def test_many_objects_and_maps_are_every_pair() -> None:
    maps = renormalized(np.random.default_rng(2).random((2, 3, 8, 8)))
    things = np.stack(
        [
            object_coverage(Object("a", box), RASTER)
            for box in [(0, 0, 0.3, 0.4), (0.5, 0.1, 0.9, 0.9), (0.2, 0.2, 0.4, 1)]
        ]
    )
    for f in (pointing, mass_ratio, best_iou):
        every = f(maps, things)
        assert every.shape == (3, 2, 3)
        assert every[2, 1, 0] == pytest.approx(float(f(maps[1, 0], things[2])))


def test_no_attention_and_objects_out_of_sight_are_nan() -> None:
    nothing, inside = renormalized(np.zeros((8, 8))), object_coverage(SQUARE, RASTER)
    assert all(
        np.isnan(value) for value in (pointing(nothing, inside), mass_ratio(nothing, inside), best_iou(nothing, inside))
    )
    assert all(np.isnan(value) for value in dataclasses.astuple(entropies(nothing)))
    outside = object_coverage(SQUARE, VisualTokens(torch.arange(4), (2, 2), (0.6, 0.0, 1.0, 1.0)))
    assert all(np.isnan(f(np.full((2, 2), 0.25), outside)) for f in (pointing, mass_ratio, best_iou))
    # nor do such objects count in the chance level of the others
    assert np.isnan(touched(outside))
    assert touched(np.stack([outside, np.eye(2)])) == pytest.approx([np.nan, 0.5], nan_ok=True)
    assert np.isnan(object_chance(outside, 0)[0])


def test_cells_count_the_pixels_of_the_mask() -> None:
    mask = np.zeros((10, 10), dtype=bool)
    mask[2:5, 1:6] = True
    thing = Object("x", (0.1, 0.2, 0.6, 0.5), mask)
    # padded above and below, as LLaVA does with wide images
    raster = VisualTokens(torch.arange(6), (2, 3), (0.0, -0.5, 1.0, 1.5))
    expected = [
        [
            np.mean(
                [[mask[y, x] if 0 <= y < 10 else False for x in _pixels(c)] for y in range(-5 + 10 * r, 5 + 10 * r)]
            )
            for c in range(3)
        ]
        for r in (0, 1)
    ]
    assert object_coverage(thing, VisualTokens(torch.arange(4), (2, 2), (0.0, 0.0, 1.0, 1.0))) == pytest.approx(
        np.array([[12 / 25, 3 / 25], [0, 0]])
    )
    # nothing is lost to cells that do not end at pixels
    assert object_coverage(thing, raster).sum() * 10 * 10 / 3 == pytest.approx(mask.sum())
    assert object_coverage(thing, raster)[0, 0] == pytest.approx(3 * (10 / 3 - 1) / (10 / 3 * 10))
    assert len(expected) == 2
    assert object_coverage(dataclasses.replace(thing, mask=None), raster) == pytest.approx(
        object_coverage(thing, raster)
    )


def _pixels(column: int) -> range:
    return range(round(column * 10 / 3), round((column + 1) * 10 / 3))


# --- which object a question asks about -----------------------------------------------------------


def sample(question: str, answer: str = "", *names: str) -> Sample:
    return Sample(
        "s",
        "i",
        lambda: Image.new("RGB", (4, 4)),
        question,
        answer,
        objects=tuple(Object(n, (0, 0, 1, 1)) for n in names),
    )


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("what shape is red ?", "star", "red star"),
        ("any blue circle ?", "yes", "blue circle"),
        ("how many red ?", "1", "red star"),
        ("Is the CIRCLE left?", "left", None),  # there are two
        ("is red left or right of square ?", "left", None),  # two objects
        ("any red circle ?", "no", None),
        ("how many purple ?", "0", None),
        ("what is this ?", "", None),
    ],
)
def test_the_asked_object_is_the_only_one_named(question: str, answer: str, expected: str | None) -> None:
    found = asked_object(sample(question, answer, "red star", "blue circle", "green circle", "blue square"))
    assert (found.name if found else None) == expected


def test_every_kind_of_question_about_one_object_is_found_in_the_shapes_world() -> None:
    for asked in load_data("shapes:val", limit=40):
        thing = asked_object(asked)
        if asked.category in ("colour", "shape", "position_x", "position_y"):
            assert thing is not None, asked.question
        if asked.category.startswith("relation") or asked.answer == "no":
            assert thing is None
        if asked.category in ("colour", "shape") and thing:
            assert asked.answer in thing.name


# --- pixels, in every family ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attention")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BUILDERS))
def test_attention_on_a_token_lands_on_its_pixels(name: str, tiny_folders: Path) -> None:
    mllm = MLLM.load(str(build(name, tiny_folders / name)), validate=False)
    for size in ((90, 60), (223, 301), (64, 64)):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
        (parts,) = mllm.visual_tokens(mllm.encode([picture], ["what is this ?"]))
        raster = canvas(parts)
        assert raster.grid is not None
        assert raster.grid[0] * raster.grid[1] >= max(len(p.index) for p in parts[:1])
        tokens = [(p, i) for p in parts for i in range(len(p.index))]
        one_hot = sum_onto_grid(np.eye(len(tokens)), parts, raster)
        rows, columns = (np.arange(n) for n in raster.grid)
        boxes = np.array([[raster.token_box(r, c) for c in columns] for r in rows])
        for (part, number), values in zip(tokens, one_hot, strict=True):
            left, top, right, bottom = part.token_box(*divmod(number, part.grid[1]))
            lit = boxes[values > 0]
            width, height = boxes[0, 0, 2] - boxes[0, 0, 0], boxes[0, 0, 3] - boxes[0, 0, 1]
            assert (
                values.sum() == pytest.approx(1, abs=1e-6)
                or left < raster.box[0]
                or top < raster.box[1]
                or right > raster.box[2]
                or bottom > raster.box[3]
            )
            assert (lit[:, 0] > left - width).all()
            assert (lit[:, 1] > top - height).all()
            assert (lit[:, 2] < right + width).all()
            assert (lit[:, 3] < bottom + height).all()
            centre = (
                ((boxes[..., 0] + boxes[..., 2]) / 2 * values).sum(),
                ((boxes[..., 1] + boxes[..., 3]) / 2 * values).sum(),
            )
            if values.sum() == pytest.approx(1, abs=1e-6):
                assert centre == pytest.approx(((left + right) / 2, (top + bottom) / 2), abs=max(width, height))
            # a token of the finest raster is one cell
            if np.allclose([right - left, bottom - top], [width, height], rtol=1e-3):
                assert len(lit) == 1
                assert lit[0] == pytest.approx((left, top, right, bottom), abs=1e-6)
        figure = fig.overlays([[fig.Overlay("t", np.array(picture), one_hot[-1], raster.box)]])
        heat = next(trace for trace in figure.data if trace.type == "heatmap")
        row, column = divmod(int(one_hot[-1].argmax()), raster.grid[1])
        left, top, right, bottom = raster.token_box(row, column)
        assert (heat.x[column], heat.x[column + 1]) == pytest.approx((left * size[0], right * size[0]))
        assert (heat.y[row], heat.y[row + 1]) == pytest.approx((top * size[1], bottom * size[1]))
        low, high = figure.layout.yaxis.range
        assert low >= size[1]
        assert high <= 0


@pytest.mark.parametrize("name", list(BUILDERS))
def test_rollout_and_gradients_equal_eager(name: str, tiny_folders: Path) -> None:
    """An oracle from whole attention matrices: their product, and autograd through each of them."""
    folder = tiny_folders / name
    mllm = MLLM.load(str(folder if folder.exists() else build(name, folder)), validate=False)
    pictures = [Image.fromarray(np.random.default_rng(s).integers(0, 255, (60, 90, 3), dtype=np.uint8)) for s in (0, 1)]
    batch = mllm.encode(pictures, ["what is this ?", "yes"])  # the second one is padded
    products, flow = list(gradient_attention(mllm, batch, rows=[-1, -1])), rollout(mllm, batch, rows=[-1, -1], chunk=7)
    mllm.model.set_attn_implementation("eager")
    output = mllm.model(**batch.inputs, output_attentions=True)
    gradients = torch.autograd.grad(output.logits[:, -1].amax(-1).sum(), output.attentions)
    whole = torch.eye(flow.shape[1]).expand(2, -1, -1)
    for ours, theirs, gradient in zip(products, output.attentions, gradients, strict=True):
        expected = (theirs * gradient)[:, :, -1].detach()
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max() > 0, name
        whole = (theirs.detach().mean(1) + torch.eye(flow.shape[1])) / 2 @ whole
    assert torch.allclose(flow, whole[:, -1], atol=1e-6)
    assert flow.sum(1) == pytest.approx([1, 1], abs=1e-5)
    assert all(parameter.requires_grad for parameter in mllm.model.parameters())


def test_one_raster_is_left_as_it_is() -> None:
    part = VisualTokens(torch.arange(5, 17), (3, 4), (0.1, -0.2, 0.9, 1.2))
    values = np.random.default_rng(0).random((2, 12))
    assert canvas([part]).grid == (3, 4)
    assert canvas([part]).box == pytest.approx(part.box)
    assert sum_onto_grid(values, [part], canvas([part])) == pytest.approx(values.reshape(2, 3, 4))


def test_tokens_without_a_raster_are_refused() -> None:
    with pytest.raises(ModelError, match="have no rows and columns: expected a patch grid"):
        canvas([VisualTokens(torch.arange(4), None, (0.0, 0.0, 1.0, 1.0))])
    with pytest.raises(ModelError, match="no visual tokens"):
        canvas([])


# --- planted heads --------------------------------------------------------------------------------


def test_a_head_built_to_look_at_one_cell_points_there(tiny_folders: Path) -> None:
    """Weights of one head of a LLaVA are set so that its keys single out one visual token and its query asks for it."""
    folder = tiny_folders / "planted"
    mllm = MLLM.load(str(build("llava", folder)), validate=False)
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 255, (56, 56, 3), dtype=np.uint8))
    batch = mllm.encode([picture], ["what is this ?"])
    (parts,) = mllm.visual_tokens(batch)
    row, column = 2, 1
    target = int(parts[0].index[row * 4 + column])
    block = mllm.decoder.layers[1]
    with torch.no_grad():
        hidden = read(mllm, batch, layers=[1], tokens="all")[0].values[0]
        normed = block.input_layernorm(hidden)
        wanted = torch.zeros(len(normed), 1)
        wanted[target] = 1
        # the dimension of a head that its position turns least
        slowest = mllm.model.config.text_config.hidden_size // 4 // 2 - 1
        block.self_attn.k_proj.weight[:8] = 0
        block.self_attn.k_proj.weight[slowest] = 40 * torch.linalg.lstsq(normed, wanted, driver="gelsd").solution[:, 0]
        block.self_attn.q_proj.weight[:8] = 0
        block.self_attn.q_proj.weight[slowest] = 4 * normed[-1] / normed[-1].square().sum()
    rows = next(iter(attention(mllm, batch, rows=[[-1]], layers=[2])))[0, :, 0, parts[0].index].numpy()
    maps = renormalized(sum_onto_grid(rows, parts, canvas(parts)))
    left, top, right, bottom = (v * 56 for v in parts[0].token_box(row, column))
    mask = np.zeros((56, 56), dtype=bool)
    mask[round(top) + 1 : round(bottom) - 1, round(left) + 1 : round(right) - 1] = True
    inside = object_coverage(Object("planted", (left / 56, top / 56, right / 56, bottom / 56), mask), canvas(parts))
    assert rows[0].sum() > 0.9
    assert pointing(maps, inside)[0] == 1
    assert mass_ratio(maps, inside)[0] > 12
    assert entropies(maps).shannon[0] < 0.2
    assert mass_ratio(maps, inside)[1:].max() < mass_ratio(maps, inside)[0]


@pytest.fixture(scope="module")
def mllm(runs_folder: Path) -> MLLM:
    return MLLM.load(str(runs_folder / "viral"), validate=False)


def planted(mllm: MLLM, samples: list[Sample], seed: int = 0) -> Any:
    """Attention of noise, but for layer 2: head 1 looks at the asked object, head 2 always at the centre."""
    rng, queue = np.random.default_rng(seed), iter(samples)

    def rows(_: MLLM, batch: Batch, *, rows: list[list[int]], layers: list[int]) -> Iterator[torch.Tensor]:
        length = batch.inputs["input_ids"].shape[1]
        asked = [next(queue) for _ in range(len(batch))]
        for layer in layers:
            given = rng.random((len(batch), 4, 1, length)) ** 4
            for number, (one, parts) in enumerate(zip(asked, mllm.visual_tokens(batch), strict=True)):
                if layer == 2:
                    thing = asked_object(one)
                    assert thing is not None
                    assert one.question == batch.prompts[number]
                    given[number, 1, 0, parts[0].index] += 50 * object_coverage(thing, canvas(parts)).ravel()
                    given[number, 2, 0, parts[0].index[[27, 28, 35, 36]]] += 50
            yield torch.from_numpy(given / given.sum(-1, keepdims=True)).float()

    return rows


@pytest.fixture
def planted_result(mllm: MLLM, monkeypatch: pytest.MonkeyPatch) -> Result:
    data = load_data("shapes:val", limit=40)
    asked = [s for scene in data.scenes for s in [s for s in scene if asked_object(s)][:2]]
    monkeypatch.setattr("analyses.attention.measuring.attention", planted(mllm, asked))
    return run_attention(Config(limit=40, questions=2, top=3, null=10, compare=0), Context(mllm, data, batch_size=16))


@pytest.mark.slow
def test_the_planted_head_is_chosen_and_holds_on_the_other_half(planted_result: Result) -> None:
    heads = planted_result.tables["heads"]
    assert (heads["layer"][0], heads["head"][0]) == (2, 1)
    best = heads.iloc[0]
    assert best["pointing"] == 1
    assert best["gain_low"] > 0.3
    assert best["p_holm"] < 0.01
    assert best["p_holm"] >= best["p"]
    assert best["mass_ratio"] > 2
    assert (heads["p_holm"][1:] > 0.01).all()
    scores = planted_result.tables["scores"].set_index(["measure", "layer", "head"])
    centre, noise = scores.loc[("pointing", 2, 2)], scores.loc[("pointing", 1, 0)]
    # looks where objects often are, at whichever object
    assert centre["low"] <= centre["null_q95"]
    assert centre["high"] >= centre["null_mean"]
    assert noise["low"] <= noise["chance"] <= noise["high"]
    assert scores.loc[("iou", 2, 1), "score"] > scores.loc[("iou", 2, 1), "null_q95"] > 0
    assert scores.loc[("entropy_shannon", 2, 1), "score"] < scores.loc[("entropy_shannon", 1, 0), "score"] < 1
    samples = planted_result.tables["samples"]
    assert samples.groupby("image_id")["half"].nunique().max() == 1
    assert samples["half"].value_counts().min() > 10
    assert heads["n_images"][0] == samples.loc[samples["half"] == "report", "image_id"].nunique()


@pytest.mark.slow
def test_a_planted_difference_between_models_is_found_and_only_that(
    planted_result: Result, mllm: MLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_data("shapes:val", limit=40)
    monkeypatch.setattr("analyses.attention.measuring.attention", _noise)
    plain = run_attention(Config(limit=40, questions=2, top=3, null=10, compare=0), Context(mllm, data, batch_size=16))
    found = {
        n: runs.Run(n, {"label": n, "seed": 0, **r.record}, r.tables, r.tensors)
        for n, r in (("plain", plain), ("planted", planted_result))
    }
    table = differences(found).set_index(["measure", "layer"])
    assert (table["low"] <= table["score"]).all()
    assert (table["score"] <= table["high"]).all()
    assert (table["p"] <= table["p_holm"]).all()
    assert table.loc[("pointing", 2), "low"] > 0.1
    assert table.loc[("pointing", 2), "p_holm"] < 0.01
    assert table.loc[("pointing", 1), "p_holm"] > 0.05
    assert table.loc[("iou", 3), "p_holm"] > 0.05
    drawn = ANALYSIS.figures(found)
    for title, figure in drawn.items():
        if "difference" in title:
            assert sum(trace.fill == "toself" for trace in figure.data) == sum(
                trace.fill != "toself" for trace in figure.data
            )
    assert {f"{title}: {kind}" for title in MEASURES.values() for kind in ("by layer", "difference by layer")} < set(
        drawn
    )
    assert {
        f"{title}: by head"
        for title in ("Spatial entropy", *(title for name, title in MEASURES.items() if name not in ENTROPIES))
    } < set(drawn)
    assert differences({"plain": found["plain"]}).empty
    without = dataclasses.replace(found["plain"], tables=found["plain"].tables | {"heads": pd.DataFrame()})
    layers = ANALYSIS.summary({"plain": without, "planted": found["planted"]})  # of both, so that none is left out
    assert set(layers["model"]) == {"plain", "planted"}
    assert "measure" in layers


def test_models_are_compared_on_the_questions_that_both_were_asked() -> None:
    """The second model gave no answer to some questions; what the first one looked at there must not count.

    The difference is that of the means over questions, also where images have unequal numbers of them.
    """
    rng = np.random.default_rng(0)
    values, gain = rng.random((12, 1, 2, 1)), rng.random((12, 1, 1, 1))  # sample, layer, head, measure

    def stored(label: str, numbers: list[int], share: float) -> runs.Run:
        samples = {"sample_id": [f"q{n}" for n in numbers], "image_id": [f"i{n // 2}" for n in numbers]}
        record: Any = {"label": label, "seed": 0, "measures": ["mass"], "layers": [1]}
        tensors = {"values": torch.from_numpy((values + share * gain)[numbers])}
        return runs.Run(label, record, {"samples": pd.DataFrame(samples)}, tensors)

    shared = [n for n in range(2, 12) if n % 4]
    first, second = stored("first", list(range(12)), 0), stored("second", shared, 1)
    same, row = differences({"first": first, "third": first, "second": second}).to_dict("records")
    assert (same["model"], same["score"], same["n_images"]) == ("third", 0, 6)
    assert row["score"] == pytest.approx(gain[shared].mean())
    assert row["low"] < row["score"] < row["high"]
    assert row["n_images"] == 5
    other = stored("other", [0], 0)
    other.tables["samples"]["image_id"] = "of another data set"
    table = differences({"first": first, "other": other})
    assert table.empty
    assert {"measure", "layer", "p_holm"} < set(table)
    elsewhere = stored("elsewhere", list(range(12)), 0)
    elsewhere.record["config"] = {"positions": "generated"}
    assert differences({"first": first, "elsewhere": elsewhere}).empty


def _noise(_: MLLM, batch: Batch, *, rows: list[list[int]], layers: list[int]) -> Iterator[torch.Tensor]:
    rng = np.random.default_rng(9)
    for _layer in layers:
        given = rng.random((len(batch), 4, 1, batch.inputs["input_ids"].shape[1])) ** 4
        yield torch.from_numpy(given / given.sum(-1, keepdims=True)).float()


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_stores_every_number_with_its_chance(runs_folder: Path, tmp_path: Path) -> None:
    models = [str(runs_folder / "baseline"), str(runs_folder / "viral")]
    words = [
        "analyses.attention",
        "--model",
        *models,
        "--limit",
        "8",
        "--null",
        "10",
        "--questions",
        "2",
        "--output_dir",
        str(tmp_path),
    ]
    done = run(*words)
    stored = {one.label: one for one in map(runs.load, tmp_path.glob("[!.]*"))}
    found = {label: stored[label] for label in sorted(stored)}
    assert set(found) == {"baseline", "viral"}
    assert "p_holm" in done.stdout
    for one in found.values():
        scores, samples = one.tables["scores"], one.tables["samples"]
        assert set(scores["measure"]) == set(MEASURES)
        assert scores["layer"].unique().tolist() == [1, 2, 3]
        assert (scores["seed"] == 0).all()
        assert (
            scores.loc[scores["measure"] != "entropy_raw", ["score", "low", "high", "chance", "null_mean"]]
            .notna()
            .all(axis=None)
        )
        assert (scores["low"] <= scores["score"] + 1e-9).all()
        assert (scores["score"] <= scores["high"] + 1e-9).all()
        values = one.tensors["values"]
        assert values.shape == (len(samples), 3, 4, len(MEASURES))
        assert samples.groupby("image_id").size().max() <= 2
        mass = scores[scores["measure"] == "mass"].set_index(["layer", "head"])["score"]
        assert mass[2, 1] == pytest.approx(float(values[:, 1, 1, 0].mean()), abs=1e-5)
        assert ((mass > 0) & (mass < 1)).all()
        assert one.tensors["map_0"].shape == (3, 4, 8, 8)
        assert one.tensors["map_0"].sum((-2, -1)).allclose(torch.ones(3, 4))
        assert set(one.tables["examples"]["sample_id"]) <= set(samples.loc[samples["half"] == "report", "sample_id"])
    # the same halves, so pairs exist
    assert found["baseline"].tables["samples"]["half"].equals(found["viral"].tables["samples"]["half"])
    drawn = ANALYSIS.figures(found)
    overlay = drawn["Attention over the image, of a head that was chosen on other images"]
    assert [trace.type for trace in overlay.data].count("heatmap") == 2 * 3 * len(found["viral"].tables["examples"])
    methods = found["viral"].tables["methods"]
    assert methods["method"].tolist()[6:] == ["rollout"] * 3 + ["gradient x attention"] * 3
    assert methods[["score", "low", "high", "chance"]].notna().all(axis=None)
    assert (methods["n_images"] == found["viral"].tables["heads"]["n_images"][0]).all()  # the half reported on
    heat = drawn["pointing accuracy: by head"]
    assert heat.data[0].customdata.shape == (3, 4, 5)
    assert heat.layout.annotations[0].text == "baseline"
    assert all(figure.to_json() for figure in drawn.values())
    before = {folder: (folder / "run.json").stat().st_mtime_ns for folder in tmp_path.glob("[!.]*")}
    run(*words)
    assert before == {folder: (folder / "run.json").stat().st_mtime_ns for folder in tmp_path.glob("[!.]*")}


def test_photographs_have_mass_and_entropies(mllm: MLLM, tmp_path: Path) -> None:
    for number, size in enumerate([(60, 40), (30, 80)]):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)).save(
            tmp_path / f"{number}.png"
        )
    data = load_data(f"folder:{tmp_path}")
    result = run_attention(Config(localise=False, null=10), Context(mllm, data, batch_size=2))
    assert set(result.tables) == {"scores", "layers", "samples", "examples"}
    assert "pointing" not in set(result.tables["scores"]["measure"])
    found = {"viral": runs.Run("k", {"label": "viral", "seed": 0, **result.record}, result.tables, result.tensors)}
    # overlays; each measure by layer; mass by head, and the four entropies by head in one figure
    assert len(ANALYSIS.figures(found)) == 1 + 5 + 2
    assert len(ANALYSIS.summary(found)) == 3 * 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "9", "--limit", "4"], "layer 9 does not exist"),
        (["--layers", "0", "--limit", "4"], "layer 0 does not exist"),
        (["--data", "folder:PHOTOS"], "has no objects to compare attention with: choose one that has"),
        (["--limit", "3"], "images have a question about exactly one object: expected at least 4"),
        (["--top", "0"], "top is 0: expected at least 1"),
    ],
)
def test_bad_input_is_one_sentence(runs_folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "photos" / "a.png")
    given = [w.replace("PHOTOS", str(tmp_path / "photos")) for w in words]
    assert message in refused(
        "analyses.attention", "--model", str(runs_folder / "viral"), "--output_dir", str(tmp_path / "out"), *given
    )
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").glob("[!.]*")) == []


def test_no_question_left_and_no_raster_are_one_sentence(mllm: MLLM) -> None:
    data = load_data("shapes:val", limit=6)
    data.samples = [dataclasses.replace(s, question="what is this ?") for s in data]
    with pytest.raises(DataError, match=r"none of the \d+ questions of 'shapes:val' names exactly one object"):
        run_attention(Config(limit=6), Context(mllm, data, batch_size=8))

    def without(*given: Any) -> list[list[VisualTokens]]:
        return [[dataclasses.replace(part, grid=None) for part in own] for own in mllm.family.visual_tokens(*given)]

    blind = MLLM(mllm.model, mllm.processor, dataclasses.replace(mllm.family, visual_tokens=without), mllm.name)
    with pytest.raises(ModelError, match="have no rows and columns"):
        run_attention(Config(limit=6), Context(blind, load_data("shapes:val", limit=6), batch_size=8))


def test_an_interval_ends_where_its_measure_does() -> None:
    """Three images leave the mean open; no share is below 0 or above 1, a ratio of masses has no upper end."""
    few = np.array([[[0.0, 0.0, 0.0, 1.0]], [[0.0, 0.0, 0.01, 1.0]], [[0.3, 3.0, 3.0, 0.2]]])  # (sample, head, measure)
    measures = ["component_entropy", "mass_ratio", "entropy_raw", "mass"]
    entropy, ratio, raw, mass = score_intervals(few, measures, ["a", "b", "c"])
    assert (entropy.estimate, entropy.low) == (pytest.approx(0.1), 0)
    assert 0.1 < entropy.high <= 1
    assert ratio.low == raw.low == 0
    assert ratio.high > 1 and raw.high > 1
    assert mass.estimate < mass.high <= 1
