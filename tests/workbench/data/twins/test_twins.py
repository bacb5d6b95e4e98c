"""The laptop twins: the benchmarks' formats, answers that no text gives away, and no image of a training split."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.conftest import refused, run
from workbench.benchmarks.prompts import STYLES, Asked, prompt_of
from workbench.benchmarks.scorers import LETTERED, letter_of, scorers_of
from workbench.benchmarks.tables import answer_row, judged, scores
from workbench.data import load_data
from workbench.data.benchmark_rows import BenchmarkDataset
from workbench.data.shapes import COLORS, SHAPES
from workbench.data.twins.write import TWINS, write_twin, write_twins
from workbench.errors import ConfigError, DataError

pytestmark = pytest.mark.slow

SUBSETS = ("coco_one", "coco_two", "a")
NAMES = (*(name for name in TWINS if name != "whatsup"), *(f"whatsup {subset}" for subset in SUBSETS))
ROWS = {"pope": 960, "mmvp": 260, "cv_bench": 396, "mmstar": 316, "mme": 492} | {
    f"whatsup {subset}": count for subset, count in zip(SUBSETS, (220, 220, 80), strict=True)
}
CHANCE = {"cv_bench": (176 / 4 + 220 / 2) / 396, "mmstar": (152 / 4 + 164 / 2) / 316}


def spec(root: Path, name: str) -> str:
    """The spec of a twin, as its page has it."""
    benchmark, _, subset = name.partition(" ")
    if subset:
        prompts = root / "whatsup" / f"prompts_{subset}.jsonl"
        return f"whatsup:{root / 'whatsup'}?subset={subset}&options=captions&prompts={prompts}"
    return f"{benchmark}:{root / benchmark}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twins") / "twins"
    write_twins(folder)
    return folder


@pytest.fixture(scope="module")
def twins(root: Path) -> Mapping[str, BenchmarkDataset]:
    read = {name: load_data(spec(root, name)) for name in NAMES}
    assert all(isinstance(data, BenchmarkDataset) for data in read.values())
    return read  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
def test_loaders_read_them_and_say_that_they_are_twins(name: str, twins: Mapping[str, BenchmarkDataset]) -> None:
    data = twins[name]
    assert len(data) == ROWS[name]
    assert data.benchmark == name
    assert data.version.startswith("a laptop twin, not the benchmark")
    assert all(sample.answer in sample.options for sample in data)
    assert np.mean([sample.chance for sample in data]) == pytest.approx(CHANCE.get(name, 0.5))
    if name not in ("pope", "mme"):
        assert len(data.scenes) == len(data)
    for style in STYLES:
        if style in ("plain", "llava"):
            assert all(prompt_of(style, Asked(name, s, data.prompts.get(s.id, ""))) for s in data)


@pytest.mark.parametrize("name", NAMES)
def test_the_text_does_not_give_the_answer_away(name: str, twins: Mapping[str, BenchmarkDataset]) -> None:
    """Each text with its options has each of them equally often as the answer, so that every guess is at chance."""
    answers: dict[tuple[str, tuple[str, ...]], Counter[str]] = defaultdict(Counter)
    for sample in twins[name]:
        answers[sample.question, sample.options][sample.answer] += 1
    for (_, options), counts in answers.items():
        assert counts == dict.fromkeys(options, counts.total() // len(options))


def answered(data: BenchmarkDataset, name: str, answers: list[str]) -> pd.DataFrame:
    rows = [answer_row(name, sample, "image", answer) for sample, answer in zip(data, answers, strict=True)]
    table = judged(pd.DataFrame(rows)).groupby("scorer")
    return table.agg(score=("correct", "mean"), chance=("chance", "mean"), parsed=("parsed", "count"))


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_score_one_and_constant_ones_chance(name: str, twins: Mapping[str, BenchmarkDataset]) -> None:
    """By every scorer, of letters where the benchmark has them."""
    data = twins[name]
    lettered = name in LETTERED
    right = answered(data, name, [letter_of(s) if lettered else s.answer for s in data])
    assert set(right.index) == set(scorers_of(name, data[0]))
    assert (right["score"] == 1).all()
    assert (right["parsed"] == len(data)).all()
    if lettered:
        assert answered(data, name, [s.answer for s in data]).loc["own", "score"] == 1
    for constant in ("A", "B") if lettered else ("yes", "no") if name in ("pope", "mme") else ("left", "right"):
        table = answered(data, name, [constant] * len(data))
        if name == "whatsup a" or not name.startswith("whatsup"):
            np.testing.assert_allclose(table["score"], table["chance"])
        else:  # half of the questions are about other sides
            np.testing.assert_allclose(table["score"], 0.25)


def test_pairs(twins: Mapping[str, BenchmarkDataset]) -> None:
    """A constant answer gets no pair right; MME's score of a category is then 50."""
    for name in ("mmvp", "mme", "whatsup a"):
        data = twins[name]
        pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for sample in data:
            pairs[sample.pair].append((sample.question, sample.answer))
        assert all(len(pair) == 2 and pair[0][1] != pair[1][1] for pair in pairs.values())
        if name != "mme":
            assert all(pair[0][0] == pair[1][0] for pair in pairs.values())
    mme = twins["mme"]
    table = scores(pd.DataFrame([answer_row("mme", s, "image", "Yes") for s in mme]), seed=0)
    by_category = table[(table["measure"] == "MME score") & (table["scorer"] == "official")]
    assert set(by_category["category"]) == {"existence", "count", "position", "color"}
    np.testing.assert_allclose(by_category["score"], 50)


