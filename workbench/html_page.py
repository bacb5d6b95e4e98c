"""HTML pages that need no network and upload nothing: one file with text, tables and interactive figures.

plotly.js is packed inside, which makes a page of 2 MB instead of 5; browsers since 2023 unpack it.
"""

from __future__ import annotations

import base64
import gzip
import json
import shlex
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path

import pandas as pd

from workbench.claims.shown import EXPLAINED, TITLE, count_verdicts, display_table
from workbench.cli import number_text
from workbench.figures import EXPORT, Figure, javascript
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
body { counter-reset: figure }
.number::before { counter-increment: figure; content: "Figure " counter(figure) }
.scroll { overflow: auto; max-height: 32rem; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { position: sticky; top: 0; background: var(--raised) }
.claims th, .claims td { text-align: left; white-space: normal; min-width: 7rem; vertical-align: top }
.left table { width: 100% } .left th { width: 7rem }
.left th, .left td { text-align: left; white-space: normal; overflow-wrap: anywhere; position: static }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 }
.card { flex: 1 1 15rem; border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem }
.card strong { display: block; font-size: 1.35rem }
@media print {
  :root {
    --text: #000; --quiet: #444; --line: #bbb; --back: #fff; --raised: #f5f5f5; --link: #000; color-scheme: light
  }
  body { max-width: none; padding: 0; font-size: 10pt }
  nav, .modebar-container { display: none }
  h2, h3 { break-after: avoid }
  .plotly-graph-div, .card, tr { break-inside: avoid }
  .scroll { max-height: none; overflow: visible }
}
"""
# Draws every figure when plotly.js is unpacked, one after the other.
DRAW = """
(async () => {
  const packed = Uint8Array.from(atob(document.getElementById('plotly').textContent), c => c.charCodeAt(0));
  const code = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  (0, eval)(await new Response(code).text());
  for (const json of document.querySelectorAll('script[data-figure]')) {
    const figure = JSON.parse(json.textContent);
    await Plotly.newPlot(json.dataset.figure, figure.data, figure.layout, CONFIG);
  }
  document.documentElement.dataset.drawn = 'yes';
})();
"""


def figure_page(target: Path, title: str, facts: Mapping[str, str], figure: Figure, table: pd.DataFrame) -> None:
    """Write one figure and its table as a self-contained page; on any failure `target` stays as it was."""
    body = html_figure(figure, "figure") + html_table(table, title.lower().replace(" ", "-"))
    with atomic_file(target) as partial:
        partial.write_text(document(title, facts, body), encoding="utf-8")


def html_figure(figure: Figure, name: str) -> str:
    """Return a figure with its number as a part of a page of `document`; it has no button that uploads data.

    Args:
        name: id of the figure in its page.
    """
    content = str(figure.to_json()).replace("<", "\\u003c")
    height = figure.layout.height or 450
    return (
        f'<div id="{escape(name)}" class="plotly-graph-div" style="height: {height}px"></div>\n'
        '<p class="quiet number"></p>\n'
        f'<script type="application/json" data-figure="{escape(name)}">{content}</script>\n'
    )


def _scripts(body: str) -> str:
    """Return plotly.js and what draws the figures of a page, "" for a page without a figure."""
    if "data-figure=" not in body:
        return ""
    draw = DRAW.replace("CONFIG", json.dumps(EXPORT | {"responsive": True}))
    return f'<script id="plotly" type="text/plain">{_packed()}</script>\n<script>{draw}</script>\n'


@cache
def _packed() -> str:
    return base64.b64encode(gzip.compress(javascript().encode(), 9, mtime=0)).decode()


def document(title: str, facts: Mapping[str, str], body: str) -> str:
    """Return the HTML document with title, table of facts and body."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{facts_table(facts)}\n{body}{_scripts(body)}</body>\n</html>\n"
    )


def facts_table(facts: Mapping[str, str]) -> str:
    """Return {name: value} as a table, "" for none."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return f'<div class="scroll left"><table>{rows}</table></div>' if rows else ""


def ledger_section(ledger: Run) -> str:
    """Return the section with the claims and their verdicts."""
    table, record = ledger.tables["claims"], ledger.record
    explanation = f"{count_verdicts(table)}. {EXPLAINED}"
    source = f"Stored {record['created'][:16]} from {record['model']}: {shlex.join(record['argv'])}"
    parts = [
        f'<section><h2 id="claims">{escape(TITLE)}</h2>',
        f"<p>{escape(explanation)}</p>",
        f'<p class="quiet">{escape(source)}</p>',
    ]
    return (
        "\n".join([*parts, f'<div class="claims">{html_table(display_table(table), "claims")}</div>']) + "</section>\n"
    )


def html_table(table: pd.DataFrame, name: str) -> str:
    """Return a table as HTML, folded if it is long, with a link to the same table as CSV inside the page."""
    rows = table.to_html(index=False, escape=True, border=0, float_format=number_text, na_rep="")
    data = base64.b64encode(table.to_csv(index=False).encode()).decode()
    opened = " open" if len(table) <= LONG else ""
    link = f'<a download="{escape(name)}.csv" href="data:text/csv;base64,{data}">CSV</a>'
    return (
        f"<details{opened}><summary>Table, {len(table)} rows</summary><div"
        f' class="scroll">{rows}</div></details>\n<p>{link}</p>'
    )
