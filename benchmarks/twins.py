"""What laptop models score on the laptop twins, and that a model that does not see the image is at chance on them.

python -m benchmarks.twins twins --shapes baseline=RUN,RUN viral=RUN,RUN --photos baseline=RUN viral=RUN

Prints a table: of each twin chance, the best guess from the text alone, two blind controls of the first model (the mean
of all images; for each question an image of another one) with 95 % intervals over images, and of each variant the mean
over its runs with its interval over runs, if there are several. The likeliest option counts as the answer.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from workbench.analysis.api import run_analysis
from workbench.cli import command, parse
from workbench.data import load_data
from workbench.data.benchmark_rows import BenchmarkDataset
from workbench.data.twins.write import TWINS
from workbench.errors import ConfigError
from workbench.intervals import mean_interval
from workbench.mllm import MLLM

SUBSETS = ("coco_one", "coco_two", "a")


@dataclass(frozen=True)
class Options:
    """The twins and the models."""

    twins: Annotated[Path, tyro.conf.Positional]
    """Folder that `python -m workbench.data.twins` wrote."""
    shapes: tuple[str, ...] = ()
    """Variants trained on shapes, each NAME=RUN,RUN,..."""
    photos: tuple[str, ...] = ()
    """Variants trained on photos."""


def specs(twins: Path, data: str) -> dict[str, str]:
    """Return the specs of the twins that are made of a data set, by name."""
    found: dict[str, str] = {}
    for name in (name for name, (made_of, _) in TWINS.items() if made_of.startswith(data)):
        if name != "whatsup":
            found[name] = f"{name}:{twins / name}"
            continue
        for subset in SUBSETS:
            prompts = twins / name / f"prompts_{subset}.jsonl"
            found[f"whatsup {subset}"] = f"whatsup:{twins / name}?subset={subset}&options=captions&prompts={prompts}"
    return found


def with_wrong_images(data: BenchmarkDataset) -> BenchmarkDataset:
    """Return the same questions, each about an image of other questions (and of another pair)."""
    scenes = data.scenes
    others = [*scenes[len(scenes) // 2 :], *scenes[: len(scenes) // 2]]
    samples = [
        replace(sample, load=other[0].load, image_id=other[0].image_id)
        for scene, other in zip(scenes, others, strict=True)
        for sample in scene
    ]
    return BenchmarkDataset(
        data.name,
        samples,
        lambda: f"wrong images of {data.fingerprint}",
        benchmark=data.benchmark,
        version=data.version,
        prompts=data.prompts,
    )


def accuracy(mllm: MLLM, data: BenchmarkDataset, blind: str = "off") -> dict[str, Mapping[str, float]]:
    """Return the row of scores of all questions, by what the model saw."""
    run = run_analysis("benchmark", mllm, data=data, decoding="likelihood", blind=blind)
    table = run.tables["scores"]
    rows = table[(table["scorer"] == "sum") & (table["measure"] == "accuracy") & (table["category"] == "all questions")]
    return {str(row["shown"]): row for row in rows.to_dict("records")}


def text_alone(data: BenchmarkDataset) -> float:
    """Return the accuracy of giving each text, with its options, the answer that it most often has."""
    answers: dict[tuple[str, tuple[str, ...]], Counter[str]] = {}
    for sample in data:
        answers.setdefault((sample.question, sample.options), Counter())[sample.answer] += 1
    return sum(max(counts.values()) for counts in answers.values()) / len(data)


def row(name: str, data: BenchmarkDataset, variants: Mapping[str, Sequence[MLLM]]) -> list[str]:
    """Return the cells of a twin."""
    first = next(iter(variants.values()))[0]
    seen = accuracy(first, data, "mean_image")
    wrong = accuracy(first, with_wrong_images(data))["image"]
    cells = [name, f"{len(data)}, {len(data.scenes)}", f"{seen['image']['chance']:.3f}"]
    cells += [f"{text_alone(data):.3f}", _interval(seen["mean image"]), _interval(wrong)]
    for models in variants.values():
        scores = [(seen if m is first else accuracy(m, data))["image"] for m in models]
        if len(scores) == 1:
            cells.append(_interval(scores[0]))
            continue
        mean = mean_interval([score["score"] for score in scores], kind="real")
        cells.append(f"{mean.estimate:.3f} [{mean.low:.3f}, {mean.high:.3f}], {len(scores)} runs")
    return cells


def _interval(score: Mapping[str, float]) -> str:
    return f"{score['score']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def main(argv: list[str]) -> None:
    """Print the table of each kind of models."""
    options = parse(Options, argv, prog="python -m benchmarks.twins", description=__doc__ or "")
    if not options.shapes and not options.photos:
        raise ConfigError("no models are given: expected --shapes or --photos, each NAME=RUN,RUN,...")
    for kind, words in (("shapes", options.shapes), ("photos", options.photos)):
        if not words:
            continue
        begin = time.perf_counter()
        variants = {
            name: [MLLM.load(folder) for folder in folders.split(",")]
            for name, _, folders in (word.partition("=") for word in words)
        }
        head = ["twin", "rows, images", "chance", "text alone", "mean image", "wrong image", *variants]
        print("|", " | ".join(head), "|\n|", " | ".join("---" for _ in head), "|")
        for name, spec in specs(options.twins, kind).items():
            data = load_data(spec)
            assert isinstance(data, BenchmarkDataset)
            print("|", " | ".join(row(name, data, variants)), "|", flush=True)
        sys.stderr.write(f"{kind}: {time.perf_counter() - begin:.0f} s\n")


if __name__ == "__main__":
    command(main)
