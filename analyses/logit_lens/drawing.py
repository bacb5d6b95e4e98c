"""The summary, differences and figures of stored runs."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from analyses.logit_lens.scores import MEASURES
from workbench import figures as fig
from workbench.runs import Run, comparable
from workbench.stats import paired_differences


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return one row for each model, layer, kind of word and measure, for tokens on objects.

    If a run has no scores: for each model and layer, the three words that are the most likely one of most patches.
    """
    if any("scores" not in run.tables for run in runs.values()):
        maps = pd.concat([run.tables["maps"].assign(model=label) for label, run in runs.items()])
        likeliest = maps[maps["rank"] == 1].groupby(["model", "layer"], sort=False)["word"]
        return likeliest.value_counts().groupby(level=[0, 1], sort=False).head(3).rename("cells").reset_index()
    table = pd.concat([run.tables["scores"].assign(model=label) for label, run in runs.items()])
    columns = [
        "model",
        "layer",
        "kind",
        "measure",
        "score",
        "low",
        "high",
        "null_mean",
        "null_q95",
        "p",
        "n_images",
        "n",
        "candidates",
    ]
    return table[table["cells"] == "object"][columns]


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return every model minus the first one, paired over images and Holm-corrected over layers.

    A model that chose among other words than the first one, because its tokenizer has other tokens, is left out, and so
    is one that was read on other data or with other options.

    Returns:
        One row for each model, kind of patch, kind of word, measure and layer.
    """
    first = next(iter(runs.values()))
    runs = comparable(runs, ("cover", "seed", "tokens_per_image"))
    words = {label: set(run.extra.get("words", ())) for label, run in runs.items()}
    alike = [label for label in runs if words[label] == next(iter(words.values()))]
    tables = {label: runs[label].tables["per_image"] for label in alike}
    seed = int(first.record["seed"])
    return paired_differences(
        tables, by=("cells", "kind", "measure", "layer"), within=("cells", "kind", "measure"), seed=seed
    )


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw the words over each stored image, every score by layer over its null, and its difference between models."""
    drawn: dict[str, go.Figure] = {}
    for number in sorted({n for run in runs.values() for n in run.tables["maps"]["number"]}):
        word_maps = [
            _word_map(label, run, number)
            for label, run in runs.items()
            if (run.tables["maps"]["number"] == number).any()
        ]
        drawn[f"Words over image {number}"] = fig.word_maps(word_maps)
    scored = {label: run for label, run in runs.items() if "scores" in run.tables}
    if not scored:
        return drawn
    table = pd.concat([run.tables["scores"].assign(model=label) for label, run in scored.items()])
    changes = differences(scored)
    for kind in dict.fromkeys(table["kind"]):
        for measure, title in MEASURES.items():
            rows = table[(table["kind"] == kind) & (table["measure"] == measure)]
            drawn[f"{kind}: {title}"] = fig.layer_curves(rows, y=title, kind="cells")
            change = changes[
                (changes["kind"] == kind) & (changes["measure"] == measure) & (changes["cells"] == "object")
            ]
            if len(change):
                drawn[f"{kind}: {title}, difference on objects"] = fig.difference_curves(
                    change, y=f"{title}, minus {change['against'].iloc[0]}"
                )
    return drawn


def _word_map(label: str, run: Run, number: int) -> fig.WordMap:
    table = run.tables["maps"]
    return fig.WordMap(label, run.tensors[f"image_{number}"].numpy(), table[table["number"] == number])
