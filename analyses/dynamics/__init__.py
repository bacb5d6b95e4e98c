"""Accuracy and alignment during training, and how soon one run reaches another run's final score.

    python -m analyses.dynamics --model runs/baseline-s0 runs/viral-s0 runs/baseline-s1 runs/viral-s1 --limit 200
    python -m analyses.dynamics --model runs/baseline runs/viral --benchmarks pope:PATH mmvp:PATH --only_benchmarks

This is row A6 of docs/paper.md. Each model is a training folder. Its model is evaluated on the same images at step 0
(if the model that the training started from still exists), at every checkpoint, and at the end:

    accuracy  of each question type and as the mean of types, by the log-probability of each option
    CKNNA     between the visual tokens of three layers and a VFM's patches, within images, with its permutation null
    drop      accuracy before minus accuracy after the visual tokens of each image are permuted after the vision
              encoder (features together with their positions)
    benchmark the score of each of --benchmarks that the paper reports, from 0 to 1, and the mean of several; answers,
              prompts and scorers are those of `analyses.benchmark`. Subsets of one benchmark count as one. The chance
              of a mean is the mean of chances

The two training losses come from the training log: each value is the mean over the training batches since the previous
row. For a single run they have no interval. Models named NAME-s0, NAME-s1, ... are treated as seeds of NAME: their
scores are means over seeds with Student's t interval. For all other models the interval is over images; it says
nothing about other seeds.

`steps to the other's final score`, for accuracy and CKNNA, is the first step at which a run's score is at least the
final score of the other run of the same seed, with linear interpolation between evaluations. It is compared with the
step at which the other run itself first reached that score, by the same rule, so identical runs differ by 0. The
difference is paired by seed, with Student's t interval. If a run never reaches the score, the table says that it did
not within so many steps and gives no difference, because a number would only count the seeds that succeed.

For benchmarks, `reached_low` and `reached_high` are the 95 % interval of these steps over images, for these very runs.
The images (pairs, where a pair counts as one) are resampled 1000 times; in each resample both models have the scores of
the same images, and the level is the other's final score there. `inf` means that the level was not reached in more than
2.5 % of the resamples; `resamples_reached` is the share in which it was. Resamples in which a benchmark has no question
are skipped, and counted in `resamples_skipped`. `share` divides the steps by the length of the other training.

What this number is not: a measure of the final score. Look at the difference of final scores first. Of two runs with
equal but noisy curves, the one whose last evaluation happened to be lower is reached early, so read both directions.
Where all seeds agree, as in an interval of [0, 0], the resolution is still limited by the distance between evaluations.
Differences of scores are paired by seed too, and need at least two seeds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analyses.dynamics.benchmarks import ask_all, benchmarks_of
from analyses.dynamics.drawing import figures
from analyses.dynamics.evaluation import Evaluation, TrainingPoint, measure
from analyses.dynamics.options import Config
from analyses.dynamics.summaries import summary
from analyses.dynamics.training import beside, earlier_checkpoints, start_folder
from workbench.analysis.declaration import Analysis, Context, Result, vfm_inputs
from workbench.benchmarks.asking import Asking, ask
from workbench.capture.hidden_states import check_layers
from workbench.data import Sample
from workbench.mllm import MLLM
from workbench.training_folder import training_log, training_record

log = logging.getLogger(__name__)
# versions: 2 intervals that reach their nominal coverage; 3 all tokens of an option; 4 intervals of MME; 5 answers with
# two letters; 6 options of one letter
VERSION = 6


def run(config: Config, context: Context) -> Result:
    """Evaluate the model at the start, at every checkpoint and at the end on the same questions."""
    folder = Path(context.mllm.name)
    record = training_record(folder)
    scenes, layers, asked = list[list[Sample]](), list[int](), list[Asking]()
    if not config.only_benchmarks:
        asked = [ask(config, context.mllm, context.data, types=config.types, each=config.questions)]
        scenes, layers = asked[0].worded, _layers(config, context.mllm, record)
    benchmarks = benchmarks_of(config, context)
    evaluation = Evaluation(config, context, scenes, layers)
    notes: dict[str, str] = {}
    parts_by_table: dict[str, list[pd.DataFrame]] = {}
    models: list[tuple[int, Path | None]] = [
        (checkpoint.step, checkpoint.folder) for checkpoint in earlier_checkpoints(folder)
    ]
    models = [(0, start_folder(folder)), *models, (record["recipe"]["optim"]["steps"], None)]
    for step, model_folder in models:
        point = TrainingPoint(evaluation, step, model_folder)
        if step == 0 and (model_folder is None or not point.has_fingerprint(record.get("start_fingerprint"))):
            notes["step 0"] = (
                "the model that the training started from was not found"
                if model_folder is None
                else f"the weights in {model_folder} are not those that the training started from"
            )
            continue
        tables_of_step = []
        if not config.only_benchmarks:
            measured, skipped = measure(evaluation, point)
            notes |= skipped
            tables_of_step.append(measured)
        if benchmarks:
            tables_of_step.append(ask_all(benchmarks, point))
        for name, table in (item for tables in tables_of_step for item in tables.items()):
            parts_by_table.setdefault(name, []).append(table.assign(step=step))
    for what, why in notes.items():
        log.warning("%s: %s is left out: %s", context.mllm.name, what, why)
    tables = {name: pd.concat(parts, ignore_index=True) for name, parts in parts_by_table.items()}
    tables["log"] = training_log(folder)
    return Result(
        tables,
        record={
            "skipped": notes,
            "alignment": record["recipe"]["alignment"],
            "training_seed": record["recipe"]["seed"],
            "layers": evaluation.layers,
            "benchmarks": [benchmark.record for benchmark in benchmarks],
        }
        | (asked[0].record if asked else {}),
        left_out=[sentence for asking in (*asked, *(b.asking for b in benchmarks)) for sentence in asking.left_out],
    )


def _inputs(config: Config) -> dict[str, str]:
    """Return the identity of everything besides model and data that the numbers depend on: VFMs and benchmarks."""
    vfms = {} if config.only_benchmarks else vfm_inputs(config)
    return vfms | {f"benchmark {spec}": data.fingerprint for spec, data in config.benchmark_data.items()}


def _layers(config: Config, mllm: MLLM, record: Mapping[str, Any]) -> list[int]:
    """Return the layers for CKNNA; see `Config.layers`."""
    alignment = record["recipe"]["alignment"]
    middle = alignment["layer"] if alignment["objective"] != "none" else [max(1, mllm.n_layers // 2)]
    return check_layers(mllm, config.layers or sorted({1, *middle, mllm.n_layers}))


ANALYSIS = Analysis(
    "dynamics",
    "Scores over a training's checkpoints (dynamics)",
    Config,
    run,
    figures,
    summary,
    version=VERSION,
    uses=_inputs,
    beside=beside,
)
