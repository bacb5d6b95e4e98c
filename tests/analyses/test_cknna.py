"""CKNNA with the model's own encoder, by grid and by tile: against plain transformers and the formula; the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from analyses.cknna import ANALYSIS
from analyses.cknna import run as run_cknna
from analyses.cknna.comparison import differences
from analyses.cknna.options import Config
from tests.conftest import refused, run
from tests.tiny import build
from tests.workbench.overview.folders import cknna as stored_cknna
from workbench import runs
from workbench.analysis.declaration import Context, vfm_inputs
from workbench.data import Dataset, load_data
from workbench.errors import ConfigError
from workbench.mllm import MLLM
from workbench.overview.differences import Pair, by_layer
from workbench.overview.measures import MEASURES
from workbench.overview.models import Model
from workbench.overview.stored import read_stored
from workbench.vfm import find_vfm, load_vfm

K = 4
SIZES = [(90, 60), (40, 120), (64, 64), (150, 50)]


def naive_cknna(x: Tensor, y: Tensor, k: int) -> float:
    """The formula, with dense n x n matrices in float64."""
    kernels = [(rows := (v.double() / v.double().norm(dim=1, keepdim=True))) @ rows.T for v in (x, y)]
    n = len(x)
    near = []
    for kernel in kernels:
        others = kernel.clone().fill_diagonal_(-torch.inf)
        near.append(torch.zeros(n, n, dtype=torch.double).scatter_(1, others.topk(k).indices, 1.0))

    def hsic(a: Tensor, b: Tensor, mask: Tensor) -> float:
        a, b = (a * mask).fill_diagonal_(0), (b * mask).fill_diagonal_(0)
        value = (a * b.T).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * (a @ b).sum() / (n - 2)
        return float(value / (n * (n - 3)))

    both = hsic(*kernels, near[0] * near[1])
    return both / (hsic(kernels[0], kernels[0], near[0]) * hsic(kernels[1], kernels[1], near[1])) ** 0.5


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("photos")
    for number, size in enumerate(SIZES):
        rng = np.random.default_rng(number)
        small = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return load_data(f"folder:{folder}")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> MLLM:
    return MLLM.load(str(build("llava", tmp_path_factory.mktemp("models") / "llava")))


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> MLLM:
    return MLLM.load(str(build("llava_next", tmp_path_factory.mktemp("models") / "next")))


def scored(mllm: MLLM, data: Dataset, **options: object) -> dict[str, pd.DataFrame]:
    config = Config(data=data.name, k=K, null=10, **{"vfm": ("own",), **options})  # type: ignore[arg-type]
    return run_cknna(config, Context(mllm, data, batch_size=3)).tables


def oracle(mllm: MLLM, data: Dataset, tiles_of: Callable[..., list[tuple[list[int], Tensor]]]) -> list[list[float]]:
    """CKNNA of each image and layer by plain transformers: the mean over (positions, encoder features) of its tiles."""
    result = []
    for sample in data:
        batch = mllm.encode([sample.image], [sample.question])
        inputs = batch.inputs
        with torch.inference_mode():
            states = mllm.model(**inputs, output_hidden_states=True).hidden_states
            pixels = inputs["pixel_values"].flatten(0, -4)
            seen = mllm.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        places = (inputs["input_ids"][0] == mllm.config.image_token_id).nonzero().flatten().tolist()
        tiles = tiles_of(mllm, sample.image, places, seen)
        # the last state of transformers is after the final norm
        scores = [[naive_cknna(state[0, index], z, K) for index, z in tiles] for state in states[:-1]]
        result.append([float(np.mean(of_layer)) for of_layer in scores])
    return result


def one_tile(mllm: MLLM, image: Image.Image, places: list[int], seen: Tensor) -> list[tuple[list[int], Tensor]]:
    return [(places, seen[0])]


def next_tiles(mllm: MLLM, image: Image.Image, places: list[int], seen: Tensor) -> list[tuple[list[int], Tensor]]:
    """The base and each tile of LLaVA-NeXT: numbers of features go through transformers' own packing."""
    config, patches = mllm.config, seen.shape[1]
    side, size = round(patches**0.5), (image.height, image.width)
    down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    numbers = torch.arange(down * across * patches).view(down, across, side, side)
    whole = numbers.permute(0, 2, 1, 3).reshape(1, down * side, across * side)
    kept = unpad_image(whole, size)[0]
    with_newlines = torch.cat([kept, torch.full((len(kept), 1), -1)], dim=1).flatten().tolist()
    assert len(places) == patches + len(with_newlines)
    tiles = [(places[:patches], seen[0])]
    for tile in range(down * across):
        pairs = [
            (place, number % patches)
            for place, number in zip(places[patches:], with_newlines, strict=True)
            if number >= 0 and number // patches == tile
        ]
        tiles.append(([place for place, _ in pairs], seen[1 + tile][[number for _, number in pairs]]))
    return tiles


