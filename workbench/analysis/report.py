"""Write several analyses into one self-contained HTML page, which needs no network and has no button that uploads."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import pandas as pd

from workbench.analysis.declaration import Analysis
from workbench.claims.shown import TITLE
from workbench.figures import Figure
from workbench.files import atomic_file
from workbench.html_page import document, html_figure, html_table, ledger_section
from workbench.runs import Run


@dataclass(frozen=True)
class Section:
    """The part of the page about one analysis.

    Attributes:
        models: labels of the models on which it was run; none if it was skipped.
        notes: why models were left out.
        commands: the command line of each run.
        figures: {title: figure}.
        table: the summary.
    """

    analysis: Analysis
    models: Sequence[str] = ()
    notes: Sequence[str] = ()
    commands: Sequence[Sequence[str]] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    table: pd.DataFrame = field(default_factory=pd.DataFrame)


def write(
    target: Path, title: str, facts: Mapping[str, str], sections: Sequence[Section], ledger: Run | None = None
) -> None:
    """Write the report (see `page`); on any failure `target` stays as it was."""
    with atomic_file(target) as partial:
        partial.write_text(page(title, facts, sections, ledger), encoding="utf-8")


def page(title: str, facts: Mapping[str, str], sections: Sequence[Section], ledger: Run | None = None) -> str:
    """Return the whole page as HTML.

    Args:
        facts: rows of the table under the title.
        ledger: the stored claims ledger, shown before the analyses; None if there is none.
    """
    names = [section.analysis.name for section in sections]
    contents = "".join(
        f'<li><a href="#{escape(section.analysis.name)}">{escape(section.analysis.title)}</a>{_state(section)}</li>'
        for section in sections
    )
    body = "".join(_section(section, names) for section in sections)
    if ledger is not None:
        contents = f'<li><a href="#claims">{escape(TITLE)}</a></li>{contents}'
        body = ledger_section(ledger) + body
    return document(title, facts, f"<nav><h3>Contents</h3><ul>{contents}</ul></nav>\n{body}")


def _state(section: Section) -> str:
    return "" if section.models else ' <span class="quiet">(skipped)</span>'


def _section(section: Section, names: Sequence[str]) -> str:
    """Return the section of one analysis; `names` are those of all analyses of the page."""
    name = section.analysis.name
    question, *rest = section.analysis.explanation
    parts = [f'<section><h2 id="{escape(name)}">{escape(section.analysis.title)}</h2>\n<p>{escape(question)}</p>']
    if rest:
        details = "".join(
            f"<pre>{escape(inspect.cleandoc(text))}</pre>" if text.startswith("    ") else f"<p>{escape(text)}</p>"
            for text in rest
        )
        parts.append(f"<details><summary>What the numbers are, and what they are not</summary>{details}</details>")
    parts += [f'<p class="warn">{escape(note)}</p>' for note in section.notes]
    if section.models:
        for number, (title, figure) in enumerate(section.figures.items()):
            parts.append(f"<h3>{escape(title)}</h3>\n{html_figure(figure, f'figure-{names.index(name)}-{number}')}")
        parts.append(html_table(section.table, name))
        commands = "\n".join(shlex.join(words) for words in section.commands)
        parts.append(f"<details><summary>Commands</summary><pre>{escape(commands)}</pre></details>")
    return "\n".join(parts) + "</section>\n"
