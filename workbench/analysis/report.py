"""Write several analyses into one self-contained HTML page, which needs no network and has no button that uploads."""

from __future__ import annotations

import base64
import inspect
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import pandas as pd

from workbench.analysis.declaration import Analysis
from workbench.claims.shown import EXPLAINED, TITLE, count_verdicts, display_table
from workbench.figures import Figure, html_figure, javascript
from workbench.files import atomic_file
from workbench.runs import Run

LONG = 16  # tables with more rows are folded

# With this policy the browser refuses every request: scripts, styles and images are inside the page. (plotly compiles
# WebGL charts, which needs unsafe-eval.)
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:;"
    " worker-src blob:; base-uri 'none'; form-action 'none'"
)
STYLE = """
:root {
  color-scheme: light dark;
  --text: #1d2129; --quiet: #5f6672; --line: #d9dce1; --back: #ffffff; --raised: #f5f6f8;
  --link: #0065a3; --warn: #8f4300
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e4e6ea; --quiet: #9aa1ac; --line: #363b44; --back: #14171c; --raised: #1d2127;
    --link: #6cb6ea; --warn: #f0a66b
  }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; padding: 2rem 1.5rem 5rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 15px/1.55 system-ui, sans-serif
}
h1 { font-size: 1.9rem; margin: 0 0 .4rem }
h2 { font-size: 1.4rem; margin: 3.2rem 0 .3rem; padding-top: .9rem; border-top: 1px solid var(--line) }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .2rem }
a { color: var(--link) }
p { max-width: 52rem }
code, pre { font: 13px/1.5 ui-monospace, monospace }
pre { background: var(--raised); padding: .7rem .9rem; overflow-x: auto; border-radius: 6px }
details { margin: .6rem 0 }
summary { cursor: pointer; color: var(--quiet) }
nav ul { padding-left: 1.2rem; margin: .3rem 0 }
.quiet { color: var(--quiet) } .warn { color: var(--warn) }
.scroll { overflow: auto; max-height: 32rem; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { position: sticky; top: 0; background: var(--raised) }
.claims th, .claims td { text-align: left; white-space: normal; min-width: 7rem; vertical-align: top }
.left table { width: 100% } .left th { width: 7rem }
.left th, .left td { text-align: left; white-space: normal; overflow-wrap: anywhere; position: static }
"""


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
        body = _ledger(ledger) + body
    return _document(title, facts, f"<nav><h3>Contents</h3><ul>{contents}</ul></nav>\n{body}")


def figure_page(target: Path, title: str, facts: Mapping[str, str], figure: Figure, table: pd.DataFrame) -> None:
    """Write one figure and its table as a self-contained page; on any failure `target` stays as it was."""
    body = html_figure(figure, "figure") + _table(table, title.lower().replace(" ", "-"))
    with atomic_file(target) as partial:
        partial.write_text(_document(title, facts, body), encoding="utf-8")


def _document(title: str, facts: Mapping[str, str], body: str) -> str:
    """Return the HTML document with title, table of facts and body."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n<script>{javascript()}</script>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<div class="scroll left"><table>{rows}</table></div>\n{body}</body>\n</html>\n'
    )


def _state(section: Section) -> str:
    return "" if section.models else ' <span class="quiet">(skipped)</span>'


def _ledger(ledger: Run) -> str:
    """Return the section with the claims and their verdicts."""
    table, record = ledger.tables["claims"], ledger.record
    explanation = f"{count_verdicts(table)}. {EXPLAINED}"
    source = f"Stored {record['created'][:16]} from {record['model']}: {shlex.join(record['argv'])}"
    parts = [
        f'<section><h2 id="claims">{escape(TITLE)}</h2>',
        f"<p>{escape(explanation)}</p>",
        f'<p class="quiet">{escape(source)}</p>',
    ]
    return "\n".join([*parts, f'<div class="claims">{_table(display_table(table), "claims")}</div>']) + "</section>\n"


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
        parts.append(_table(section.table, name))
        commands = "\n".join(shlex.join(words) for words in section.commands)
        parts.append(f"<details><summary>Commands</summary><pre>{escape(commands)}</pre></details>")
    return "\n".join(parts) + "</section>\n"


def _table(table: pd.DataFrame, name: str) -> str:
    """Return a table as HTML, folded if it is long, with a link to the same table as CSV inside the page."""
    rows = table.to_html(index=False, escape=True, border=0, float_format="{:.3f}".format, na_rep="")
    data = base64.b64encode(table.to_csv(index=False).encode()).decode()
    opened = " open" if len(table) <= LONG else ""
    link = f'<a download="{escape(name)}.csv" href="data:text/csv;base64,{data}">CSV</a>'
    return (
        f"<details{opened}><summary>Table, {len(table)} rows</summary><div"
        f' class="scroll">{rows}</div></details>\n<p>{link}</p>'
    )