def test_pairs_of_mmvp_differ_in_one_place(twins: Mapping[str, BenchmarkDataset]) -> None:
    """Most of the pixels are equal, and both versions of the corrected labels are right."""
    data = twins["mmvp"]
    for first, second in list(zip(data.samples[::2], data.samples[1::2], strict=True))[:20]:
        a, b = (np.asarray(sample.image, dtype=float) for sample in (first, second))
        same = np.abs(a - b).max(-1) < 40
        assert 0.6 < same.mean() < 0.999
    original = load_data(data.name + "?labels=original")
    assert [sample.answer for sample in original] == [sample.answer for sample in data]


def centers(image: Image.Image) -> dict[str, tuple[float, float]]:
    """Center (x, y) of the pixels that are nearest to each color, for colors of more than 25 pixels."""
    pixels = np.asarray(image, dtype=float)
    distance = np.stack([np.sqrt(((pixels - np.array(color)) ** 2).sum(-1)) for color in COLORS.values()])
    nearest = np.where(distance.min(0) < 50, distance.argmin(0), -1)
    found = {name: np.argwhere(nearest == number) for number, name in enumerate(COLORS)}
    return {name: (at[:, 1].mean(), at[:, 0].mean()) for name, at in found.items() if len(at) > 25}


def seen(question: str, options: tuple[str, ...], center: Mapping[str, tuple[float, float]]) -> str | None:
    """What the pixels answer to a question in the synthetic wording, where it names objects by their color alone."""
    words = question.split()
    a, *others = [word for word in words if word in COLORS] or [""]
    b = others[0] if others else ""
    if words[:2] == ["what", "colour"]:
        (answer,) = [option for option in options if option in center] if len(center) == 1 else [None]
        return answer
    if a not in center or (b and b not in center) or set(words) & set(SHAPES) or words[0] in ("how", "what"):
        return None
    axis = 1 if set(words) & {"above", "below", "top", "bottom"} else 0
    first = center[a][axis] < (center[b][axis] if b else 55.5)
    if words[0] == "any":
        return "yes" if first == bool(set(words) & {"left", "above"}) else "no"
    return options[0] if first == (options[0] in ("left", "top", "above")) else options[1]


@pytest.mark.parametrize("name", NAMES[1:])
def test_answers_are_those_of_the_pixels(name: str, twins: Mapping[str, BenchmarkDataset]) -> None:
    """Sides, relations and colors, read from the pixels of each image."""
    checked = 0
    for sample in twins[name]:
        if sample.category in ("count", "Count", "math"):
            continue
        answer = seen(sample.question, sample.options, centers(sample.image))
        assert answer in (None, sample.answer), (sample.id, sample.question)
        checked += answer is not None
    assert checked >= (6 if name == "whatsup a" else 15)


@pytest.mark.parametrize("subset", ["coco_two", "a"])
def test_related_objects_of_whatsup_are_a_third_of_the_image_apart(
    subset: str, twins: Mapping[str, BenchmarkDataset]
) -> None:
    distances = []
    for sample in twins[f"whatsup {subset}"]:
        center, words = centers(sample.image), sample.question.split()
        colors = [word for word in words if word in COLORS]
        if len(colors) == 2 and set(colors) <= set(center):
            a, b = (center[color][1 if "above" in words else 0] for color in colors)
            distances.append(abs(a - b) / sample.image.width)
    assert len(distances) >= 6
    assert min(distances) > 1 / 3 - 0.03  # the center of the pixels of a star or triangle is not quite its own