def test_llava_by_grid_is_the_formula_on_transformers_own_states(llava: MLLM, photos: Dataset) -> None:
    expected = np.array(oracle(llava, photos, one_tile))
    for by in ("grid", "tile"):
        tables = scored(llava, photos, by=by)
        table = tables["per_image"].pivot(
            index="part" if "part" in tables["per_image"] else "image_id", columns="layer"
        )
        got = table["score"].loc[[sample.image_id for sample in photos]].to_numpy()
        assert np.abs(got[:, :-1] - expected).max() < 1e-4
        assert (tables["scores"]["by"] == by).all()
        assert (tables["scores"]["n"] == 16).all()
        assert (tables["scores"]["vfm"] == "own").all()
        assert (tables["scores"]["target"] == "own encoder").all()


def test_llava_next_by_tile_is_the_mean_over_its_base_and_tiles(llava_next: MLLM, photos: Dataset) -> None:
    expected = np.array(oracle(llava_next, photos, next_tiles))
    tables = scored(llava_next, photos, by="tile")
    got = tables["per_image"].pivot(index="image_id", columns="layer")["score"]
    got = got.loc[[sample.image_id for sample in photos]].to_numpy()
    assert np.abs(got[:, :-1] - expected).max() < 1e-4
    grids = scored(llava_next, photos, by="grid")
    assert tables["scores"]["rasters"].iloc[0] == sum(len(t) for t in _tiles_by_hand(llava_next, photos))
    assert grids["scores"]["rasters"].iloc[0] == 2 * len(photos)
    assert np.abs(grids["scores"]["score"] - tables["scores"]["score"]).max() > 0.01


def _tiles_by_hand(mllm: MLLM, data: Dataset) -> list[range]:
    """A base and the tiles of the canvas that transformers chooses."""
    config = mllm.config
    shapes = [
        get_anyres_image_grid_shape(
            (sample.image.height, sample.image.width), config.image_grid_pinpoints, config.vision_config.image_size
        )
        for sample in data
    ]
    return [range(1 + down * across) for down, across in shapes]


@pytest.fixture
def projector(llava: MLLM) -> Iterator[Callable[[nn.Module], None]]:
    """Gives the model another projector, for one test."""
    inner, before = llava.model.model, llava.projector

    def replace(module: nn.Module) -> None:
        inner.multi_modal_projector = module

    yield replace
    replace(before)


def test_a_layer_that_is_z_scores_one(llava: MLLM, photos: Dataset, projector: Callable[[nn.Module], None]) -> None:
    """The projector's output is layer 0: the identity or a rotation keeps all neighbors, a random matrix many."""
    projector(nn.Identity())
    table = scored(llava, photos)["scores"].set_index("layer")
    assert table.loc[0, "score"] == pytest.approx(1, abs=1e-6)
    assert table.loc[0, "low"] == pytest.approx(1, abs=1e-6)
    assert table.loc[0, "null_q95"] < 0.9
    assert table.loc[2, "score"] < 0.999
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    for weight in (torch.linalg.qr(matrix)[0], matrix):
        linear = nn.Linear(32, 32, bias=False)
        linear.weight.data.copy_(weight)
        projector(linear)
        row = scored(llava, photos, layers=(0,))["scores"].iloc[0]
        if weight is matrix:
            assert 0.6 < row["score"] < 1
            assert row["score"] > row["null_q95"] + 0.2
        else:
            assert row["score"] == pytest.approx(1, abs=1e-4)


