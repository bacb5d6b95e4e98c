"""Linear probes: their scores as means over images, planted directions, leaks between images, controls, families, and
the real command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from sklearn.metrics import balanced_accuracy_score, r2_score

from analyses.linear_probe import ANALYSIS
from analyses.linear_probe import run as probe
from analyses.linear_probe.drawing import differences
from analyses.linear_probe.options import Config
from tests.analyses.test_permutation import model, picture
from tests.conftest import refused, run
from workbench import runs
from workbench.analysis.declaration import Context, Result
from workbench.capture.hidden_states import Activations, read
from workbench.data import Dataset, Object, Sample
from workbench.data.base import class_and_color
from workbench.errors import ConfigError, DataError
from workbench.metrics.probing import balanced_accuracy, classify, folds_of, r_squared, regress
from workbench.mllm import MLLM
from workbench.mllm.family import VisualTokens
from workbench.runs import Run
from workbench.spatial.grids import BACKGROUND, BETWEEN, OUTSIDE, object_per_token, token_centers
from workbench.stats import bootstrap_ci, paired_differences

NAMES = [f"{colour} {kind}" for colour in ("red", "blue") for kind in ("cat", "dog")]
BOXES = ((0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0), (0.5, 0.0, 1.0, 0.5))
FEW = Config(vfm=(), controls=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def scenes(images: int = 40, seed: int = 0) -> Dataset:
    """Pictures of noise with one to three objects of random names in quarters of the image."""
    rng = np.random.default_rng(seed)
    samples = []
    for n in range(images):
        boxes = rng.permutation(3)[: rng.integers(1, 4)]
        objects = tuple(Object(NAMES[rng.integers(4)], BOXES[i]) for i in boxes)
        samples.append(Sample(str(n), str(n), lambda n=n: picture(n), objects=objects))
    return Dataset("planted", samples, "planted")


def planted(monkeypatch: pytest.MonkeyPatch, data: Dataset, dims: int = 24) -> None:
    """Replace what the model computes. Layer 0 is noise, layer 1 noise and the truth (in directions of its own), layer
    2 noise and a code of the image."""
    position = [0]

    def fake(mllm: MLLM, batch: Any, *, layers: list[int], encoder: bool, **_: bool) -> list[Activations]:
        found = []
        for row, places in enumerate(mllm.visual_tokens(batch)):
            number = (position[0] + row) % len(data)
            rng, things = np.random.default_rng(number), data[number].objects
            own, noise = object_per_token(things, places), rng.normal(size=(3, 16, dims)) * 0.3
            for token, thing in enumerate(own):
                if thing >= 0:
                    kind, colour = class_and_color(things[thing].name)
                    noise[1, token, :3] += (3.0, 3.0 * (kind == "cat"), 3.0 * (colour == "red"))
            noise[1, :, 3:5] += 3 * token_centers(places)
            noise[2] += 5 * rng.normal(size=dims)
            found.append(
                Activations(
                    torch.from_numpy(noise[layers]).float(),
                    tuple(layers),
                    torch.arange(16),
                    torch.zeros(16, 4) if encoder else None,
                )
            )
        position[0] += len(batch)
        return found

    monkeypatch.setattr("analyses.linear_probe.sampling.read", fake)


def scored(mllm: MLLM, data: Dataset, config: Config = FEW) -> pd.DataFrame:
    return probe(config, Context(mllm, data, 8)).tables["scores"].set_index(["source", "layer", "target"])


# --- mathematics ----------------------------------------------------------------------------------


def test_scores_are_means_over_images_and_equal_to_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    groups, truth = np.repeat(np.arange(30), 7), rng.choice(4, size=210, p=[0.6, 0.2, 0.15, 0.05])
    guess = np.where(rng.random(210) < 0.6, truth, rng.integers(4, size=210))
    assert balanced_accuracy(truth, guess, groups).mean() == pytest.approx(balanced_accuracy_score(truth, guess))
    assert (balanced_accuracy(truth, truth, groups) == 1).all()
    y = rng.normal(size=210)
    near = y + rng.normal(size=210)
    assert r_squared(y, near, groups).mean() == pytest.approx(r2_score(y, near))
    assert (r_squared(y, y, groups) == 1).all()


@pytest.mark.slow
def test_the_interval_is_that_of_resampled_images() -> None:
    """An oracle that scores every resample anew."""
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), 6)
    truth = rng.integers(3, size=360)
    right = rng.random(60)[groups] > rng.random(360)  # images differ in how hard they are
    guess = np.where(right, truth, (truth + 1) % 3)
    found = bootstrap_ci(balanced_accuracy(truth, guess, groups))
    anew = []
    for _ in range(800):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in rng.integers(60, size=60)])
        anew.append(balanced_accuracy_score(truth[rows], guess[rows]))
    assert [found.low, found.high] == pytest.approx(np.quantile(anew, [0.025, 0.975]).tolist(), abs=0.015)


def test_no_image_is_on_both_sides_of_a_fold() -> None:
    groups = np.repeat(np.arange(11), 4)
    folds = folds_of(groups, 5, seed=3)
    assert sorted(np.concatenate([score for _, score in folds])) == list(range(44))
    assert all(not set(groups[fit]) & set(groups[score]) for fit, score in folds)
    with pytest.raises(DataError, match="3 images for 5 folds"):
        folds_of(np.arange(3), 5, seed=0)


def test_the_features_of_the_scored_images_are_not_used_to_standardise() -> None:
    """The images that are scored lie elsewhere: a scaler that had seen them would predict them otherwise."""
    rng = np.random.default_rng(0)
    x, groups = rng.normal(size=(60, 3)), np.repeat(np.arange(6), 10)
    fit, score = np.arange(50), np.arange(50, 60)
    y = x @ np.array([[1.0], [2.0], [0.0]])
    x[score] += 100
    direct = np.linalg.solve(
        (z := (x[fit] - x[fit].mean(0)) / x[fit].std(0)).T @ z + 10 * np.eye(3), z.T @ (y[fit] - y[fit].mean(0))
    )
    expected = (x[score] - x[fit].mean(0)) / x[fit].std(0) @ direct + y[fit].mean(0)
    assert np.allclose(regress(x, y, [(fit, score), (score, fit)], l2=10)[score], expected)
    assert groups.max() == 5


def test_a_classifier_is_the_one_of_its_formula_and_standardised_on_fitted_images_only() -> None:
    """An oracle that minimises the weighed loss by itself, on images that lie elsewhere and are spread otherwise than
    those that are scored."""
    rng = np.random.default_rng(2)
    truth = rng.choice(2, size=240, p=[0.8, 0.2])
    x = rng.normal(size=(240, 3)) + truth[:, None] * (1.2, 0.8, 0.0)
    x[120:] = 1.5 + 4 * x[120:]
    folds = [(np.arange(120), np.arange(120, 240)), (np.arange(120, 240), np.arange(120))]
    for l2 in (0.5, 30.0):
        predicted, wrong = classify(x, np.stack([truth, 1 - truth], axis=1), folds, l2=l2), []
        for fit, score in folds:
            mean, spread = x[fit].mean(0), x[fit].std(0)
            sign, weight = 2 * truth[fit] - 1, (len(fit) / (2 * np.bincount(truth[fit])))[truth[fit]]

            def loss(
                w: np.ndarray,
                z: np.ndarray = (x[fit] - mean) / spread,
                sign: np.ndarray = sign,
                weight: np.ndarray = weight,
                l2: float = l2,
            ) -> float:
                return float((weight * np.logaddexp(0, -sign * (z @ w[:3] + w[3]))).sum() + l2 / 2 * (w[:3] ** 2).sum())

            best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-6}).x
            margin = (x[score] - mean) / spread @ best[:3] + best[3]
            clear = np.abs(margin) > 0.02
            assert clear.mean() > 0.9
            assert ((margin > 0) == predicted[score, 0])[clear].all()
            own = (x[score] - x[score].mean(0)) / x[score].std(0) @ best[:3] + best[3]
            wrong.append(((margin > 0) != (own > 0)).mean())
        assert min(wrong) > 0.1  # the scored images' own mean and spread would predict otherwise
        assert ((predicted.sum(axis=1) == 1).mean()) > 0.95  # the labels of the other target, each by its own fit


# --- planted truth --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_planted_direction_is_found_and_its_controls_are_at_chance(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mllm, data = model("llava", folders), scenes()
    planted(monkeypatch, data)
    table = scored(mllm, data, dataclasses.replace(FEW, layers=(0, 1, 2), controls=6))
    for target in ("class", "colour", "foreground"):
        row = table.loc[("model", 1, target)]
        assert row["score"] > 0.95 and row["low"] > 0.9 and row["chance"] == 0.5, target
    for target in ("class", "colour"):
        row = table.loc[("model", 1, target)]
        assert abs(row["control"] - 0.5) < 0.12
        assert row["selectivity"] == pytest.approx(row["score"] - max(0.5, row["control"]))
        assert row["selectivity_low"] > 0.25
    spread = 9 * np.var([0.125, 0.375, 0.625, 0.875])  # of the planted place, against noise of 0.3
    for axis in ("x", "y"):
        assert table.loc[("model", 1, axis), "score"] == pytest.approx(spread / (spread + 0.09), abs=0.03)
    assert table.loc[("model", 1, "count"), "score"] > 0.7
    assert table.loc[("model", 1, "x"), "selectivity_low"] > 0.5
    for target in ("class", "colour", "foreground", "x", "y", "count"):  # noise is at chance
        row = table.loc[("model", 0, target)]
        assert row["low"] < row["chance"] + 0.05 and row["score"] < row["chance"] + 0.12, target
        # constant features tell nothing
        assert table.loc[("tower", -1, target), "score"] <= row["chance"] + 0.05, target


def test_features_that_only_tell_the_scene_are_at_chance(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 2 identifies each image perfectly. Split by token and not by image, the same probe would score far above
    chance."""
    mllm, data = model("llava", folders), scenes()
    planted(monkeypatch, data)
    table = scored(mllm, data, dataclasses.replace(FEW, layers=(2,)))
    for target in ("class", "colour", "foreground"):
        assert table.loc[("model", 2, target), "score"] < 0.65, target
    rng = np.random.default_rng(0)
    code, label = np.repeat(rng.normal(size=(40, 24)), 8, axis=0), np.repeat(rng.integers(2, size=40), 8)
    groups, leaky = np.repeat(np.arange(40), 8), rng.permutation(320)
    by_image = classify(code, label[:, None], folds_of(groups, 5, 0), l2=1.0)
    by_token = classify(code, label[:, None], folds_of(leaky, 5, 0), l2=1.0)
    assert (by_image[:, 0] == label).mean() < 0.7
    assert (by_token[:, 0] == label).mean() > 0.9


