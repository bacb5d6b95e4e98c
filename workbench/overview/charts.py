"""Charts of a comparison, as the pages and the report draw them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from workbench import figures
from workbench.overview.measures import images_words
from workbench.overview.models import Models
from workbench.overview.stored import StoredRun
from workbench.overview.story import Alignment, Story
from workbench.training_folder import MEAN


def colors_of(models: Models) -> dict[str, str]:
    """Return {model or variant, also as figures write the name: color} of all models of a runs folder."""
    colors = figures.model_colors({name: [model.key for model in of] for name, of in models.variants.items()})
    return colors | {figures.plain_name(name): color for name, color in colors.items()}


def types_chart(story: Story) -> figures.Figure:
    """Return the difference in accuracy by question type, in percentage points; the story has answers."""
    assert story.answered is not None
    table = story.answered.by_type
    shown = pd.DataFrame(
        {
            "name": table["category"],
            **{key: 100 * table[key] for key in ("score", "low", "high")},
            "over": [f"{row.n} {row.over}, {row.questions} questions" for row in table.itertuples()],
        }
    )
    return figures.difference_dots(shown, x="percentage points", names=story.pair.names, last=MEAN)


def accuracies_chart(accuracies: Mapping[str, pd.DataFrame]) -> figures.Figure:
    """Return the accuracy of each model or variant by question type, as a heat map if there are more than LINES."""
    if len(accuracies) <= figures.LINES:
        return figures.accuracy_by_type(accuracies)
    long = pd.concat([table.assign(name=name) for name, table in accuracies.items()])
    if "over" not in long:
        long = long.assign(over=[f"{images} images" for images in long["n_images"]])
    shown = long.rename(columns={"category": "at", "accuracy": "score"})
    return figures.layer_heat(shown, title="accuracy", column="question type")


def alignment_chart(story: Story, alignment: Alignment) -> figures.Figure:
    """Return the difference in CKNNA by layer, with a line at the layer that the alignment loss reads."""
    changes = alignment.changes
    by_layer = changes.rename(columns={"layer": "at"}).assign(
        name=story.pair.names[1], over=[f"{row.n} {row.over}" for row in changes.itertuples()]
    )
    layers = story.pair.shared[0][1].layers or story.pair.shared[0][0].layers
    title = f"CKNNA with {alignment.vfm}"
    return figures.layer_curves_named(by_layer, y=title, marked=layers[0] if layers else None, zero=True)


def by_variant(curves: pd.DataFrame, models: Models) -> pd.DataFrame:
    """Return curves of models with their variant as `group`; of several trainings with one seed, the first counts."""
    drawn = [models.by_key[key] for key in reversed(dict.fromkeys(curves["name"]))]
    first = {(model.variant, model.seed): model.key for model in drawn}
    kept = curves[curves["name"].isin(first.values())]
    return kept.assign(group=[models.by_key[key].variant for key in kept["name"]])


def curves_of(scores: pd.DataFrame) -> pd.DataFrame:
    """Return a table of `overview.measures.scores` in the columns that `figures.layer_curves_named` draws."""
    return scores.rename(columns={"model": "name", "layer": "at"}).assign(
        over=[f"{n:.0f} images" for n in scores["n_images"]],
        chance=scores["null_q95"].fillna(scores["chance"]),
        level=[figures.CHANCE if missing else figures.Q95 for missing in scores["null_q95"].isna()],
    )


# --- what a chart shows, in words -----------------------------------------------------------------


def lines_words(curves: pd.DataFrame, *, zero: bool) -> tuple[str, str]:
    """Return what the intervals of `figures.layer_curves_named` are, and what its dotted line is ("" if there is none).

    Args:
        curves: what is drawn.
        zero: whether 0 means that there is no effect.
    """
    apart = ""
    if grouped := "group" in curves:
        by_group = curves.dropna(subset="score").groupby("group", sort=False)
        most = by_group["at"].agg(lambda at: at.value_counts().max())
        names = most.index[most < by_group["name"].nunique()]
        apart = f"; no mean of {', '.join(names)}: no layer is measured for all seeds" if len(names) else ""
    if (curves["group"] if grouped else curves["name"]).nunique() > figures.LINES:  # a heat map
        return f"95 % intervals{apart}", ""
    intervals = f"thick: mean over seeds, thin: each seed{apart}" if grouped else "95 % intervals"
    return intervals, figures.level_words(curves) or ("no effect" if zero else "")


def about_scores(runs: Sequence[StoredRun], counts: pd.Series, intervals: str, dotted: str) -> str:
    """Return over what scores are, and what was left out.

    Args:
        counts: the number of images of each score; the option `limit` is only the most that there can be.
        intervals: what bands or thin lines stand for.
        dotted: what the dotted line stands for, "" if there is none.
    """
    left_out = [sentence for run in runs for sentence in run.record.get("left_out", [])]
    notes = f" Left out: {'; '.join(dict.fromkeys(left_out))}" if left_out else ""
    return f"{over_what(runs, counts)}; {intervals}{f'; dotted: {dotted}' if dotted else ''}.{notes}"


def over_what(runs: Sequence[StoredRun], counts: pd.Series) -> str:
    """Return of how many images scores are and, of patching, whose tokens were put in."""
    tokens = f"; tokens of {runs[0].sources[0]}" if runs[0].sources else ""
    return f"{images_words(counts)} of {runs[0].record.get('data')}{tokens}"
