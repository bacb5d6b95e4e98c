"""One HTML page about the chosen models: what came out first, then accuracies, layers, claims and how all was made.

It is made from what is stored, in the words and charts of the dashboard's pages, and needs neither torch nor network.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import pandas as pd

from workbench import figures, runs
from workbench.html_page import document, facts_table, html_figure, html_table, ledger_section
from workbench.overview.charts import (
    about_scores,
    accuracies_chart,
    alignment_chart,
    by_variant,
    curves_of,
    lines_words,
    types_chart,
)
from workbench.overview.differences import Pair, strip
from workbench.overview.measures import LONG, MEASURES, QUESTIONS, measured
from workbench.overview.models import Models, unusable_of
from workbench.overview.stored import Stored
from workbench.overview.story import Story, tell
from workbench.overview.table import SETTINGS, accuracies_of, model_rows

TABLE = ["key", "variant", "seed", *SETTINGS, "accuracy", "low", "high", "chance"]
TABLE += ["difference", "d_low", "d_high", "p_holm"]
WHOLE = {"seed": "Int64", "steps": "Int64"}  # also where a model has none


def selection_report(
    root: Path,
    stored: Stored,
    models: Models,
    pair: Pair,
    keys: Sequence[str],
    colors: Mapping[str, str],
    address: str = "",
) -> str:
    """Return the page.

    Args:
        root: the runs folder.
        pair: the two groups that are compared.
        keys: all chosen models, the baseline first.
        colors: {model: color}.
        address: of the dashboard's page with the same choice.
    """
    with figures.colored(colors):
        story = tell(pair, stored)
        used: dict[str, Sequence[str]] = {}
        parts = [
            _summary(story),
            _accuracy(story, models, keys),
            _layers(story, stored, keys, models, used),
            "" if stored.ledger is None else ledger_section(runs.load(stored.ledger)),
            _unusable(models, stored),
            _made(used),
        ]
    here = runs.environment([])
    facts = {
        "made": f"{here['created']} (UTC), commit {here['git'] or 'unknown'}{' (dirty)' if here['dirty'] else ''}",
        "models": ", ".join(keys),
        "folder": str(root),
    } | ({"dashboard": address} if address else {})
    return document(story.title, {}, "\n".join(parts) + facts_table(facts))


def _summary(story: Story) -> str:
    cards = "".join(
        f'<div class="card"><span class="quiet">{escape(card.title)}</span><strong>{escape(card.value)}</strong>'
        f'{escape(card.change)}<br><span class="quiet">{escape(card.chance)}</span></div>'
        for card in story.cards
    )
    notes = "".join(f'<p class="warn">{escape(sentence)}</p>' for sentence in story.left_out)
    return (
        f'<p>{escape(story.compared)}</p>\n<div class="cards">{cards}</div>\n'
        f"<p><strong>{escape(story.finding)}</strong> {escape(story.caveat)}</p>\n{notes}"
    )


def _accuracy(story: Story, models: Models, keys: Sequence[str]) -> str:
    parts = ['<section><h2 id="accuracy">Accuracy</h2>']
    if story.answered is not None:
        first, second = map(escape, story.pair.names)
        parts += [f"<h3>By question type: {second} minus {first}</h3>", html_figure(types_chart(story), "types")]
        parts += [_quiet("95 % intervals, not corrected for the number of types; gray where the interval includes 0.")]
        names = dict(zip(("first", "second"), story.answered.pair.names, strict=True)) | {"score": "difference"}
        parts += [html_table(story.answered.by_type.rename(columns=names), "accuracy-by-type")]
    rows = model_rows(Models({key: models.by_key[key] for key in keys}), keys[0])
    rows = rows.reindex(columns=TABLE).astype(WHOLE).dropna(axis="columns", how="all")
    parts += [f"<h3>Each model, difference to {escape(keys[0])}</h3>", html_table(rows, "models")]
    parts += [
        '<p class="quiet">Mean of question types; intervals over images, which say nothing about other seeds.</p>'
    ]
    of_model = {key: accuracies_of(models.by_key[key]) for key in keys}
    known = {key: table for key, table in of_model.items() if len(table)}
    if known:
        parts += ["<h3>Each model by question type</h3>", html_figure(accuracies_chart(known), "by-type")]
    return "\n".join(parts) + "</section>"


def _layers(story: Story, stored: Stored, keys: Sequence[str], models: Models, used: dict[str, Sequence[str]]) -> str:
    """Return the strip of all measures and a chart of each; `used` gets {folder of a run: its command}."""
    found = measured(stored, keys)
    if not found:
        return '<section><h2 id="layers">Layers</h2><p>No measure of their layers is stored.</p></section>'
    parts = ['<section><h2 id="layers">Layers</h2>']
    if story.alignment is not None:
        first, second = map(escape, story.pair.names)
        parts += [f"<h3>CKNNA by layer: {second} minus {first}</h3>"]
        parts += [html_figure(alignment_chart(story, story.alignment), "alignment")]
    table = strip(story.pair, stored, {key: MEASURES[key] for key in found})
    if len(table):
        parts += ["<h3>All measures at once, in standard errors</h3>", html_figure(figures.layer_strip(table), "strip")]
        parts += [
            _quiet(
                "Blue: higher in the second model. A dot: the 95 % interval leaves 0 out, not corrected for the number"
                " of cells."
            )
        ]
        parts += [html_table(table.drop(columns="measure"), "differences")]
    several = len(keys) > len({models.by_key[key].variant for key in keys}) > 1
    for asked, short in QUESTIONS.items():
        of_question = [MEASURES[key] for key in found if MEASURES[key].asked == asked]
        if of_question:
            parts += [f"<h3>{escape(short)}</h3><p>{escape(LONG[asked])}</p>"]
        for measure in of_question:
            of_runs, table = found[measure.key]
            used |= {run.folder.name: run.record.get("argv", []) for run in of_runs}
            rows = curves_of(table)
            if several:
                rows = by_variant(rows, models)
            for series, shown in rows.groupby("series", sort=False):
                title = measure.title.format(series=series)
                zero = measure.neutral is not None
                figure = figures.layer_curves_named(shown, y=title, zero=zero)
                about = about_scores(of_runs, shown["n_images"], *lines_words(shown, zero=zero))
                parts += [f"<h4>{escape(title)}</h4>", html_figure(figure, f"{measure.key}-{len(parts)}")]
                parts += [_quiet(f"Here: {measure.explained}. {about}")]
    return "\n".join(parts) + "</section>"


def _unusable(models: Models, stored: Stored) -> str:
    """Return which models and analyses cannot be used, and why."""
    lines = [f"{each.name}: {each.why}" for each in unusable_of(models, stored)]
    return "".join(f'<p class="warn">{escape(line)}</p>' for line in lines)


def _made(used: Mapping[str, Sequence[str]]) -> str:
    rows = pd.DataFrame([{"run": name, "command": shlex.join(words)} for name, words in used.items()])
    if rows.empty:
        return ""
    table = html_table(rows, "runs")
    return f'<section><h2 id="runs">How each number was made</h2><div class="claims">{table}</div></section>'


def _quiet(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'