def test_a_vfm_sees_each_tile_by_itself(llava_next: MLLM, photos: Dataset) -> None:
    tables = scored(llava_next, photos, vfm=("dinov2-small", "own"), by="tile", layers=(1,))
    assert list(tables["scores"]["vfm"]) == ["dinov2-small", "own"]
    alone = scored(llava_next, photos, by="tile", layers=(1,))["scores"]
    assert tables["scores"]["score"].iloc[1] == pytest.approx(alone["score"].item(), abs=1e-9)
    vfm, sample = load_vfm("dinov2-small"), photos.samples[0]
    image = sample.image
    assert image.size == (90, 60)  # on 112 x 56 + 56, resized to 112 x 75: rows 18 to 93 of 112
    batch = llava_next.encode([image], [sample.question])
    with torch.inference_mode():
        state = llava_next.model(**batch.inputs, output_hidden_states=True).hidden_states[1][0]
        seen = torch.zeros(5, 16, 1)
    places = (batch.inputs["input_ids"][0] == llava_next.config.image_token_id).nonzero().flatten().tolist()
    scores = []
    for number, (index, _) in enumerate(next_tiles(llava_next, image, places, seen)):
        # the canvas is 112 x 112, of which the image covers 112 x 75 from y = 18 on; 6 of 8 rows of patches remain
        down, across = divmod(number - 1, 2)
        top, left = (0, 0) if number == 0 else ((-4 / 75, 38 / 75)[down], across / 2)
        bottom, right = (1, 1) if number == 0 else ((38 / 75, 80 / 75)[down], left + 0.5)
        edges = (round(left * 90), round(top * 60), round(right * 90), round(bottom * 60))
        patches = vfm([image.crop(edges)], grid=(4, 4) if number == 0 else (3, 4)).tokens()[0]
        scores.append(naive_cknna(state[index], patches, K))
    per_image = tables["per_image"].query("vfm == 'dinov2-small'").set_index("image_id")
    assert per_image.loc[sample.image_id, "score"] == pytest.approx(np.mean(scores), abs=2e-3)


@pytest.mark.slow
def test_the_command_compares_two_models_with_their_encoders(runs_folder: Path, tmp_path: Path) -> None:
    models = [str(runs_folder / name) for name in ("baseline", "viral")]
    words = ["--vfm", "own", "--by", "tile", "--limit", "6", "--null", "10", "--output_dir", str(tmp_path)]
    done = run("analyses.cknna", "--model", *models, *words)
    assert "own" in done.stdout
    found = {one.label: one for one in map(runs.load, runs.index(tmp_path)["folder"])}
    assert set(found) == {"baseline", "viral"}
    for one in found.values():
        assert one.record["own_encoder"] == "input of model.multi_modal_projector, rows of it for each visual token: 1"
        assert one.record["vfms"] == []
    figures = ANALYSIS.figures(found)
    assert set(figures) == {"Alignment by layer", "Difference by layer"}
    assert "own encoder" in json.dumps(figures["Alignment by layer"].to_plotly_json(), default=str)
    # by grid it is another question, and the runs are not paired with it
    run("analyses.cknna", "--model", models[1], *[word for word in words if word not in ("--by", "tile")])
    by_grid = next(o for o in map(runs.load, runs.index(tmp_path)["folder"]) if "by" not in o.record["config"])
    assert list(ANALYSIS.figures({"a": found["baseline"], "b": by_grid})) == ["Alignment by layer"]
    np.testing.assert_array_equal(by_grid.tables["scores"]["score"], found["viral"].tables["scores"]["score"])


def test_layers_of_the_own_encoder_and_a_vfm_called_own_are_refused(tmp_path: Path) -> None:
    said = refused("analyses.cknna", "--model", str(tmp_path), "--vfm", "own", "--vfm_layers", "3")
    assert "vfm_layers is 3 with vfm own" in said
    assert len(said) < 300
    with pytest.raises(ConfigError, match=r"vfm is own, .*alignment\.target: encoder"):
        find_vfm("own")
    assert list(vfm_inputs(Config(vfm=("own", "dinov2-small")))) == ["vfm dinov2-small"]


@pytest.mark.parametrize("alike", [True, False])
def test_scores_with_other_weights_of_a_vfm_are_not_subtracted(tmp_path: Path, alike: bool) -> None:
    """The folder of a VFM keeps its name when its weights are replaced."""
    found = {}
    for name, weights in (("baseline", "first"), ("viral", "first" if alike else "second")):
        folder = stored_cknna(tmp_path, name, {1: [0.1, 0.2, 0.4]}, tokens_per_image=16)
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | {"vfm_fingerprints": {"dinov2-small": weights}}))
        found[name] = runs.load(folder)
    assert len(differences(found)) == alike
    stored = {run.model: run for run in read_stored(tmp_path).runs}
    pair = Pair((Model("baseline"),), (Model("viral"),))
    assert len(by_layer(MEASURES["cknna"], pair, stored)) == alike