def test_pope_asks_as_its_authors_do(root: Path, twins: Mapping[str, BenchmarkDataset]) -> None:
    """The splits share images and yes questions; popular and adversarial ones follow from the images' objects."""
    rows = {
        split: [json.loads(line) for line in (root / "pope" / f"coco_pope_{split}.json").read_text().splitlines()]
        for split in ("random", "popular", "adversarial")
    }
    there = {split: [(r["image"], r["text"]) for r in of if r["label"] == "yes"] for split, of in rows.items()}
    assert there["random"] == there["popular"] == there["adversarial"]
    assert len(set(there["random"])) == 160
    objects: dict[str, list[str]] = defaultdict(list)
    for image, text in there["random"]:
        objects[image].append(text)
    frequency = Counter(text for texts in objects.values() for text in texts)
    absent: dict[str, dict[str, list[str]]] = {split: defaultdict(list) for split in rows}
    for split, of in rows.items():
        assert [row["label"] for row in of] == ["yes", "no"] * 160
        for row in of[1::2]:
            assert row["text"] not in objects[row["image"]]
            assert row["text"] not in absent[split][row["image"]]
            absent[split][row["image"]].append(row["text"])
    for image, texts in objects.items():
        most = sorted((frequency[text] for text in frequency if text not in texts), reverse=True)[:2]
        assert sorted((frequency[text] for text in absent["popular"][image]), reverse=True) == most
        for text, other in zip(texts, absent["adversarial"][image], strict=True):
            together = Counter(o for them in objects.values() if text in them for o in them if o != text)
            free = [o for o in together if o not in texts and o not in absent["adversarial"][image]]
            assert together[other] >= max((together[o] for o in free), default=0)
    assert twins["pope"].counts == {"random": 320, "popular": 320, "adversarial": 320}


def small(image: Image.Image) -> np.ndarray:
    """An image as a vector that compression hardly changes."""
    return np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=float).ravel()


@pytest.mark.parametrize(("data", "names"), [("photos", NAMES[:1]), ("shapes", NAMES[1:])])
def test_no_image_is_one_of_a_training_or_validation_split(
    data: str, names: tuple[str, ...], twins: Mapping[str, BenchmarkDataset]
) -> None:
    """Nor nearly one: none is as close to any as an image is to its own JPEG file."""
    seen = [scene[0] for part in ("train", "val") for scene in load_data(f"{data}:{part}", limit=300).scenes]
    vectors = np.stack([small(sample.image) for sample in seen])
    ours = [scene[0] for name in names for scene in twins[name].scenes]
    assert not {sample.image_id for sample in ours} & {sample.image_id for sample in seen}
    for sample in ours:
        assert np.sqrt(((vectors - small(sample.image)) ** 2).mean(1)).min() > 4


def test_images_are_those_of_the_test_split(root: Path, twins: Mapping[str, BenchmarkDataset]) -> None:
    test = {scene[0].image_id: scene[0].image for scene in load_data("shapes:test", limit=40).scenes}
    table = pd.read_parquet(root / "cv_bench" / "test_2d.parquet")
    known = table[table["source_filename"].isin(list(test))]
    assert len(known) > 10
    for row in known.itertuples():
        image = twins["cv_bench"].samples[row.idx].image
        assert image.tobytes() == test[row.source_filename].tobytes()


def test_the_formats_of_cv_bench(root: Path, twins: Mapping[str, BenchmarkDataset]) -> None:
    columns = "idx type task image question choices answer prompt filename source source_dataset source_filename"
    table = pd.read_parquet(root / "cv_bench" / "test_2d.parquet")
    assert set(table) == {*columns.split(), "target_class", "target_size", "bbox"}
    lines = load_data(f"cv_bench:{root / 'cv_bench' / 'test_2d.jsonl'}")
    assert [(s.question, s.answer, s.image_id) for s in lines] == [
        (s.question, s.answer, s.image_id) for s in twins["cv_bench"]
    ]


def as_vlmevalkit(data: BenchmarkDataset, file: Path, first: int) -> Path:
    """A table as VLMEvalKit has them: base64 images, the second row of an image with the index of the first."""
    import base64
    import io

    rows, known = [], {}
    for index, sample in enumerate(data.samples[:60], start=first):
        content = io.BytesIO()
        sample.image.save(content, "PNG")
        image = known.setdefault(sample.image_id, str(index))
        row = {"index": index, "question": sample.question, "category": sample.category, "source": sample.source}
        row["image"] = base64.b64encode(content.getvalue()).decode() if image == str(index) else image
        row |= {"image_path": f"{sample.image_id}.png", "l2_category": sample.source, "split": "2D"}
        if data.benchmark in LETTERED:
            row |= {letter: option for letter, option in zip("ABCD", (*sample.options, "", "", ""), strict=False)}
            row |= {"answer": letter_of(sample), "task": sample.category, "prompt": sample.question}
        else:
            row["answer"] = sample.answer.capitalize()
        rows.append(row)
    pd.DataFrame(rows).to_csv(file, sep="\t", index=False)
    return file


