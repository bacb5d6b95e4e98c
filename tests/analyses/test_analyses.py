"""The CKNNA analysis from its command line: planted truth, look-up of stored runs, every pooling, photographs, bad
input."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from skimage import data as photographs
from torch import Tensor

from analyses.cknna import ANALYSIS
from analyses.cknna import run as run_cknna
from analyses.cknna.comparison import differences
from analyses.cknna.options import Config
from tests.conftest import refused, run
from tests.tiny import build
from workbench import runs
from workbench.analysis.declaration import Context
from workbench.capture.hidden_states import Activations
from workbench.data import Dataset, load_data
from workbench.errors import DataError, RunError
from workbench.metrics import METRICS, cknna
from workbench.mllm import MLLM
from workbench.spatial.within_image import Scores, Within
from workbench.vfm import VFM, load_vfm


@pytest.fixture(scope="module", autouse=True)
def vfm_once() -> Iterator[None]:
    """Load a VFM once, and compute its features of the same images once, for all tests of this module."""
    results: dict[object, object] = {}

    def remembered(compute: Callable[..., object]) -> Callable[..., object]:
        def features(vfm: VFM, images: list[Image.Image], *words: list[int], **options: object) -> object:
            pixels = tuple((image.size, hash(image.tobytes())) for image in images)
            key = (compute.__name__, vfm.name, pixels, str(words), str(options))
            if key not in results:
                results[key] = compute(vfm, images, *words, **options)
            return results[key]

        return features

    with pytest.MonkeyPatch.context() as patch:
        for name in ("__call__", "layers"):
            patch.setattr(VFM, name, remembered(getattr(VFM, name)))
        patch.setattr("analyses.cknna.load_vfm", cache(load_vfm))
        yield


@pytest.fixture(scope="module")
def mllm(runs_folder: Path) -> MLLM:
    return MLLM.load(str(runs_folder / "viral"))


@pytest.mark.slow
def test_a_stored_run_has_n_seed_interval_null_and_provenance(runs_folder: Path) -> None:
    table = runs.index(runs_folder)
    assert sorted(table["label"]) == ["baseline", "viral"]
    stored = runs.load(table["folder"][0])
    scores = stored.tables["scores"]
    assert scores["layer"].tolist() == [0, 1, 2, 3]
    assert (scores["n"] == 64).all()
    assert (scores["n_images"] == 6).all()
    assert (scores["seed"] == 0).all()
    assert (scores["low"] <= scores["score"]).all()
    assert (scores["score"] <= scores["high"]).all()
    assert (scores["null_mean"] <= scores["null_q95"]).all()
    assert stored.record["vfm_fingerprints"]["dinov2-small"]
    assert stored.record["git"]
    assert stored.record["config"]["tokens_per_image"] == 16
    per_image = stored.tables["per_image"].groupby("layer")["score"].mean()
    assert np.allclose(per_image, scores.set_index("layer")["score"])


def test_the_stored_score_is_the_metric_on_the_same_tokens(runs_folder: Path, mllm: MLLM) -> None:
    from workbench.capture.hidden_states import read

    sample = load_data("shapes:val", limit=1)[0]
    tokens = read(mllm, mllm.encode([sample.image], [sample.question]), layers=[2])[0].values[0]
    direct = cknna(tokens, load_vfm("dinov2-small")([sample.image], grid=(8, 8)).tokens()[0], k=10)
    stored = next(runs.load(f) for f in runs.index(runs_folder)["folder"] if runs.load(f).label == "viral").tables[
        "per_image"
    ]
    row = stored[(stored["layer"] == 2) & (stored["image_id"] == sample.image_id)]
    assert row["score"].item() == pytest.approx(direct, abs=1e-5)


def plant(monkeypatch: pytest.MonkeyPatch, data: Dataset, *makers: Callable[[], Tensor]) -> None:
    """A model whose layers are what `makers` return for all images, (image, token, d)."""
    made = [maker() for maker in makers]
    where = {id(scene[0].image): number for number, scene in enumerate(data.scenes)}
    assert len(where) == len(made[0])

    def planted(mllm: MLLM, batch: object, *, layers: list[int], **_: object) -> list[Activations]:
        planted.seen, start = planted.seen + 8, planted.seen
        values = torch.stack(made)[:, start : start + 8]
        return [Activations(own, tuple(range(len(made))), torch.arange(own.shape[1])) for own in values.unbind(1)]

    planted.seen = 0
    monkeypatch.setattr("workbench.spatial.within_image.read", planted)


def turned(features: Tensor) -> Tensor:
    return features @ torch.linalg.qr(torch.randn(384, 384, generator=torch.Generator().manual_seed(0))).Q


def noise(images: int) -> Tensor:
    return torch.randn(images, 64, 384, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize("metric", list(METRICS))
@pytest.mark.parametrize("pooling", ["within", "tokens", "pooled"])
def test_a_layer_that_is_a_layer_of_the_vfm_scores_one_there_alone(
    mllm: MLLM, monkeypatch: pytest.MonkeyPatch, pooling: str, metric: str
) -> None:
    """Planted truth: layers 0 and 1 are blocks 9 and 3 of the VFM up to a rotation, layer 2 is noise and scores its
    null."""
    data = load_data("shapes:val", limit=24)
    images = [scene[0].image for scene in data.scenes]
    third, ninth = (features.tokens() for features in load_vfm("dinov2-small").layers(images, [3, 9], grid=(8, 8)))
    plant(monkeypatch, data, lambda: turned(ninth), lambda: turned(third), lambda: noise(24))
    config = Config(limit=24, layers=(0, 1, 2), vfm_layers=(9, 3), metric=metric, pooling=pooling, k=5, dim=5, null=40)
    table = run_cknna(config, Context(mllm, data, batch_size=8)).tables["scores"]
    scores = table.pivot(index="layer", columns="vfm_layer", values="score")
    assert scores.loc[0, 9] == pytest.approx(1, abs=1e-4)
    assert scores.loc[1, 3] == pytest.approx(1, abs=1e-4)
    assert scores.loc[0, 3] < 0.97
    assert scores.loc[1, 9] < 0.97
    planted, random = (table[(table["layer"] == 2) == is_noise] for is_noise in (False, True))
    assert (planted["p"] < 0.05).all()
    assert (random["p"] > 0.01).all()
    assert (random["score"] - random["null_mean"] < 0.2).all()
    assert (table["low"] <= table["score"]).all()
    assert (table["score"] <= table["high"]).all()
    assert (table["n_images"] == 24).all()
    option = {"k": 5, "dim": 5}.get(METRICS.get(metric).option)
    assert option is None or (table[METRICS.get(metric).option] == option).all()


@pytest.mark.slow
def test_batches_change_no_number(mllm: MLLM) -> None:
    data = load_data("shapes:val", limit=5)
    for metric in METRICS:
        tables = [
            run_cknna(Config(limit=5, layers=(1,), metric=metric, null=10), Context(mllm, data, size)).tables["scores"]
            for size in (2, 5)
        ]
        numbers = tables[0].select_dtypes("number").columns
        assert np.allclose(
            tables[0][numbers].astype(float), tables[1][numbers].astype(float), atol=1e-4, equal_nan=True
        ), metric


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["within", "tokens", "pooled"])
def test_a_model_does_not_differ_from_itself_and_differs_from_noise(
    mllm: MLLM, monkeypatch: pytest.MonkeyPatch, pooling: str
) -> None:
    data = load_data("shapes:val", limit=40)
    features = load_vfm("dinov2-small")([scene[0].image for scene in data.scenes], grid=(8, 8)).tokens()
    config, context = Config(limit=40, layers=(0, 1), pooling=pooling, k=5, null=10), Context(mllm, data, batch_size=8)
    record = {"label": "", "data_fingerprint": "d", "config": dataclasses.asdict(config)}
    found = {}
    for name, second in (("a", features), ("again", features), ("noise", noise(40))):
        plant(monkeypatch, data, lambda: turned(features), lambda second=second: second)
        found[name] = runs.Run(name, record, run_cknna(config, context).tables)
    table = differences(found).set_index(["model", "layer"])
    assert (table.loc["again"][["score", "low", "high"]] == 0).all(axis=None)
    assert (table.loc["again"]["p_holm"] == 1).all()
    assert (table.loc[("noise", 0)][["score", "low", "high"]] == 0).all()
    fall = table.loc[("noise", 1)]
    scores = found["noise"].tables["scores"].set_index("layer")["score"]
    assert fall["score"] == pytest.approx(scores[1] - scores[0], abs=1e-4)
    assert fall["low"] <= fall["score"] <= fall["high"] < -0.3
    assert fall["p"] <= fall["p_holm"] < 0.05
    assert fall["n_images"] == 40
    assert (table["against"] == "a").all()
    (change,) = (figure for title, figure in ANALYSIS.figures(found).items() if title == "Difference by layer")
    assert "CKNNA, minus a" in change.layout.yaxis.title.text
    assert sum(trace.fill == "toself" for trace in change.data) == 2
    other = dataclasses.replace(found["again"], record=record | {"data_fingerprint": "e"})
    assert differences({"a": found["a"], "other": other}).empty
    assert list(ANALYSIS.figures({"a": found["a"], "other": other})) == ["Alignment by layer"]


@pytest.mark.slow
def test_the_matrix_view_marks_what_differs(runs_folder: Path, tmp_path: Path) -> None:
    models = [str(runs_folder / "baseline"), str(runs_folder / "viral")]
    words = [
        "--limit",
        "12",
        "--null",
        "10",
        "--metric",
        "rsa",
        "--vfm",
        "dinov2-small",
        "efficientnet-lite0",
        "--vfm_layers",
        "2",
        "4",
    ]
    done = run("analyses.cknna", "--model", *models, *words, "--output_dir", str(tmp_path))
    assert "vfm_layer" in done.stdout
    assert "rsa" in done.stdout
    found = {stored.label: stored for stored in map(runs.load, runs.index(tmp_path).sort_values("label")["folder"])}
    figures = ANALYSIS.figures(found)
    assert list(figures) == ["Alignment by layer and layer of the VFM", "Difference by layer and layer of the VFM"]
    maps, change = figures.values()
    assert [len(maps.data), len(change.data)] == [4, 2]
    assert maps.layout.coloraxis.colorbar.title.text == "RSA"
    assert all("chance" in note.text for note in maps.layout.annotations)
    assert change.layout.coloraxis.cmid == 0
    table = differences(found)
    assert len(table) == 2 * 2 * 4
    assert table[["low", "high", "p_holm"]].notna().all(axis=None)
    for trace, (_, part) in zip(change.data, table.groupby("vfm", sort=False), strict=True):
        wide = part.pivot(index="layer", columns="vfm_layer", values="score")
        marked = part[(part["p_holm"] < 0.05) & ((part["low"] > 0) | (part["high"] < 0))]
        assert np.array_equal(trace.z, wide.to_numpy())
        assert (np.asarray(trace.text) == "●").sum() == len(marked)
        assert {(int(trace.y[i]), int(trace.x[j])) for i, j in np.argwhere(np.asarray(trace.text) == "●")} == set(
            zip(marked["layer"], marked["vfm_layer"], strict=True)
        )


def test_runs_of_version_1_are_still_shown_and_compared(runs_folder: Path) -> None:
    """They had no metric and no layers of a VFM."""
    found = {stored.label: stored for stored in map(runs.load, runs.index(runs_folder).sort_values("label")["folder"])}
    gone = ["metric", "target", "vfm_layer", "dim"]
    old = {
        label: dataclasses.replace(
            stored, tables={name: table.drop(columns=gone, errors="ignore") for name, table in stored.tables.items()}
        )
        for label, stored in found.items()
    }
    assert list(ANALYSIS.figures(old)) == list(ANALYSIS.figures(found)) == ["Alignment by layer", "Difference by layer"]
    assert differences(old)[["score", "low", "high", "p_holm"]].equals(
        differences(found)[["score", "low", "high", "p_holm"]]
    )
    assert np.allclose(ANALYSIS.summary(old)["score"], ANALYSIS.summary(found)["score"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["internvl", "qwen2_vl", "llava_next"])
def test_every_raster_counts_and_an_image_is_the_mean_of_its_rasters(family: str, tmp_path: Path) -> None:
    """Photographs of different shapes through tiled models and free grids, against single calls."""
    from tests.tiny import build
    from workbench.capture.hidden_states import read

    (tmp_path / "photos").mkdir()
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(photographs, name)()).save(tmp_path / "photos" / f"{name}.png")
    tiled, data = MLLM.load(str(build(family, tmp_path / family))), load_data(f"folder:{tmp_path / 'photos'}")
    table = run_cknna(Config(data=data.name, layers=(1,), k=3, null=10), Context(tiled, data, batch_size=3)).tables
    vfm, expected = load_vfm("dinov2-small"), []
    for sample in data:
        batch = tiled.encode([sample.image], [sample.question])
        values, scores, at = read(tiled, batch, layers=[1])[0].values[0], [], 0
        for raster in tiled.visual_tokens(batch)[0]:
            left, top, right, bottom = (
                round(v * side) for v, side in zip(raster.box, sample.image.size * 2, strict=True)
            )
            target = vfm([sample.image.crop((left, top, right, bottom))], grid=raster.grid).tokens()[0]
            scores.append(cknna(values[at : at + len(raster.index)], target, k=3))
            at += len(raster.index)
        expected.append(np.mean(scores))
    assert np.allclose(table["per_image"]["score"], expected, atol=2e-3)
    assert table["scores"]["score"].item() == pytest.approx(np.mean(expected), abs=2e-3)
    assert table["scores"]["n_images"].item() == 4
    config = Config(data=data.name, layers=(1,), k=3, null=10, pooling="tokens", tokens_per_image=8)
    assert run_cknna(config, Context(tiled, data, batch_size=4)).tables["scores"]["n"].item() == 32
    with pytest.raises(
        DataError, match="k is 1 with 4 images: half of the images have 2 tokens together, expected at least 4"
    ):
        run_cknna(dataclasses.replace(config, k=1, pooling="pooled"), Context(tiled, data, batch_size=4))


@pytest.mark.slow
def test_the_same_question_is_a_look_up(runs_folder: Path, tmp_path: Path) -> None:
    words = [
        "analyses.cknna",
        "--model",
        str(runs_folder / "viral"),
        "--limit",
        "3",
        "--null",
        "10",
        "--k",
        "5",
        "--layers",
        "1",
        "3",
    ]
    words += ["--pooling", "pooled", "--k", "2", "--limit", "12", "--output_dir", str(tmp_path)]
    run(*words)
    (folder,) = tmp_path.glob("[!.]*")
    before = (folder / "run.json").stat().st_mtime_ns
    assert str(folder) in run(*words).stdout
    assert (folder / "run.json").stat().st_mtime_ns == before
    assert len(list(tmp_path.glob("[!.]*"))) == 1
    run(*words, "--seed", "1")
    assert len(list(tmp_path.glob("[!.]*"))) == 2


@pytest.mark.slow
def test_a_folder_of_photographs(runs_folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(photographs, name)()).save(photos / f"{name}.jpg")
    Image.fromarray(photographs.camera()).save(photos / "grey.png")
    done = run(
        "analyses.cknna",
        "--model",
        str(runs_folder / "viral"),
        "--data",
        f"folder:{photos}",
        "--null",
        "10",
        "--output_dir",
        str(tmp_path / "out"),
    )
    stored = runs.load(next((tmp_path / "out").glob("[!.]*")))
    assert (stored.tables["scores"]["n_images"] == 5).all()
    assert "dinov2-small" in done.stdout
    (photos / "broken.jpg").write_bytes((photos / "coffee.jpg").read_bytes()[:2000])
    failed = run(
        "analyses.cknna",
        "--model",
        str(runs_folder / "viral"),
        "--data",
        f"folder:{photos}",
        "--output_dir",
        str(tmp_path / "out2"),
        code=2,
    )
    assert failed.stderr.strip().splitlines()[-1].startswith("error: image ")
    assert "broken.jpg" in failed.stderr
    assert not (tmp_path / "out2").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model given"),
        (["--model", "MODEL", "--vfm", "dinov2-smal"], "did you mean 'dinov2-small'"),
        (["--model", "MODEL", "--pooling", "withn"], "withn"),
        (["--model", "MODEL", "--k", "0"], "k is 0: expected at least 1"),
        (["--model", "MODEL", "--metric", "cknn"], "cknna"),
        (["--model", "MODEL", "--vfm_layers", "3", "13"], "layer 13 does not exist in dinov2-small: expected 1 to 12"),
        (
            ["--model", "MODEL", "--vfm", "efficientnet-lite0", "--vfm_layers", "0"],
            "layer 0 does not exist in efficientnet-lite0: expected 1 to 5",
        ),
        (["--model", "MODEL", "--metric", "svcca", "--dim", "64", "--limit", "4"], "dim is 64: expected 1 to "),
        (
            ["--model", "MODEL", "--k", "64", "--limit", "4"],
            "of the 4 images can be scored: of the first, 64 visual tokens, expected at least 65 with k 64",
        ),
        (["--model", "MODEL", "--layers", "9", "--limit", "4"], "layer 9 does not exist"),
        (["--model", "MODEL", "--data", "shapes:vall"], "did you mean 'val'"),
        (["--model", "MODEL", "--data", "folder:/nowhere"], "folder '/nowhere' does not exist"),
        (["--model", "MODEL", "--data", "folder:EMPTY"], "contains no images that can be read"),
        (["--model", "MODEL", "MODEL"], "is given twice: expected each model once"),
        (["--model", "EMPTY"], "holds no model"),
        (["--model", "MODEL", "--batch_size", "0"], "batch_size is 0"),
        (["--model", "MODEL", "--device", "cuda"], "no GPU is visible"),
        (["--model", "MODEL", "--limit", "12", "--pooling", "pooled"], "k is 10 with 12 images"),
        (["--modle", "MODEL"], "unknown option '--modle': did you mean '--model'"),
        (["--model", "MODEL", "--output_dir", "/proc/here"], "cannot make folder /proc/here"),
    ],
)
def test_bad_input_is_one_sentence(runs_folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    given = [w.replace("MODEL", str(runs_folder / "viral")).replace("EMPTY", str(tmp_path / "empty")) for w in words]
    assert message in refused(
        "analyses.cknna", *([] if "--output_dir" in words else ["--output_dir", str(tmp_path / "out")]), *given
    )
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").glob("[!.]*")) == []


def test_a_crash_leaves_no_half_run(tmp_path: Path) -> None:
    record = {"analysis": "x", "label": "a", "model": "a", "data": "d", "seconds": 1, "created": "", "config": {}}
    bad = runs.Run("k1", record, {"ok": pd.DataFrame({"a": [1]}), "bad": pd.DataFrame({"a": [object()]})})
    with pytest.raises(Exception, match=r".+"):
        runs.save(bad, tmp_path)
    assert list(tmp_path.iterdir()) == []
    runs.save(dataclasses.replace(bad, tables={"ok": pd.DataFrame({"a": [1]})}), tmp_path)
    assert runs.load(tmp_path / "x-k1").tables["ok"]["a"].tolist() == [1]
    (tmp_path / "x-k1" / "ok.parquet").write_bytes(b"")
    with pytest.raises(RunError, match="is not a readable run"):
        runs.load(tmp_path / "x-k1")


def test_figures_carry_intervals_and_null(runs_folder: Path) -> None:
    found = {run.label: run for run in map(runs.load, runs.index(runs_folder)["folder"])}
    figure = ANALYSIS.figures(found)["Alignment by layer"]
    names = [trace.name for trace in figure.data if trace.name]
    assert set(names) == {"baseline · dinov2-small", "viral · dinov2-small", "chance (null mean to 95 %)"}
    assert sum(trace.fill == "toself" for trace in figure.data) == 3


def test_model_fingerprint_and_config_are_in_the_key(runs_folder: Path) -> None:
    first, second = (json.loads((f / "run.json").read_text()) for f in runs.index(runs_folder)["folder"])
    assert first["model_fingerprint"] != second["model_fingerprint"]
    assert first["key"] != second["key"]
    shutil.rmtree(runs_folder / "none", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cknna", "permutation", "knockout", "tokens"])
def test_a_family_without_a_raster_is_refused(mllm: MLLM, name: str) -> None:
    """Tokens without rows and columns have no pixels under them: nothing is measured."""
    own = mllm.family
    flat = MLLM(mllm.model, mllm.processor, own, mllm.name)
    flat.family = dataclasses.replace(
        own,
        visual_tokens=lambda *given: [
            [dataclasses.replace(t, grid=None) for t in s] for s in own.visual_tokens(*given)
        ],
    )
    analysis = importlib.import_module(f"analyses.{name}").ANALYSIS
    with pytest.raises(
        DataError, match="gives visual tokens without a grid: expected a model whose visual tokens all have a place"
    ):
        analysis.run(analysis.config(limit=12), Context(flat, load_data("shapes:val", limit=12), batch_size=4))


# --- images that cannot be scored -----------------------------------------------------------------


def test_an_image_that_a_metric_refuses_is_left_out_by_name_and_changes_no_other() -> None:
    """Too few tokens, or all of them alike; whatever stands beside it in a batch."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": [20], "icon": [4], "b": [12, 20], "white": [20], "c": [20], "half": [20, 6]}
    hidden = [[[torch.randn(n, 8, generator=generator) for n in own] for own in sizes.values()] for _ in range(2)]
    patches = [[[torch.randn(n, 6, generator=generator) for n in own] for own in sizes.values()]]
    for layer in hidden:
        layer[3] = [torch.zeros(20, 8)]

    def scored(names: list[str], size: int) -> tuple[Within, Scores]:
        within, at = Within(METRICS.get("cknna"), 10, null=10, seed=0), [list(sizes).index(name) for name in names]
        for start in range(0, len(at), size):
            within.add(
                *([[side[n] for n in at[start : start + size]] for side in sides] for sides in (hidden, patches))
            )
        return within, within.finish()

    for size in (1, 2, 6):
        within, found = scored(list(sizes), size)
        assert [list(sizes)[n] for n in within.scored] == ["a", "b", "c"]
        assert found.parts.shape == (3, 2, 1)
        assert found.n == 20
        assert found.n_grids == 4
        icon, white, half = within.sentences(list(sizes))
        assert icon == "image icon: 4 visual tokens, expected at least 11 with k 10"
        assert half.startswith("image half: 6 visual tokens")
        assert white.startswith("image white: ")
        assert "zeros" in white
        np.testing.assert_allclose(found.parts, scored(["a", "b", "c"], 3)[1].parts, rtol=1e-12)
        single = [cknna(hidden[0][0][0], patches[0][0][0], k=10), cknna(hidden[0][4][0], patches[0][4][0], k=10)]
        np.testing.assert_allclose(found.parts[[0, 2], 0, 0], single, rtol=1e-6)
    with pytest.raises(DataError, match="none of the 2 images can be scored: of the first, 4 visual tokens"):
        scored(["icon", "white"], 2)
    hidden[0][0][0][3] = float("nan")  # a fault of the model
    with pytest.raises(DataError, match="not finite"):
        scored(list(sizes), 6)


@pytest.mark.slow
def test_an_icon_among_photographs_is_named_in_print_and_record(tmp_path: Path) -> None:
    """A model of dynamic resolution gives it fewer visual tokens than k."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, size in enumerate([(300, 200)] * 4 + [(30, 30)]):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(
            photos / f"{number}.png"
        )
    command = [
        "analyses.cknna",
        "--model",
        str(build("qwen2_vl", tmp_path / "qwen")),
        "--vfm",
        "efficientnet-lite0",
        "--data",
        f"folder:{photos}",
    ]
    done = run(*command, "--layers", "1", "--null", "10", "--output_dir", str(tmp_path / "runs"))
    assert done.returncode == 0
    assert f"qwen: left out image {photos}/4.png: 4 visual tokens, expected at least 11 with k 10" in done.stdout
    (stored,) = (runs.load(folder.parent) for folder in (tmp_path / "runs").glob("*/run.json"))
    assert stored.record["left_out"] == [f"image {photos}/4.png: 4 visual tokens, expected at least 11 with k 10"]
    assert stored.tables["scores"]["n_images"].tolist() == [4]
    assert set(stored.tables["per_image"]["image_id"]) == {f"{n}.png" for n in range(4)}
