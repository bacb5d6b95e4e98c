"""A grid over all variants, best checkpoints, the curve, and what outlives the runs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from tests.conftest import SMALL, recipe, run
from tests.stored_runs import store, store_run
from trainer.sweep.__main__ import main
from trainer.sweep.comparison import notes, report, write
from trainer.sweep.results import export, finished
from trainer.sweep.spec import Sweep, check
from workbench.errors import ConfigError, RunError, WorkbenchError
from workbench.figures import sweep_figure
from workbench.training_folder import MEAN
from workbench.yaml_config import as_mapping

LINE = f"{recipe('stage1')} --keep_best --data.test shapes:test"
VARIANTS = (f"baseline: {LINE}", f"viral: {LINE} --alignment.objective cosine")
CURVE = Sweep(variants=VARIANTS, grid=("data.limit_train: 30 100",), seeds=(3, 4, 5))
RIGHT = {
    "baseline_limit_train-30": [4, 5, 6],
    "viral_limit_train-30": [6, 8, 7],
    "baseline_limit_train-100": [7, 7, 8],
    "viral_limit_train-100": [7, 9, 8],
}


def means(sweep: Sweep) -> pd.DataFrame:
    return report(sweep, finished(sweep)).query("type == @MEAN")


@pytest.fixture
def curve(tmp_path: Path) -> Sweep:
    store(tmp_path / "out", RIGHT, first_seed=3)
    return replace(CURVE, output_dir=tmp_path / "out")


def test_every_variant_is_trained_at_every_point(tmp_path: Path) -> None:
    two = (*VARIANTS, f"second: {recipe('viral')} --start {{output_dir}}/baseline{{point}}-s{{seed}}")
    jobs = list(replace(CURVE, output_dir=tmp_path, variants=two, seeds=(3,)).runs())
    names = [f"{variant}_limit_train-{n}-s3" for n in (30, 100) for variant in ("baseline", "viral", "second")]
    assert [str(job) for job in jobs] == names
    assert [job.recipe().data.limit_train for job in jobs] == [30] * 3 + [100] * 3
    assert jobs[-1].start == tmp_path / "baseline_limit_train-100-s3"
    assert jobs[-1].recipe().alignment.aligned
    assert jobs[-1].recipe().seed == 3
    both = replace(CURVE, grid=("data.limit_train: 30 100", "alignment.layer: 2 2,3"), seeds=(3,))
    assert str(list(both.runs())[-1]) == "viral_limit_train-100_layer-2+3-s3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"variants": (f"baseline: {recipe('stage1')} --data.limit_train 5",)},
            "has --data.limit_train, which the grid varies",
        ),
        (
            {"variants": (f"baseline: {recipe('stage1')} --data.limit-train=5",)},
            "has --data.limit_train, which the grid varies",
        ),
        ({"grid": ("data.limit_train: 30 30",)}, "two variants are called 'baseline_limit_train-30'"),
        ({"grid": ("data.limit_trian: 30",)}, "unknown option '--data.limit_trian': did you mean '--data.limit_train'"),
        ({"against": "baseline_limit_train-30"}, "did you mean 'baseline'"),
        (
            {"best": ("baseline",), "variants": (f"baseline: {recipe('stage1')} --keep_best",)},
            "has keep_best True and data.test None: expected both",
        ),
        (
            {"best": ("baseline",), "variants": (f"baseline: {LINE} --no-keep_best",)},
            "has keep_best False and data.test shapes:test: expected both",
        ),
        ({"best": ("virl",)}, "did you mean 'viral'"),
        ({"exported": Path("x")}, "expected it with --report"),
        ({"exported": Path("x"), "report": True, "export": Path("y")}, "without --export"),
    ],
)
def test_a_grid_that_cannot_be_is_one_sentence(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match=re.escape(message)) as error:
        check(replace(CURVE, output_dir=tmp_path / "out", **change))  # type: ignore[arg-type]
    assert len(str(error.value)) < 300


def test_differences_are_taken_at_the_same_point(curve: Sweep) -> None:
    """All by hand: three seeds of two variants at two points, paired by seed."""
    own = means(curve).set_index(["variant", "limit_train"])
    assert list(own.index) == [("baseline", 30), ("viral", 30), ("baseline", 100), ("viral", 100)]
    t = scipy_stats.t.ppf(0.975, 2) / math.sqrt(3)
    for n in (30, 100):
        gain = (np.array(RIGHT[f"viral_limit_train-{n}"]) - RIGHT[f"baseline_limit_train-{n}"]) / 10
        expected = [gain.mean(), gain.mean() - t * gain.std(ddof=1), gain.mean() + t * gain.std(ddof=1)]
        assert own.loc[("viral", n), ["difference", "d_low", "d_high"]].tolist() == pytest.approx(expected)
        assert own.loc[("viral", n), "pairs"] == 3
        assert own.loc[("viral", n), "accuracy"] == pytest.approx(np.mean(RIGHT[f"viral_limit_train-{n}"]) / 10)
    assert own["difference"].isna().tolist() == [True, False, True, False]
    # sign flips of three pairs: all positive is 2 of 8; 0, 2, 0 reach their sum in all flips; Holm over both points
    assert own["p"].dropna().tolist() == [0.25, 1.0]
    assert own["p_holm"].dropna().tolist() == [0.5, 1.0]


def test_a_type_is_together_in_the_table(curve: Sweep) -> None:
    table = report(curve, finished(curve))
    assert table["type"].tolist() == ["a"] * 4 + ["b"] * 4 + [MEAN] * 4
    assert list(table.columns[:4]) == [
        "type",
        "variant",
        "limit_train",
        "accuracy",
    ]


def test_values_that_are_no_numbers_are_words(tmp_path: Path) -> None:
    store(
        tmp_path, {"baseline_vfm-dinov2-small": [5], "baseline_vfm-dinov2-small+efficientnet-lite0": [6]}, first_seed=3
    )
    sweep = replace(
        CURVE,
        output_dir=tmp_path,
        variants=VARIANTS[:1],
        grid=("alignment.vfm: dinov2-small dinov2-small,efficientnet-lite0",),
        seeds=(3,),
    )
    table = means(sweep)
    assert table["vfm"].tolist() == ["dinov2-small", "dinov2-small,efficientnet-lite0"]
    write(sweep, finished(sweep), table, "words")
    layers = replace(sweep, grid=("alignment.layer: 2 2,3",), output_dir=tmp_path / "layers")
    store(tmp_path / "layers", {"baseline_layer-2": [5], "baseline_layer-2+3": [6]}, first_seed=3)
    assert means(layers)["layer"].tolist() == ["2", "2,3"]
    write(layers, finished(layers), means(layers), "words")


def test_the_best_checkpoint_is_a_row_of_its_own(tmp_path: Path) -> None:
    for seed, (right, best) in zip((3, 4, 5), ((4, 6), (5, 6), (6, 9)), strict=True):
        store_run(tmp_path / f"baseline-s{seed}", right, best=best)
        store_run(tmp_path / f"viral-s{seed}", right + 1)
    sweep = replace(CURVE, output_dir=tmp_path, grid=(), best=("baseline",))
    own = means(sweep).set_index("variant")
    assert list(own.index) == ["baseline", "baseline, best checkpoint", "viral"]
    assert own.loc["baseline, best checkpoint", ["accuracy", "difference"]].tolist() == pytest.approx([0.7, 0.2])
    other = means(replace(sweep, against="baseline, best checkpoint")).set_index("variant")
    assert other.loc["viral", "difference"] == pytest.approx(0.6 - 0.7)
    with pytest.raises(RunError, match=r"viral-s3 has no best checkpoint: expected a run with keep_best"):
        means(replace(sweep, best=("viral",)))
    (tmp_path / "baseline-s4" / "best" / "best.json").write_text('{"score": 1}')
    with pytest.raises(RunError, match=r"best.json is damaged"):
        means(sweep)


def test_a_curve_of_different_questions_is_refused(curve: Sweep) -> None:
    file = curve.output_dir / "viral_limit_train-100-s5" / "evaluation.parquet"
    table = pd.read_parquet(file)
    table.assign(id="other" + table["id"]).to_parquet(file)
    with pytest.raises(
        RunError, match=r"baseline_limit_train-30-s3 and viral_limit_train-100-s5 were asked different questions"
    ):
        means(curve)


def test_other_content_of_the_test_split_is_refused(tmp_path: Path) -> None:
    store_run(tmp_path / "baseline-s3", 5, test="t0")
    store_run(tmp_path / "viral-s3", 6, test="t0", val="v1")
    sweep = replace(CURVE, output_dir=tmp_path, grid=(), seeds=(3,))
    assert len(means(sweep)) == 2  # the split that is not asked may differ
    (tmp_path / "viral-s3").rename(tmp_path / "aside")
    store_run(tmp_path / "viral-s3", 6, test="t1")
    with pytest.raises(RunError, match="baseline-s3 and viral-s3 were asked different questions"):
        means(sweep)


def test_one_seed_and_missing_runs_are_said(curve: Sweep) -> None:
    for seed in (4, 5):
        (curve.output_dir / f"viral_limit_train-100-s{seed}" / "training.json").unlink()
    runs = finished(curve)
    table = report(curve, runs)
    said = notes(curve, runs, table)
    assert said[0].startswith("one seed, so no interval")
    assert said[0].endswith(": viral, limit_train 100")
    assert said[1] == "2 of 12 runs are missing: viral_limit_train-100-s4, viral_limit_train-100-s5"
    assert len(said) == 2
    row = table.query("type == @MEAN and variant == 'viral' and limit_train == 100").iloc[0]
    assert row["seeds"] == "3"
    assert math.isinf(row["low"])
    assert math.isinf(row["d_high"])
    assert "one seed, so no interval" in write(curve, runs, table, "one").read_text()


def test_runs_of_other_commits_are_said(curve: Sweep) -> None:
    store_run(curve.output_dir / "extra", 5)
    record = json.loads((curve.output_dir / "extra" / "training.json").read_text()) | {"git": "f" * 40, "dirty": True}
    (curve.output_dir / "viral_limit_train-30-s3" / "training.json").write_text(json.dumps(record))
    runs = finished(curve)
    assert notes(curve, runs, report(curve, runs)) == [
        "the runs were made with 2 versions of the code: 01234567 (11); ffffffff, dirty (1)"
    ]


# --- the figure -----------------------------------------------------------------------------------


def test_the_curve_has_a_line_a_variant_chance_and_the_difference(curve: Sweep) -> None:
    (curve.output_dir / "viral_limit_train-100-s3" / "training.json").unlink()
    (curve.output_dir / "viral_limit_train-100-s4" / "training.json").unlink()
    figure = sweep_figure(means(curve))
    above = [trace for trace in figure.data if trace.yaxis == "y"]
    (below,) = [trace for trace in figure.data if trace.yaxis == "y2"]
    assert [trace.name for trace in above] == ["chance", "baseline", "viral"]
    assert list(above[0].y) == [0.5, 0.5]
    assert list(above[1].y) == pytest.approx([0.5, 7.333333 / 10])
    assert below.name == "viral"
    row = means(curve).set_index(["variant", "limit_train"]).loc[("viral", 30)]
    assert [below.y[0] - below.error_y.arrayminus[0], below.y[0] + below.error_y.array[0]] == pytest.approx(
        row[["d_low", "d_high"]].tolist()
    )
    # one seed has no interval
    assert list(below.y) == pytest.approx([0.2, 0.0])
    assert list(np.isfinite(below.error_y.array)) == [True, False]
    assert {figure.layout.xaxis.type, figure.layout.xaxis2.type} == {"log"}
    assert figure.layout.xaxis2.ticktext == (
        "30",
        "100",
    )
    assert figure.layout.xaxis2.title.text == "training images, logarithmic"
    assert figure.layout.yaxis2.title.text == "minus baseline"
    shown = np.array([trace.x for trace in above[1:]])
    # beside one another, at their place on the axis
    assert (shown[0] < shown[1]).all()
    assert np.allclose(shown, [[30, 100]] * 2, rtol=0.05)
    assert "Infinity" not in figure.to_json()


def test_one_point_or_two_keys_are_rows(curve: Sweep) -> None:
    table = means(curve)
    rows = sweep_figure(table[table["limit_train"] == 30])
    assert list(rows.data[1].y) == ["baseline", "viral"]
    both = table.assign(weight=0.5)[["type", "variant", "limit_train", "weight", *table.columns[3:]]]
    rows = sweep_figure(both)
    assert list(rows.data[1].y) == [
        "baseline, limit_train 30",
        "viral, limit_train 30",
        "baseline, limit_train 100",
        "viral, limit_train 100",
    ]
    first, second = rows.data[1].marker.color[:2]
    assert list(rows.data[1].marker.color) == [first, second] * 2
    assert first != second


def test_the_figure_for_a_paper_by_the_real_command(
    curve: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")
    (curve.output_dir / "viral_limit_train-100-s3" / "training.json").unlink()
    file, folder = tmp_path / "My_curve.yaml", tmp_path / "paper"
    file.write_text(json.dumps({"variants": list(VARIANTS), "grid": list(CURVE.grid), "seeds": [3, 4, 5]}))
    main([str(file), "--output_dir", str(curve.output_dir), "--report", "--figures", str(folder)])
    said = capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [f"my-curve.{end}" for end in ("csv", "py", "tex", "txt")]
    assert all(str(path) in said for path in folder.iterdir())
    assert "SVG, PDF and PNG are not among them, since " in said
    points = pd.read_csv(folder / "my-curve.csv")
    drawn = points[points["curve"] == "viral"].sort_values(["x", "y"])[["x", "y"]]
    # below the difference to the baseline, above the accuracy; at the exact number of images
    assert drawn.to_numpy() == pytest.approx(np.array([[30, 0.2], [30, 0.7], [100, 0.1], [100, 0.85]]))
    caption = (folder / "my-curve.txt").read_text()
    for words in ("to baseline, paired by seed", "20 questions of ", "2 to 3 of them"):
        assert words in caption
    with pytest.raises(RunError, match=r"cannot make folder .*My_curve.yaml"):
        main([str(file), "--output_dir", str(curve.output_dir), "--report", "--figures", str(file)])


# --- what outlives the runs -----------------------------------------------------------------------


def test_the_report_from_the_export_is_that_from_the_runs(tmp_path: Path) -> None:
    curve = replace(CURVE, output_dir=tmp_path / "out")
    for job in curve.runs():  # as the trainer leaves them
        right = RIGHT[job.name][job.seed - 3]
        store_run(
            job.folder,
            right,
            best=right + 1,
            recipe=as_mapping(job.recipe()),
            tower="dinov2-small",
            tower_fingerprint="t",
            data=f"d{job.seed}",
        )
    curve = replace(curve, best=("baseline",))
    runs = finished(curve)
    table = report(curve, runs)
    page = write(curve, runs, table, "mine").read_text()
    export(tmp_path / "kept", runs)
    for job in curve.runs():
        job.folder.rename(tmp_path / f"gone-{job}")
    again = replace(curve, exported=tmp_path / "kept", report=True)
    assert finished(again) == runs
    pd.testing.assert_frame_equal(report(again, finished(again)), table)
    assert write(again, finished(again), table, "mine").read_text() == page
    kept = sorted((tmp_path / "kept").iterdir())
    assert [file.name for file in kept] == sorted(f"{job}.json" for job in curve.runs())
    assert max(file.stat().st_size for file in kept) < 4000


def test_what_is_exported_of_a_run(curve: Sweep, tmp_path: Path) -> None:
    export(tmp_path / "kept", finished(curve))
    own = json.loads((tmp_path / "kept" / "viral_limit_train-100-s4.json").read_text())
    assert own["seed"] == 4
    assert own["words"].endswith("--alignment.objective cosine --data.limit_train 100")
    assert own["seconds"] == 12.3
    assert own["steps"] == 40
    assert own["last"]["types"] == {kind: {"right": 9, "n": 10, "chance": 0.5} for kind in ("a", "b")}
    assert own["best"] is None
    assert own["curve"] == {
        "step": [20, 40],
        "accuracy": [0.5, 0.9],
        "val_lm_loss": [2.5, 1 / 3],
        "val_alignment_loss": [None, None],
    }
    assert own["losses"] == {"step": 40, "lm_loss": 0.25, "alignment_loss": None}
    assert own["fingerprints"] == {"val": "v0"}
    assert own["environment"]["git"] == "0123456789abcdef"
    assert "/a/machine" not in json.dumps(own)
    assert "resume" not in own["recipe"]


def test_an_export_of_another_recipe_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    sweep = replace(
        CURVE,
        output_dir=out,
        variants=(f"baseline: {recipe('baseline')} --start {{output_dir}}/first",),
        seeds=(3,),
        grid=("optim.steps: 40",),
    )
    job = next(sweep.runs())
    store_run(job.folder, 5, recipe=as_mapping(job.recipe()))
    export(kept, finished(sweep))
    assert json.loads((kept / f"{job}.json").read_text())["recipe"]["start"] == "first"
    export(kept, finished(sweep))  # the same run again
    again = replace(sweep, exported=kept, report=True)
    assert len(finished(again)) == 1
    content = (kept / f"{job}.json").read_text()
    (kept / f"{job}.json").write_text(content.replace('"warmup": 40', '"warmup": 41'))
    with pytest.raises(
        RunError, match=r"s3.json holds a run with another recipe, which would be lost: expected another"
    ):
        export(kept, finished(sweep))
    assert '"warmup": 41' in (kept / f"{job}.json").read_text()
    (kept / f"{job}.json").write_text(content)
    other = replace(again, variants=(f"{sweep.variants[0]} --optim.warmup 7",))
    with pytest.raises(
        ConfigError,
        match=(
            r"s3.json was started with optim.warmup 40, and this recipe says 7: expected the sweep as it was at commit"
            r" 01234567"
        ),
    ):
        finished(other)
    (kept / f"{job}.json").write_text("{}")
    with pytest.raises(RunError, match=r"s3.json is damaged"):
        finished(again)
    (tmp_path / "empty").mkdir()
    for name, why in (("nowhere", "there is no such folder; "), ("empty", "")):
        with pytest.raises(
            RunError, match=rf"no finished run in .*{name}: {why}expected files such as \S+s3\.json, which"
        ):
            finished(replace(again, exported=tmp_path / name))


@pytest.mark.slow
def test_two_stages_over_a_grid_by_the_real_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two variants, one of them in two stages: trained, exported, deleted, and reported again."""
    flags = " ".join(SMALL).replace("--optim.steps 12", "--optim.steps 2").replace("--data.limit_train 24 ", "")
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"output_dir: {tmp_path / 'out'}\nseeds: [0]\ngrid: ['data.limit_train: 8']\nvariants:\n  - 'baseline:"
        f" {recipe('stage1')} {flags}'\n  - 'second: {recipe('baseline')} {flags} --start"
        " {output_dir}/baseline{point}-s{seed}'\n"
    )
    done = run("trainer.sweep", str(file))
    first, second = (tmp_path / "out" / f"{variant}_limit_train-8-s0" for variant in ("baseline", "second"))
    assert json.loads((second / "training.json").read_text())["recipe"]["start"] == str(first)
    assert "one seed, so no interval" in done.stdout
    main([str(file), "--export", str(tmp_path / "kept")])
    assert capsys.readouterr().out == f"2 of 2 runs are in {tmp_path / 'kept'}\n"
    assert (tmp_path / "kept" / f"{second.name}.json").stat().st_size < 8000
    (tmp_path / "out").rename(tmp_path / "gone")
    main([str(file), "--report", "--exported", str(tmp_path / "kept")])
    assert capsys.readouterr().out == done.stdout
    with pytest.raises(RunError, match="no finished run in"):
        main([str(file), "--report"])