@pytest.mark.parametrize("name", ["pope", "mmvp", "cv_bench", "mmstar", "mme"])
@pytest.mark.parametrize("first", [0, 1])
def test_tables_of_vlmevalkit_are_read(
    name: str, first: int, tmp_path: Path, twins: Mapping[str, BenchmarkDataset]
) -> None:
    file = as_vlmevalkit(twins[name], tmp_path / f"{name}.tsv", first)
    read = load_data(f"{name}:{file}")
    assert isinstance(read, BenchmarkDataset)
    assert read.version.endswith("unknown copy")
    what = [(s.question, s.options, s.answer, s.category) for s in twins[name].samples[:60]]
    assert [(s.question, s.options, s.answer, s.category) for s in read] == what
    images = [s.image.tobytes() for s in twins[name].samples[:60]]
    assert [s.image.tobytes() for s in read] == images
    if name == "mmvp":
        assert [s.id for s in read] == [s.id for s in twins[name].samples[:60]]
    table = pd.read_csv(file, sep="\t").astype(object)
    table.loc[3, "image"] = "9999"
    table.to_csv(file, sep="\t", index=False)
    with pytest.raises(DataError, match="has the image 9999: expected the index of a row that has an image"):
        load_data(f"{name}:{file}")


def test_a_verified_copy_is_known_by_its_hash(
    root: Path, tmp_path: Path, twins: Mapping[str, BenchmarkDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hashlib import md5

    from workbench.data import copies

    file = as_vlmevalkit(twins["mmstar"], tmp_path / "MMStar.tsv", 0)
    digest = md5(file.read_bytes()).hexdigest()
    monkeypatch.setitem(copies.VLMEVALKIT, "mmstar", (digest,))  # type: ignore[arg-type]
    read = load_data(f"mmstar:{file}")
    assert isinstance(read, BenchmarkDataset)
    assert read.version == "the authors' labels, verified copy"


def test_the_benchmarks_words(tmp_path: Path, twins: Mapping[str, BenchmarkDataset]) -> None:
    """The same questions about the same images, in other words."""
    folder = tmp_path / "twins"
    for name in ("pope", "mme"):
        write_twin(folder / name, name, wording="benchmark")
        worded = load_data(f"{name}:{folder / name}")
        assert [(s.answer, s.image_id) for s in worded] == [(s.answer, s.image_id) for s in twins[name]]
    assert load_data(f"pope:{folder / 'pope'}")[0].question.startswith("Is there a")
    assert all(s.question.endswith("? Please answer yes or no.") for s in worded)


def test_seed_and_refusals(root: Path, tmp_path: Path) -> None:
    write_twin(tmp_path / "mmvp", "mmvp", seed=1)
    other = (tmp_path / "mmvp" / "Questions.csv").read_text()
    assert other != (root / "mmvp" / "Questions.csv").read_text()
    with pytest.raises(ConfigError, match="twins exists: expected the name of a new folder"):
        write_twins(root)
    assert "seed is -1: expected at least 0" in refused("workbench.data.twins", str(tmp_path / "out"), "--seed", "-1")
    assert not (tmp_path / "out").exists()
    assert set(COLORS) & set(SHAPES) == set()


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_and_permutation_run_on_them(name: str, root: Path, runs_folder: Path, tmp_path: Path) -> None:
    words = ["--model", str(runs_folder / "baseline"), "--data", spec(root, name), "--output_dir", str(tmp_path)]
    run("analyses.benchmark", *words, "--limit", "3", "--decoding", "likelihood")
    (folder,) = tmp_path.glob("benchmark-*")
    answers = pd.read_parquet(folder / "answers.parquet")
    assert set(answers["shown"]) == {"image", "mean image", "no image"}
    assert "a laptop twin, not the benchmark" in json.loads((folder / "run.json").read_text())["labels"]
    run("analyses.permutation", *words, "--limit", "2", "--permutations", "1", "--layers", "2")
    assert list(tmp_path.glob("permutation-*/*.parquet"))


@pytest.mark.parametrize("analysis", ["knockout", "patching"])
def test_other_interventions_run_on_them(analysis: str, root: Path, runs_folder: Path, tmp_path: Path) -> None:
    words = ["--model", str(runs_folder / "baseline"), "--data", spec(root, "mme"), "--output_dir", str(tmp_path)]
    more = ["--width", "1", "--no-objects"] if analysis == "knockout" else ["--source", str(runs_folder / "viral")]
    run(f"analyses.{analysis}", *words, "--limit", "2", "--layers", "2", *more)
    assert list(tmp_path.glob(f"{analysis}-*/*.parquet"))