def test_a_cell_code_without_order_is_no_place(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that carry the number of their cell as one of sixteen: x can be read off, and so can any other labelling
    of the cells."""

    def fake(mllm: MLLM, batch: Any, *, layers: list[int], encoder: bool, **_: bool) -> list[Activations]:
        return [Activations(torch.eye(16)[None], (0,), torch.arange(16), None) for _ in range(len(batch))]

    monkeypatch.setattr("analyses.linear_probe.sampling.read", fake)
    table = scored(model("llava", folders), scenes(20), dataclasses.replace(FEW, layers=(0,), targets=("x", "y", "x")))
    assert table.index.is_unique
    for target in ("x", "y"):
        row = table.loc[("model", 0, target)]
        assert row["score"] > 0.9
        assert row["control"] > 0.9
        assert abs(row["selectivity"]) < 0.05


# --- cells and names ------------------------------------------------------------------------------


def test_cells_and_their_objects_by_hand() -> None:
    raster = VisualTokens(torch.arange(16), (4, 4), (0.0, 0.0, 1.0, 1.0))
    things = [Object("a", (0.0, 0.0, 0.5, 0.25)), Object("b", (0.5, 0.0, 0.6, 1.0))]
    own = object_per_token(things, [raster]).reshape(4, 4)
    assert own.tolist() == [[0, 0, BETWEEN, BACKGROUND]] + [[BACKGROUND, BACKGROUND, BETWEEN, BACKGROUND]] * 3
    assert object_per_token(things, [raster], share=0.3).reshape(4, 4)[:, 2].tolist() == [1] * 4
    padded = VisualTokens(torch.arange(16), (4, 4), (0.0, -0.5, 1.0, 1.5))
    assert object_per_token(things, [padded]).reshape(4, 4)[:, 0].tolist() == [OUTSIDE, 0, BACKGROUND, OUTSIDE]
    spans = (torch.tensor([[0.0, 0.25], [0.25, 1.0]]), torch.tensor([[0.0, 0.5], [0.5, 1.0]]))
    uneven = VisualTokens(torch.arange(4), (2, 2), (0.0, 0.0, 1.0, 1.0), spans=spans)
    assert object_per_token(things, [uneven]).tolist() == [0, BETWEEN, BACKGROUND, BETWEEN]
    assert token_centers([uneven])[0].tolist() == [
        0.25,
        0.125,
    ]


def test_names_are_split_into_class_and_color() -> None:
    assert class_and_color("red circle") == ("circle", "red")
    assert class_and_color("orange") == ("orange", "")
    assert class_and_color("Dog") == ("dog", "")
    assert class_and_color("traffic light") == ("traffic light", "")
    assert class_and_color("dark blue traffic light") == (
        "dark traffic light",
        "blue",
    )


# --- families, models, bad input ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internvl", "llava_next", "qwen2_vl", "llava_onevision"])
def test_other_families_are_probed(name: str, folders: Path) -> None:
    table = scored(model(name, folders), scenes(10), dataclasses.replace(FEW, layers=(0, 4), folds=2, controls=1))
    assert {"x", "y", "foreground", "class"} <= {target for *_, target in table.index}
    assert table["score"].notna().all()
    assert set(table.index.get_level_values("source")) == {"model", "tower"}


@pytest.mark.slow
def test_models_are_compared_image_by_image(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm, data, found = model("llava", folders), scenes(), {}
    for label, layer in (("noise", 0), ("knows", 1)):
        planted(monkeypatch, data)
        result: Result = probe(dataclasses.replace(FEW, layers=(layer, 2)), Context(mllm, data, 8))
        tables = {name: table.replace({"layer": {layer: 7}}) for name, table in result.tables.items()}
        found[label] = Run(label, {"seed": 0, "label": label}, tables, {})
    table = differences(found).set_index(["target", "layer"])
    scores = {
        label: own.tables["scores"].query("source == 'model'").set_index(["target", "layer"])["score"]
        for label, own in found.items()
    }
    assert np.allclose(table["score"], (scores["knows"] - scores["noise"])[table.index])
    row, same = table.loc[("class", 7)], table.loc[("class", 2)]
    assert row["low"] > 0.2
    assert row["p_holm"] == pytest.approx(2 * row["p"])
    assert same["score"] == 0
    assert same["p_holm"] == 1
    figures = ANALYSIS.figures(found)
    assert len(figures) == 12
    assert sum(t.fill == "toself" for t in figures["class: balanced accuracy, difference"].data) == 1
    assert paired_differences({"one": found["noise"].tables["per_image"]}, by=("target", "layer")).empty


def test_what_cannot_be_probed_is_refused_or_noted(folders: Path) -> None:
    mllm, data = model("llava", folders), scenes(10)
    bare = Dataset("photos", [dataclasses.replace(s, objects=()) for s in data], "photos")
    one = Dataset("one", [dataclasses.replace(s, objects=(Object("cat", BOXES[0]),)) for s in data], "one")
    tiny = Dataset(
        "tiny", [dataclasses.replace(s, objects=(Object("red cat", (0, 0, 0.01, 0.01)),)) for s in data], "tiny"
    )
    with pytest.raises(
        DataError, match=r"'photos' has no objects: expected one with objects, such as shapes:val, for the target class"
    ):
        probe(dataclasses.replace(FEW, targets=("class",)), Context(mllm, bare, 4))
    result = probe(dataclasses.replace(FEW, layers=(1,)), Context(mllm, bare, 4))
    assert set(result.tables["scores"]["target"]) == {"x", "y"}
    assert set(result.record["skipped"]) == {
        "class",
        "colour",
        "foreground",
        "count",
    }
    with pytest.raises(
        DataError,
        match=r"1 values of class are on patches covered to 0\.5 in at least 5 images each: expected at least 2",
    ):
        probe(dataclasses.replace(FEW, targets=("class",)), Context(mllm, one, 4))
    with pytest.raises(DataError, match="count is the same for all 10 rows"):
        probe(dataclasses.replace(FEW, targets=("count",)), Context(mllm, one, 4))
    with pytest.raises(DataError, match=r"0 values of colour are on patches covered to 0\.5"):
        probe(dataclasses.replace(FEW, targets=("colour",)), Context(mllm, tiny, 4))
    with pytest.raises(DataError, match="foreground is the same for all"):
        probe(dataclasses.replace(FEW, targets=("foreground",)), Context(mllm, tiny, 4))
    with pytest.raises(DataError, match="10 images for 11 folds: expected at least as many images as folds"):
        probe(dataclasses.replace(FEW, folds=11), Context(mllm, data, 4))
    with pytest.raises(ConfigError, match="layer 9 does not exist"):
        probe(dataclasses.replace(FEW, layers=(9,)), Context(mllm, data, 4))
    assert read(mllm, mllm.encode([picture(0)], ["a ?"]), layers=[0], encoder=True)[0].encoder_features is not None


@pytest.mark.slow
def test_the_command_compares_the_pair(runs_folder: Path, tmp_path: Path) -> None:
    models = [str(runs_folder / "baseline"), str(runs_folder / "viral")]
    done = run(
        "analyses.linear_probe",
        "--model",
        *models,
        "--limit",
        "20",
        "--controls",
        "1",
        "--folds",
        "2",
        "--output_dir",
        str(tmp_path),
    )
    found = {stored.label: stored for stored in map(runs.load, runs.index(tmp_path)["folder"])}
    assert set(found) == {"baseline", "viral"}
    assert "linear_probe-" in done.stdout
    assert "selectivity" in done.stdout
    scores = found["viral"].tables["scores"]
    assert set(scores["source"]) == {"model", "tower", "dinov2-small"}
    assert scores.notna().all(axis=None)
    assert (scores["low"] <= scores["score"]).all()
    frozen = [own.tables["scores"].query("source == 'dinov2-small'")["score"].to_numpy() for own in found.values()]
    assert np.array_equal(*frozen)  # the same tokens and folds for both models
    assert found["viral"].record["vfms"][0]["vfm"] == "dinov2-small"
    assert len(found["viral"].record["classes"]["colour"]) >= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "9"], "layer 9 does not exist"),
        (["--targts", "x"], "unknown option '--targts': did you mean '--targets'"),
        (["--targets", "clas"], "clas"),
        (["--limit", "4"], "4 images for 5 folds"),
        (["--l2", "0"], "l2 is 0.0: expected above 0"),
        (["--vfm", "dinov2-smal"], "did you mean 'dinov2-small'"),
    ],
)
def test_bad_input_is_one_sentence(runs_folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    given = ["--limit", "6", "--output_dir", str(tmp_path / "out"), *words]
    assert message in refused("analyses.linear_probe", "--model", str(runs_folder / "viral"), *given)
    assert list((tmp_path / "out").glob("[!.]*")) == []
