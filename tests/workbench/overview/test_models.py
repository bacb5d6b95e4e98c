"""Models, variants and seeds of a runs folder, and what is broken in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.numpy import save

from tests.workbench.overview.folders import cknna, patching, spoil_rows, train
from workbench import figures
from workbench.intervals import t_interval
from workbench.overview.answers import answered
from workbench.overview.charts import by_variant
from workbench.overview.differences import Pair, pairs_of, strip
from workbench.overview.measures import MEASURES, measured
from workbench.overview.models import read_models, with_variants
from workbench.overview.stored import read_stored
from workbench.overview.story import alignment_of
from workbench.overview.table import model_rows, variant_accuracies, variant_rows

SOME = [True, False, True, True]
MANY = [True, True, True, True]
REST = "model: {}, data: {train: [a], val: b}, optim: {steps: 1}"


def test_trainings_that_differ_in_the_seed_alone_are_one_variant(tmp_path: Path) -> None:
    for seed in (0, 1):
        train(tmp_path, f"plain-s{seed}", right=SOME, seed=seed)
        train(tmp_path, f"sweep/shifted_w0.5-s{seed}", right=SOME, seed=seed, aligned=True, images="others")
        train(tmp_path, f"near-s{seed}", right=SOME, seed=seed, aligned=True)
    train(tmp_path, "near-heavy-s0", right=SOME, aligned=True, weight=2.0)
    models = read_models(tmp_path)
    assert {name: [model.key for model in of] for name, of in models.variants.items()} == {
        "plain": ["plain-s0", "plain-s1"],
        "near": ["near-s0", "near-s1"],
        "near-heavy-s0": ["near-heavy-s0"],
        "sweep/shifted_w0.5": ["sweep/shifted_w0.5-s0", "sweep/shifted_w0.5-s1"],
    }  # without alignment first, the control last
    assert models.default() == ("plain-s0", "plain-s1", "near-s0", "near-s1")


def test_numbers_in_names_are_sorted_by_value(tmp_path: Path) -> None:
    names = ["viral_w0.25-s9", "viral_w0.25-s10", "viral_w0.5-s9", "viral_w3.2-s9", "viral_w12.8-s9"]
    for name in sorted(names):
        weight, seed = name.removeprefix("viral_w").split("-s")
        train(tmp_path, name, right=SOME, seed=int(seed), aligned=True, weight=float(weight))
    models = read_models(tmp_path)
    assert list(models.by_key) == names
    assert list(models.variants) == ["viral_w0.25", *names[2:]]


def started(folder: Path, start: Path, output: Path) -> None:
    """Write into the record of a training where it was written and what it started from."""
    record = json.loads((folder / "training.json").read_text())
    record["recipe"] |= {"start": str(start), "output_dir": str(output)}
    (folder / "training.json").write_text(json.dumps(record))


def test_a_number_at_the_end_of_a_name_is_not_its_seed(tmp_path: Path) -> None:
    train(tmp_path, "viral-layer10", right=SOME, seed=0, aligned=True)
    train(tmp_path, "viral-layer10-s1", right=SOME, seed=1, aligned=True)
    for seed in (0, 1):
        train(tmp_path, f"plain/seed{seed}", right=SOME, seed=seed)
    for seed in (10, 11):
        train(tmp_path, f"weak-{seed}", right=SOME, seed=seed, aligned=True, weight=0.1)
    assert list(read_models(tmp_path).variants) == ["plain", "viral-layer10", "weak"]


def test_a_variant_never_has_the_name_of_another_ones_training(tmp_path: Path) -> None:
    for key, seed, weight in (("abc-s1", 1, 0.5), ("zz-s0", 0, 0.5), ("zz", 0, 0.7)):
        train(tmp_path, key, right=SOME, aligned=True, layer=[2], weight=weight, seed=seed)
    models = read_models(tmp_path)
    assert {name: [model.key for model in of] for name, of in models.variants.items()} == {
        "abc-s1": ["zz-s0", "abc-s1"],
        "zz": ["zz"],
    }


def test_trainings_from_different_checkpoints_are_no_seeds_of_one_variant(tmp_path: Path) -> None:
    for seed, steps in ((0, 1000), (1, 100)):
        folder = train(tmp_path, f"plain-s{seed}", right=SOME, seed=seed)
        started(folder, Path(f"runs/pre/checkpoint-{steps}"), Path(f"runs/plain-s{seed}"))
        folder = train(tmp_path, f"viral-s{seed}", right=SOME, seed=seed, aligned=True)
        started(folder, Path(f"runs/pre-s{seed}"), Path(f"runs/viral-s{seed}"))
    assert list(read_models(tmp_path).variants) == ["plain-s0", "plain-s1", "viral"]


@pytest.mark.parametrize(
    ("start", "output", "shown"),
    [
        ("{root}/a_stage1", "{root}/baseline", ("baseline", "viral")),
        ("runs/a_stage1", "runs/baseline", ("baseline", "viral")),  # the folder of all was moved
        ("/old/runs/a_stage1", "runs/baseline", ("baseline", "viral")),
        ("{other}/a_stage1", "{root}/baseline", ("a_stage1", "viral")),
    ],
)
def test_a_stage_that_others_start_from_is_not_shown_first(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, start: str, output: str, shown: tuple[str, str]
) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "a_stage1").mkdir()
    train(tmp_path, "a_stage1", right=SOME, objective="none", weight=2.0)
    folder = train(tmp_path, "baseline", right=SOME)
    started(folder, Path(start.format(root=tmp_path, other=other)), Path(output.format(root=tmp_path)))
    train(tmp_path, "viral", right=SOME, aligned=True)
    assert read_models(tmp_path).default() == shown


def test_the_variant_with_the_most_finished_seeds_is_shown_first(tmp_path: Path) -> None:
    train(tmp_path, "baseline-s0", right=SOME)
    train(tmp_path, "both-s0", right=SOME, aligned=True, finished=False, weight=0.25)
    assert read_models(tmp_path).default() == ("baseline-s0", "both-s0")
    train(tmp_path, "viral-s0", right=SOME, aligned=True)
    assert read_models(tmp_path).default() == ("baseline-s0", "viral-s0")


@pytest.mark.parametrize("file", ["training.json", "training.parquet", "evaluation.parquet", "accuracy.parquet"])
def test_a_cut_file_makes_a_damaged_model_that_says_which(tmp_path: Path, file: str) -> None:
    folder = train(tmp_path, "model", right=SOME)
    assert read_models(tmp_path).by_key["model"].state == "finished"
    (folder / file).write_bytes((folder / file).read_bytes()[:60])
    model = read_models(tmp_path).by_key["model"]
    assert model.state == "damaged"
    assert model.why.startswith(f"{file} is damaged")
    assert str(tmp_path) not in model.why


def spoil(file: Path) -> None:
    """Change all of a file but its first and last bytes, by which its format is known."""
    content = file.read_bytes()
    file.write_bytes(content[:8] + bytes(byte ^ 0x5A for byte in content[8:-8]) + content[-8:])


@pytest.mark.parametrize("damage", [spoil, spoil_rows])
@pytest.mark.parametrize("file", ["training.parquet", "evaluation.parquet", "accuracy.parquet"])
def test_a_table_that_is_damaged_within_makes_a_damaged_model(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(train(tmp_path, "model", right=SOME) / file)
    model = read_models(tmp_path).by_key["model"]
    assert (model.state, model.why) == ("damaged", f"{file} is damaged: expected a parquet file")


@pytest.mark.parametrize("finished", [True, False])
def test_a_log_of_another_program_makes_a_damaged_model(tmp_path: Path, finished: bool) -> None:
    train(tmp_path, "viral", right=SOME)
    file = train(tmp_path, "x", right=SOME, finished=finished) / "training.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(file)
    models = read_models(tmp_path)
    assert models.by_key["x"].why == "training.parquet has no column step: expected the log of a training"
    assert model_rows(models, "viral").set_index("key")["state"].to_dict() == {
        "viral": "finished",
        "x": "damaged: training.parquet has no column step: expected the log of a training",
    }


def test_a_run_with_a_spoilt_or_foreign_table_is_broken_and_takes_no_other_away(tmp_path: Path) -> None:
    for name in ("viral", "spoilt", "rows", "foreign"):
        train(tmp_path, name, right=SOME)
        folder = cknna(tmp_path, name, {0: [0.5, 0.6]}, key=f"{name:x<12}")
        if name == "spoilt":
            spoil(folder / "scores.parquet")
        elif name == "rows":
            spoil_rows(folder / "scores.parquet")
        elif name == "foreign":
            pd.read_parquet(folder / "scores.parquet").drop(columns="null_mean").to_parquet(folder / "scores.parquet")
    stored = read_stored(tmp_path)
    assert {each.name: each.why for each in stored.broken} == {
        "cknna-foreignxxxxx": "scores.parquet has no column null_mean: expected the scores of cknna",
        "cknna-rowsxxxxxxxx": "scores.parquet is missing or damaged: expected a table of this run",
        "cknna-spoiltxxxxxx": "scores.parquet is missing or damaged: expected a table of this run",
    }
    _, table = measured(stored, ["viral", "spoilt", "rows", "foreign"])["cknna"]
    assert table["model"].tolist() == ["viral"]


def test_a_run_whose_tensors_are_gone_or_cut_is_broken(tmp_path: Path) -> None:
    folder = cknna(tmp_path, "viral", {0: [0.1, 0.2]})
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"analysis": "attention"}))
    why = "tensors.safetensors is missing or damaged: expected the tensors of this run"
    assert [each.why for each in read_stored(tmp_path).broken] == [why]
    content = save({"values": np.zeros((2, 3)), "more": np.ones(4)})
    for end, broken in ((len(content), []), (len(content) - 1, [why]), (20, [why]), (4, [why])):
        (folder / "tensors.safetensors").unlink(missing_ok=True)
        (folder / "tensors.safetensors").write_bytes(content[:end])
        assert [each.why for each in read_stored(tmp_path).broken] == broken, end


def test_runs_belong_to_their_folder_wherever_it_was_and_broken_ones_have_reasons(tmp_path: Path) -> None:
    train(tmp_path, "viral", right=SOME)
    good = cknna(tmp_path, "viral", {0: [0.5, 0.6]})
    elsewhere = cknna(tmp_path, "llava", {0: [0.5, 0.6]})
    for number, (name, cut) in enumerate((("run.json", 40), ("scores.parquet", 99))):
        folder = cknna(tmp_path, "viral", {0: [0.1, 0.2]}, key=f"00000000000{number}")
        (folder / name).write_bytes((folder / name).read_bytes()[:cut])
    hidden = cknna(tmp_path, "viral", {0: [0.3, 0.4]})
    hidden.rename(tmp_path / f".{hidden.name}.partial")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text(json.dumps({"analysis": "x", "label": "y", "config": {}}))
    stored = read_stored(tmp_path)
    assert {run.model: run.folder for run in stored.runs} == {"viral": good, "llava": elsewhere}
    assert [(broken.name, broken.why.split()[0]) for broken in stored.broken] == [
        ("cknna-000000000000", "run.json"),
        ("cknna-000000000001", "scores.parquet"),
    ]
    assert read_models(tmp_path, stored.runs).by_key["llava"].state == "elsewhere"


def named(folder: Path, **of: object) -> None:
    """Change what the record of a stored run says of its model."""
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | of))


def test_a_hub_model_and_another_training_of_the_same_name_are_no_model_of_this_folder(tmp_path: Path) -> None:
    root, january = tmp_path / "runs", "2026-01-01T00:00:00+00:00"
    train(root, "viral", right=SOME, created=january)
    named(cknna(root, "viral", {0: [0.1, 0.2]}, key="000000000001"), model="/moved/viral", trained=january)
    named(cknna(root, "viral", {0: [0.3, 0.4]}, key="000000000002"), model="org/viral", commit="c0ffee")
    named(cknna(root, "viral", {0: [0.5, 0.6]}, key="000000000003"), model="/other/viral", trained="2025-12-01")
    named(cknna(root, "x", {0: [0.5, 0.6]}, key="000000000004"), label="llava", model="a/llava", commit="1")
    named(cknna(root, "x", {0: [0.5, 0.6]}, key="000000000005"), label="llava", model="b/llava", commit="2")
    named(cknna(root, "viral", {0: [0.7, 0.8]}, key="000000000006"), model="/weights/hf/viral", trained="")
    (root / "assembled").mkdir()  # a model that no training wrote
    named(cknna(root, "assembled", {0: [0.7, 0.8]}, key="000000000007"), trained="")
    keys = {run.key[-1]: run.model for run in read_stored(root).runs}
    assert keys == {
        "1": "viral",
        "2": "org/viral",
        "3": "other/viral",
        "4": "a/llava",
        "5": "b/llava",
        "6": "weights/hf/viral",
        "7": "assembled",
    }


def test_a_run_of_the_model_before_it_was_trained_anew_is_stale(tmp_path: Path) -> None:
    train(tmp_path, "viral", right=SOME, created="2026-03-01T00:00:00+00:00")
    cknna(tmp_path, "viral", {0: [0.5, 0.6]}, created="2026-02-01T00:00:00+00:00")
    stored = read_stored(tmp_path)
    assert [run.stale for run in stored.runs] == [True]
    assert stored.of("cknna", ["viral"]) == []
    newer = cknna(tmp_path, "viral", {0: [0.5, 0.7]}, created="2026-04-01T00:00:00+00:00")
    assert [run.folder for run in read_stored(tmp_path).of("cknna", ["viral"])[0]] == [newer]


def test_the_question_of_most_models_comes_first_and_the_newest_run_of_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        cknna(tmp_path, name, {0: [0.5, 0.6]}, created="2026-02-01", k=10)
    newest = cknna(tmp_path, "a", {0: [0.1, 0.2]}, created="2026-02-03", k=10)
    cknna(tmp_path, "a", {0: [0.5, 0.6]}, created="2026-05-01", k=20)
    lists = read_stored(tmp_path).of("cknna", ["b", "a"])
    assert [[run.model for run in runs] for runs in lists] == [["b", "a"], ["a"]]
    assert lists[0][1].folder == newest


def test_a_copied_training_is_no_further_seed(tmp_path: Path) -> None:
    for name, aligned, right in (("baseline", False, SOME), ("viral", True, MANY)):
        train(tmp_path, name, right=right, aligned=aligned)
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-copy")
    models = read_models(tmp_path)
    (pair,) = pairs_of(models, "baseline", ["baseline-copy", "viral", "viral-copy"])
    assert [(a.key, b.key) for a, b in pair.shared] == [("baseline", "viral")]
    assert pair.over == "images"
    curves = by_variant(pd.DataFrame({"name": list(models.by_key), "score": 0.5}), models)
    assert curves[["name", "group"]].to_numpy().tolist() == [["baseline", "baseline"], ["viral", "viral"]]
    table = variant_rows(models, "baseline").set_index("variant")
    assert table["seeds"].tolist() == [1, 1]
    assert table[["low", "high", "d_low", "p_holm"]].isna().all(axis=None)


def test_accuracies_of_a_variant_are_means_over_its_seeds_with_their_interval(tmp_path: Path) -> None:
    for seed, right in enumerate((SOME, MANY, SOME)):  # of colour, 1, 1 and 1 are right; of count .5, 1 and .5
        train(tmp_path, f"baseline-s{seed}", right=right, seed=seed)
    models = list(read_models(tmp_path).by_key.values())
    table = variant_accuracies(models).set_index("category")
    expected = t_interval([0.5, 1.0, 0.5], bounds=(0.0, 1.0))
    assert tuple(table.loc["count", ["accuracy", "low", "high"]]) == pytest.approx((2 / 3, expected.low, expected.high))
    assert table.loc["colour", "accuracy"] == 1
    assert set(table["over"]) == {"3 seeds"}
    assert set(table["chance"]) == {0.25}
    one = variant_accuracies(models[:1])
    assert one[["low", "high"]].isna().all(axis=None)
    assert variant_accuracies([]).empty
    drawn = figures.accuracy_by_type({"baseline": table.reset_index(), "one": one})
    assert [words for words, *_ in drawn.data[1].customdata] == [""] * 3  # no interval is said
    assert drawn.data[0].customdata[1][1] == "3 seeds"


def test_numbers_of_both_groups_are_those_of_the_seeds_that_the_difference_is_over(tmp_path: Path) -> None:
    for seed in range(3):
        for name, aligned in (("baseline", False), ("viral", True)):
            train(tmp_path, f"{name}-s{seed}", right=SOME, seed=seed, aligned=aligned)
            if name == "baseline" or seed < 2:  # one VIRAL model is not measured
                cknna(tmp_path, f"{name}-s{seed}", {1: [0.1 * seed + 0.5 * aligned, 0.1 * seed + 0.5 * aligned]})
    stored = read_stored(tmp_path)
    models = read_models(tmp_path, stored.runs)
    (pair,) = pairs_of(models, "baseline-s0", [key for key in models.by_key if key != "baseline-s0"])
    alignment = alignment_of(pair, stored)
    assert alignment is not None
    scores = alignment.curves.set_index("name")["score"]
    assert scores.to_dict() == pytest.approx({"baseline": 0.05, "viral": 0.55})
    assert alignment.changes["score"].tolist() == pytest.approx([0.5])
    assert alignment.changes["n"].tolist() == [2]
    assert set(alignment.curves["over"]) == {"mean of 2 seeds"}
    assert alignment.over == "2 images of shapes:val"


def test_accuracies_on_different_questions_are_not_subtracted(tmp_path: Path) -> None:
    for seed in range(3):
        train(tmp_path, f"baseline-s{seed}", right=SOME, seed=seed)
        train(tmp_path, f"viral-s{seed}", right=MANY if seed else SOME, seed=seed, aligned=True)
        folder = train(tmp_path, f"hard-s{seed}", right=[False, False, True, True], seed=seed, aligned=True, weight=3.0)
        record = json.loads((folder / "training.json").read_text())
        (folder / "training.json").write_text(json.dumps(record | {"test": "other questions"}))
    table = variant_rows(read_models(tmp_path), "baseline-s0").set_index("variant")
    assert table.loc["viral", "difference"] == pytest.approx(np.mean([0, 0.25, 0.25]))
    assert table.loc["hard", "accuracy"] == 0.5
    assert table.loc["hard", ["difference", "d_low", "d_high", "p_holm"]].isna().all()


def test_a_record_reads_no_table_outside_its_folder(tmp_path: Path) -> None:
    secret = cknna(tmp_path, "viral", {0: [0.5, 0.6]}, key="0" * 12)
    folder = cknna(tmp_path, "viral", {0: [0.1, 0.2]}, key="1" * 12)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"tables": [f"../{secret.name}/scores"]}))
    (broken,) = read_stored(tmp_path).broken
    assert broken.name == folder.name
    assert "expected the name of a file in its folder" in broken.why


def test_a_table_that_is_removed_later_makes_the_run_unusable(tmp_path: Path) -> None:
    folder = cknna(tmp_path, "viral", {0: [0.5, 0.6]})
    assert not read_stored(tmp_path).broken
    (folder / "scores.parquet").unlink()
    assert [broken.name for broken in read_stored(tmp_path).broken] == [folder.name]


LINK = "is a link, which is not followed: expected the folder or file itself"


def link_from(file: Path, folder: Path) -> None:
    """Move a file or folder into another folder, and leave a link to it."""
    file.rename(folder / file.name)
    file.symlink_to(folder / file.name)


def test_links_out_of_the_runs_folder_are_named_and_not_read(tmp_path: Path) -> None:
    root, outside = tmp_path / "runs", tmp_path / "outside"
    outside.mkdir()
    folders = {}
    for name in "abcd":
        train(root, name, right=SOME)
        folders[name] = cknna(root, name, {0: [0.5, 0.6]}, key=f"{name:x<12}")
    assert len(read_stored(root).runs) == 4
    link_from(folders["a"], outside)
    link_from(folders["b"] / "run.json", outside)
    link_from(folders["c"] / "scores.parquet", outside)
    link_from(root / "a" / "evaluation.parquet", outside)
    stored = read_stored(root)
    assert [run.model for run in stored.runs] == ["d"]
    assert {each.name: each.why for each in stored.broken} == {
        "cknna-axxxxxxxxxxx": LINK,
        "cknna-bxxxxxxxxxxx": f"run.json {LINK}",
        "cknna-cxxxxxxxxxxx": f"scores.parquet {LINK}",
    }
    models = read_models(root)
    model = models.by_key["a"]
    assert (model.state, model.why, model.folder) == ("damaged", f"evaluation.parquet {LINK}", None)
    assert model_rows(models, "b").set_index("key")["accuracy"].notna().to_dict() == {
        "a": False,
        "b": True,
        "c": True,
        "d": True,
    }


def test_links_within_the_runs_folder_are_read_also_if_it_is_a_link_itself(tmp_path: Path) -> None:
    root, archive = tmp_path / "runs", tmp_path / "runs" / "archive"
    train(root, "viral", right=SOME)
    folder = cknna(root, "viral", {0: [0.5, 0.6]})
    archive.mkdir()
    for file in (folder / "scores.parquet", folder, root / "viral" / "accuracy.parquet"):
        link_from(file, archive)
    (tmp_path / "link").symlink_to(root)
    for each in (root, tmp_path / "link"):
        stored = read_stored(each)
        assert ([run.model for run in stored.runs], stored.broken) == (["viral"], ())
        assert read_models(each).by_key["viral"].state == "finished"


def sources(root: Path, keys: list[str]) -> list[tuple[list[str], str]]:
    """The models and the source of each list of runs of patching that ask the same."""
    stored = read_stored(root)
    lists = with_variants(stored, read_models(root, stored.runs)).of("patching", keys)
    return [([run.model for run in runs], runs[0].sources[0]) for runs in lists]


def test_patching_of_several_seeds_asks_the_same_if_each_source_has_its_models_seed(tmp_path: Path) -> None:
    for seed in (0, 1):
        for name, aligned in (("baseline", False), ("viral", True)):
            train(tmp_path, f"{name}-s{seed}", right=SOME, seed=seed, aligned=aligned)
        patching(tmp_path, f"baseline-s{seed}", f"viral-s{seed}")
        patching(tmp_path, f"viral-s{seed}", f"viral-s{seed}")
    keys = ["baseline-s0", "baseline-s1", "viral-s0", "viral-s1"]
    assert sources(tmp_path, keys) == [(keys, "viral of the same seed")]
    patching(tmp_path, "baseline-s1", "viral-s0")  # one source for all is a question by itself
    assert sorted(sources(tmp_path, keys)) == [
        (["baseline-s0", "baseline-s1", "viral-s0"], "viral-s0"),
        (keys, "viral of the same seed"),
    ]
    patching(tmp_path, "viral-s1", "baseline-s1")
    assert (["viral-s1"], "baseline-s1") in sources(tmp_path, keys)


def test_one_shared_seed_is_the_pair_that_is_compared(tmp_path: Path) -> None:
    """The first models of the groups have different seeds, whose difference is not that of the recipes."""
    for name, aligned, seeds in (("baseline", False, (0, 1)), ("viral", True, (1, 2))):
        for seed in seeds:
            train(tmp_path, f"{name}-s{seed}", right=SOME, seed=seed, aligned=aligned)
    models = read_models(tmp_path)
    (pair,) = pairs_of(models, "baseline-s0", ["baseline-s1", "viral-s1", "viral-s2"])
    assert [(a.key, b.key) for a, b in pair.shared] == [("baseline-s1", "viral-s1")]
    assert pair.over == "images"
    (apart,) = pairs_of(models, "baseline-s0", ["viral-s1", "viral-s2"])
    assert [(a.key, b.key) for a, b in apart.shared] == [("baseline-s0", "viral-s1")]


def test_patching_over_seeds_has_a_difference_and_ends_with_a_new_source(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        for name, aligned, wrong in (("baseline", False, 2 + seed), ("viral", True, 1)):
            train(tmp_path, f"{name}-s{seed}", right=SOME, seed=seed, aligned=aligned)
            patching(tmp_path, f"{name}-s{seed}", f"viral-s{seed}", wrong=wrong)
    stored = read_stored(tmp_path)
    models = read_models(tmp_path, stored.runs)
    (pair,) = pairs_of(models, "baseline-s0", [key for key in models.by_key if key != "baseline-s0"])
    table = strip(pair, with_variants(stored, models), MEASURES)
    assert table["score"].tolist() == pytest.approx([-0.2, -0.2])
    assert table[["n", "over"]].to_numpy().tolist() == [[3, "seeds"]] * 2
    train(tmp_path / "new", "viral-s1", right=SOME, seed=1, aligned=True, created="2026-03-01T00:00:00+00:00")
    record = (tmp_path / "new" / "viral-s1" / "training.json").read_bytes()
    (tmp_path / "viral-s1" / "training.json").write_bytes(record)
    assert {run.model for run in read_stored(tmp_path).runs if run.retrained == "viral-s1"} == {
        "baseline-s1",
        "viral-s1",
    }


def test_the_p_of_a_model_is_corrected_over_the_models_and_agrees_with_its_interval(tmp_path: Path) -> None:
    for name, right, weight in (("baseline", SOME, 0.0), ("same", SOME, 0.1), ("better", MANY, 0.2)):
        train(tmp_path, name, right=right, aligned=weight > 0, weight=weight)
    models = read_models(tmp_path)
    table = model_rows(models, "baseline").set_index("key")
    p = [answered(Pair((models.by_key["baseline"],), (models.by_key[name],))).p for name in ("same", "better")]
    assert table.loc[["same", "better"], "p_holm"].tolist() == pytest.approx([1.0, min(1, 2 * p[1])])
    assert np.isnan(table.loc["baseline", "p_holm"])
    assert p[0] == 1
    assert (p[1] < 0.05) == (table.loc["better", "d_low"] > 0)
    assert table.loc["better", ["target", "layer", "weight"]].tolist() == ["efficientnet-lite0", "3", 0.2]
    assert table["target"].tolist()[0] == "none"


@pytest.mark.parametrize("steps", [3, 79, 100, 131])
def test_the_small_curve_ends_with_the_last_value(steps: int, tmp_path: Path) -> None:
    train(tmp_path, "viral", right=SOME, steps=steps)
    curve = model_rows(read_models(tmp_path), "viral")["curve"][0]
    assert curve[-1] == pytest.approx(0.6)
    assert len(curve) < 80
    assert curve == sorted(curve)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("lr: 1", "no section 'model'"),
        ("{model: {}, data: {train: [a], val: b}, optim: {steps: 1}, alignment: null, seed: 0}", "no section 'align"),
        (
            "{model: {}, data: {train: [a], val: b}, optim: {steps: 1}, alignment: {objective: cosine}, seed: 0}",
            "no 'a",
        ),
        (
            "{model: {}, data: {train: [a], val: b}, optim: {steps: 1}, seed: [0],"
            " alignment: {objective: none, layer: 1, vfm: a}}",
            "seed is [0]",
        ),
        ("1: 2\na: 3", "no section 'model'"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_recipe_of_another_program_is_a_damaged_model_and_others_stay(
    text: str, why: str, finished: bool, tmp_path: Path
) -> None:
    train(tmp_path, "ours", right=SOME)
    folder = train(tmp_path, "foreign", right=SOME, finished=False)
    if finished:
        (folder / "training.json").write_text(json.dumps({"recipe": yaml.safe_load(text)}))
    else:
        (folder / "recipe.yaml").write_text(text)
    models = read_models(tmp_path)
    model = models.by_key["foreign"]
    assert model.state == "damaged"
    assert model.why.startswith(f"{'training.json' if finished else 'recipe.yaml'} is damaged ({why}")
    assert [each.test_data for each in models.by_key.values()] == ["", "shapes:test"]
    assert model_rows(models, "ours")["key"].tolist() == ["foreign", "ours"]
