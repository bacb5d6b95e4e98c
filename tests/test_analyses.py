"""The CKNNA analysis from its command line: planted truth, look-up of stored runs, every pooling, photographs, bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from analyses.cknna import ANALYSIS, Config
from analyses.cknna import run as run_cknna
from tests.conftest import run
from workbench import runs
from workbench.analysis import Context
from workbench.data import load_data
from workbench.errors import DataError, RunError
from workbench.metrics import cknna
from workbench.mllm import MLLM
from workbench.vfm import load_vfm


@pytest.fixture(scope="module")
def mllm(runs_folder: Path) -> MLLM:
    return MLLM.load(str(runs_folder / "viral"))


def test_a_stored_run_has_n_seed_interval_null_and_provenance(runs_folder: Path) -> None:
    table = runs.index(runs_folder)
    assert sorted(table["label"]) == ["baseline", "viral"]
    stored = runs.load(table["folder"][0])
    scores = stored.tables["scores"]
    assert scores["layer"].tolist() == [0, 1, 2, 3] and (scores["n"] == 64).all() and (scores["n_images"] == 6).all() and (scores["seed"] == 0).all()
    assert (scores["low"] <= scores["score"]).all() and (scores["score"] <= scores["high"]).all() and (scores["null_mean"] <= scores["null_q95"]).all()
    assert stored.record["vfm_fingerprints"]["dinov2-small"] and stored.record["git"] and stored.record["config"]["tokens_per_image"] == 16
    per_image = stored.tables["per_image"].groupby("layer")["score"].mean()
    assert np.allclose(per_image, scores.set_index("layer")["score"])


def test_the_stored_score_is_the_metric_on_the_same_tokens(runs_folder: Path, mllm: MLLM) -> None:
    from workbench.capture import read

    sample = load_data("shapes:val", limit=1)[0]
    tokens = read(mllm, mllm.encode([sample.image], [sample.question]), layers=[2])[0].values[0]
    direct = cknna(tokens, load_vfm("dinov2-small")([sample.image], grid=(8, 8)).tokens()[0], k=10)
    stored = next(runs.load(f) for f in runs.index(runs_folder)["folder"] if runs.load(f).label == "viral").tables["per_image"]
    row = stored[(stored["layer"] == 2) & (stored["image_id"] == sample.image_id)]
    assert row["score"].item() == pytest.approx(direct, abs=1e-5)


@pytest.mark.parametrize("pooling", ["within", "tokens", "pooled"])
def test_a_layer_that_is_the_vfm_up_to_rotation_scores_one(mllm: MLLM, monkeypatch: pytest.MonkeyPatch, pooling: str) -> None:
    """Planted truth, and a layer of noise that scores its null."""
    from workbench.capture import Activations

    vfm, generator = load_vfm("dinov2-small"), torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(384, 384, generator=generator)).Q

    def planted(mllm: MLLM, batch: object, *, layers: list[int]) -> list[Activations]:
        images = [s.image for s in planted.samples]
        features = vfm(images, grid=(8, 8)).tokens()
        return [Activations(torch.stack([f @ rotation, torch.randn(64, 384, generator=generator)]), (0, 1), torch.arange(64)) for f in features]

    data = load_data("shapes:val", limit=24)
    planted.samples = [scene[0] for scene in data.scenes]
    monkeypatch.setattr("analyses.cknna.read", planted)
    table = run_cknna(Config(limit=24, layers=(0, 1), pooling=pooling, k=5, null=40), Context(mllm, data, batch_size=24)).tables["scores"].set_index("layer")
    assert table.loc[0, "score"] == pytest.approx(1, abs=1e-4) and table.loc[0, "p"] < 0.05
    assert table.loc[1, "score"] < 0.3 and table.loc[1, "p"] > 0.01


@pytest.mark.parametrize("family", ["internvl", "qwen2_vl", "llava_next"])
def test_every_raster_counts_and_an_image_is_the_mean_of_its_rasters(family: str, tmp_path: Path) -> None:
    """Photographs of different shapes through tiled models and free grids, against single calls."""
    from tests.tiny import build
    from workbench.capture import read

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
            left, top, right, bottom = (round(v * side) for v, side in zip(raster.box, sample.image.size * 2, strict=True))
            target = vfm([sample.image.crop((left, top, right, bottom))], grid=raster.grid).tokens()[0]
            scores.append(cknna(values[at : at + len(raster.index)], target, k=3))
            at += len(raster.index)
        expected.append(np.mean(scores))
    assert np.allclose(table["per_image"]["score"], expected, atol=2e-3)
    assert table["scores"]["score"].item() == pytest.approx(np.mean(expected), abs=2e-3) and table["scores"]["n_images"].item() == 4
    config = Config(data=data.name, layers=(1,), k=3, null=10, pooling="tokens", tokens_per_image=8)
    assert run_cknna(config, Context(tiled, data, batch_size=4)).tables["scores"]["n"].item() == 32
    with pytest.raises(DataError, match=r"k is 1 with 4 images: .* compares 3 tokens; expected at least 4"):
        run_cknna(dataclasses.replace(config, k=1, pooling="pooled"), Context(tiled, data, batch_size=4))


def test_the_same_question_is_a_look_up(runs_folder: Path, tmp_path: Path) -> None:
    words = ["analyses.cknna", "--model", str(runs_folder / "viral"), "--limit", "3", "--null", "10", "--k", "5", "--layers", "1", "3"]
    words += ["--pooling", "pooled", "--k", "2", "--limit", "12", "--output_dir", str(tmp_path)]
    run(*words)
    (folder,) = [f for f in tmp_path.iterdir()]
    before = (folder / "run.json").stat().st_mtime_ns
    assert str(folder) in run(*words).stdout
    assert (folder / "run.json").stat().st_mtime_ns == before and len(list(tmp_path.iterdir())) == 1
    run(*words, "--seed", "1")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_of_photographs(runs_folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(photographs, name)()).save(photos / f"{name}.jpg")
    Image.fromarray(photographs.camera()).save(photos / "grey.png")
    done = run("analyses.cknna", "--model", str(runs_folder / "viral"), "--data", f"folder:{photos}", "--null", "10", "--output_dir", str(tmp_path / "out"))
    stored = runs.load(next((tmp_path / "out").iterdir()))
    assert (stored.tables["scores"]["n_images"] == 5).all() and "dinov2-small" in done.stdout
    (photos / "broken.jpg").write_bytes((photos / "coffee.jpg").read_bytes()[:2000])
    failed = run("analyses.cknna", "--model", str(runs_folder / "viral"), "--data", f"folder:{photos}", "--output_dir", str(tmp_path / "out2"), code=2)
    assert failed.stderr.strip().splitlines()[-1].startswith("error: picture ") and "broken.jpg" in failed.stderr
    assert list((tmp_path / "out2").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model given"),
        (["--model", "MODEL", "--vfm", "dinov2-smal"], "did you mean 'dinov2-small'"),
        (["--model", "MODEL", "--pooling", "withn"], "withn"),
        (["--model", "MODEL", "--k", "0"], "k is 0: expected at least 1"),
        (["--model", "MODEL", "--k", "64", "--limit", "4"], "k is 64 with 64 rows"),
        (["--model", "MODEL", "--layers", "9", "--limit", "4"], "layer 9 does not exist"),
        (["--model", "MODEL", "--data", "shapes:vall"], "did you mean 'val'"),
        (["--model", "MODEL", "--data", "folder:/nowhere"], "folder '/nowhere' does not exist"),
        (["--model", "MODEL", "--data", "folder:EMPTY"], "holds no pictures"),
        (["--model", "MODEL", "MODEL"], "two models are called 'viral'"),
        (["--model", "EMPTY"], "holds no model"),
        (["--model", "MODEL", "--batch_size", "0"], "batch_size is 0"),
        (["--model", "MODEL", "--device", "cuda"], "no GPU is visible"),
        (["--model", "MODEL", "--limit", "12", "--pooling", "pooled"], "k is 10 with 12 images"),
        (["--modle", "MODEL"], "unknown option '--modle': did you mean 'model'"),
        (["--model", "MODEL", "--output_dir", "/proc/here"], "cannot make folder /proc/here"),
    ],
)
def test_bad_input_is_one_sentence(runs_folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    given = [w.replace("MODEL", str(runs_folder / "viral")).replace("EMPTY", str(tmp_path / "empty")) for w in words]
    done = run("analyses.cknna", *([] if "--output_dir" in words else ["--output_dir", str(tmp_path / "out")]), *given, code=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


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
    (figure,) = ANALYSIS.figures(found).values()
    names = [trace.name for trace in figure.data if trace.name]
    assert set(names) == {"baseline · dinov2-small", "viral · dinov2-small", "chance (null mean to 95 %)"}
    assert sum(trace.fill == "toself" for trace in figure.data) == 3


def test_model_fingerprint_and_config_are_in_the_key(runs_folder: Path) -> None:
    first, second = (json.loads((f / "run.json").read_text()) for f in runs.index(runs_folder)["folder"])
    assert first["model_fingerprint"] != second["model_fingerprint"] and first["key"] != second["key"]
    shutil.rmtree(runs_folder / "none", ignore_errors=True)
