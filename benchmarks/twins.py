"""What laptop models score on the laptop twins, and that a model that does not see the image is at chance on them.

python -m benchmarks.twins twins --shapes baseline=RUN,RUN viral=RUN,RUN --photos baseline=RUN viral=RUN

Prints a table: of each twin chance, the best guess from the text alone, two blind controls of the first model (the mean
of all images; for each question an image of another one) with 95 % intervals over images, and of each variant the mean
over its runs with its interval over runs, if there are several. The likeliest option counts as the answer.

With --scorers it prints the score that the paper reports of each benchmark, by every decoding and scorer, and the
difference of each variant to the first one, paired by run, with Student's t interval. A variant of one run has its
interval over images, and no difference.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro
from jaxtyping import Float

from workbench.analysis.api import run_analysis
from workbench.benchmarks.headline import Headline, headline
from workbench.cli import command, parse
from workbench.data import load_data
from workbench.data.benchmark_rows import BenchmarkDataset
from workbench.data.twins.write import TWINS
from workbench.errors import ConfigError
from workbench.intervals import t_interval
from workbench.mllm import MLLM
from workbench.training_folder import training_record

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
    scorers: bool = False
    """Print the scores by every decoding and scorer instead; runs of the variants are paired in their order."""


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
        cells.append(f"{over_runs([score['score'] for score in scores], len(data))}, {len(scores)} runs")
    return cells


def by_scorer(
    name: str, benchmark: str, decoding: str, tables: Mapping[str, Sequence[pd.DataFrame]]
) -> Iterator[list[str]]:
    """Yield the cells of each scorer of a twin.

    Args:
        name: of the twin.
        benchmark: of its data set.
        decoding: how the answers came about.
        tables: {variant: the table of scores of each of its runs}.
    """
    first = next(iter(tables.values()))
    for scorer in first[0]["scorer"].unique():
        values = {
            variant: [headline(table[table["scorer"] == scorer], benchmark, name) for table in of_runs]
            for variant, of_runs in tables.items()
        }
        shares = {variant: np.array([value.score for value in of_runs]) for variant, of_runs in values.items()}
        reference, *others = shares.values()
        cells = [name, decoding, str(scorer), f"{next(iter(values.values()))[0].chance:.3f}"]
        cells += [_score(of_runs) for of_runs in values.values()]
        n = next(iter(values.values()))[0].n
        yield cells + [_difference(share - reference, n) for share in others]


def _score(of_runs: Sequence[Headline]) -> str:
    """Return the mean over runs with its interval over runs, or one run's score with its interval over images."""
    first = of_runs[0]
    if len(of_runs) == 1:
        return f"{first.score:.3f} [{first.low:.3f}, {first.high:.3f}]"
    return over_runs([one.score for one in of_runs], first.n)


def over_runs(scores: Sequence[float], n: int) -> str:
    """Return the mean of the scores of several runs, each of `n` questions, with its interval over runs."""
    interval = t_interval(scores, bounds=(0, 1), trials=n)
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _difference(values: Float[np.ndarray, " run"], n: int) -> str:
    """Return the mean difference of pairs of runs with Student's interval; a single pair has none.

    Equal differences have the interval that `n` questions leave.
    """
    if len(values) == 1:
        return f"{values[0]:+.3f}, 1 pair"
    interval = t_interval(values, bounds=(-1, 1), trials=n)
    return f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _interval(score: Mapping[str, float]) -> str:
    return f"{score['score']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def _print_by_scorer(twins: Mapping[str, str], variants: Mapping[str, Sequence[MLLM]]) -> None:
    """Print the table by decoding and scorer."""
    first, *others = variants
    named = [f"{name}, {len(models)} run{'s' * (len(models) > 1)}" for name, models in variants.items()]
    head = ["twin", "decoding", "scorer", "chance", *named, *(f"{name} - {first}" for name in others)]
    print("|", " | ".join(head), "|\n|", " | ".join("---" for _ in head), "|")
    for name, spec in twins.items():
        data = load_data(spec)
        assert isinstance(data, BenchmarkDataset)
        for decoding in ("likelihood", "greedy"):
            tables = {
                variant: [
                    run_analysis("benchmark", mllm, data=data, decoding=decoding, blind="off").tables["scores"]
                    for mllm in models
                ]
                for variant, models in variants.items()
            }
            for cells in by_scorer(name, data.benchmark, decoding, tables):
                print("|", " | ".join(cells), "|", flush=True)


def variants_of(kind: str, words: Sequence[str]) -> dict[str, list[str]]:
    """Return the folders of each variant.

    Args:
        kind: the option, in messages.
        words: each NAME=RUN,RUN,...

    Raises:
        ConfigError: a word of another form, or a name that two of them have.
        RunError: a folder that is no finished training; the message names the nearest one.
    """
    variants: dict[str, list[str]] = {}
    for word in words:
        name, _, runs = word.partition("=")
        folders = runs.split(",")
        if not name or not all(folders):
            raise ConfigError(f"{kind} has {word}: expected NAME=RUN or NAME=RUN,RUN,...")
        if name in variants:
            raise ConfigError(f"{kind} names {name} twice: expected {name}=RUN,RUN,... for several runs")
        variants[name] = folders
        for folder in folders:
            training_record(Path(folder))
    return variants


def check_pairs(variants: Mapping[str, Sequence[str]]) -> None:
    """Check that the runs of the variants are paired: as many of each, with the same training seeds in order.

    Raises:
        ConfigError: they are not.
    """
    seeds = {
        name: [training_record(Path(folder))["recipe"]["seed"] for folder in folders]
        for name, folders in variants.items()
    }
    for name, of_variant in seeds.items():
        first, of_first = next(iter(seeds.items()))
        if of_variant != of_first:
            raise ConfigError(
                f"{name} has the training seeds {', '.join(map(str, of_variant))} and {first} has"
                f" {', '.join(map(str, of_first))}: expected the same ones in the same order, as differences are paired"
            )


def main(argv: list[str]) -> None:
    """Print the table of each kind of models."""
    options = parse(Options, argv, prog="python -m benchmarks.twins", description=__doc__ or "")
    if not options.shapes and not options.photos:
        raise ConfigError("no models are given: expected --shapes or --photos, each NAME=RUN,RUN,...")
    folders = {
        kind: variants_of(kind, words) for kind, words in (("shapes", options.shapes), ("photos", options.photos))
    }
    if not options.twins.is_dir():
        raise ConfigError(f"{options.twins} is not a folder: expected what python -m workbench.data.twins wrote")
    if options.scorers:
        for named in folders.values():
            check_pairs(named)
    for kind, named in folders.items():
        if not named:
            continue
        begin = time.perf_counter()
        variants = {name: [MLLM.load(folder) for folder in of_variant] for name, of_variant in named.items()}
        if options.scorers:
            _print_by_scorer(specs(options.twins, kind), variants)
            continue
        head = ["twin", "rows, images", "chance", "text alone", "mean image", "wrong image", *variants]
        print("|", " | ".join(head), "|\n|", " | ".join("---" for _ in head), "|")
        for name, spec in specs(options.twins, kind).items():
            data = load_data(spec)
            assert isinstance(data, BenchmarkDataset)
            print("|", " | ".join(row(name, data, variants)), "|", flush=True)
        sys.stderr.write(f"{kind}: {time.perf_counter() - begin:.0f} s\n")


if __name__ == "__main__":
    command(main)
