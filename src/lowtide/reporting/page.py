"""The report of a run as one HTML page, which needs nothing else and is forbidden every connection.

A policy in the page (Content-Security-Policy) allows the two scripts that are in it, by their hashes, and no connection; a live page
may ask the server that it came from. So even text that slipped through unescaped could neither run nor load anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .charts import Chart, curve_charts, memory_curve
from .history import History
from .memory_chart import memory_by_kind, memory_in_step
from .samples import samples_list
from .tables import held_out_table, key_figures, memory_table, notes, settings_tables, versions_table

MARK = "<!doctype html>\n<!-- lowtide report -->"
_HERE = Path(__file__).parent


def plotly_script() -> str:
    """The source of plotly.js.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ModuleNotFoundError(
            "a report needs the package plotly: pip install 'lowtide[report]'", name="plotly"
        ) from None
    source: str = get_plotlyjs()
    return source


def content(runs: Sequence[History], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows: ``body``, HTML, and ``charts``, for the page's script.

    Args:
        runs: one, or two to compare.
        defaults: of the settings, in their order.
    """
    charts = curve_charts(runs)
    in_step = [memory_in_step(run, runs) for run in runs]
    memory = [chart for chart in (memory_by_kind(runs), *in_step, memory_curve(runs)) if chart is not None]
    remarks = [note if len(runs) == 1 else f"{run.name}: {note}" for run in runs for note in notes(run)]
    parts = [
        f"<h1>{escape(' and '.join(run.name for run in runs))}</h1>",
        f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in remarks)}</ul>' if remarks else "",
        _section("figures", "Key figures", key_figures(runs)),
        _section("curves", "Training", _figures(charts) + _folded("Evaluations as a table", held_out_table(runs))),
        _section("samples", "Samples: the same held-out prompts before and after", samples_list(runs)),
        _section("memory", "Memory", _figures(memory) + _folded("Memory by kind as a table", memory_table(runs))),
        _section("settings", "Settings", settings_tables(runs, defaults)),
        _section("versions", "Versions", versions_table(runs)),
    ]
    return {"body": "".join(parts), "charts": [chart.to_dict() for chart in (*charts, *memory)]}


def page(runs: Sequence[History], defaults: Mapping[str, Any], *, live: bool = False) -> str:
    """The whole page.

    Args:
        runs: one, or two to compare.
        defaults: of the settings, in their order.
        live: it comes from a server, which it asks for what is new.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    plotly, script = plotly_script(), (_HERE / "page.js").read_text(encoding="utf-8")
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    found = content(runs, defaults)
    data = json.dumps(found["charts"], allow_nan=False).replace("<", "\\u003c")
    title = escape("lowtide: " + " and ".join(run.name for run in runs))
    return f"""{MARK}
<html lang="en"{' data-live="yes"' if live else ""}>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy((plotly, script), live)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<p id="status" role="status" hidden></p>
<main id="content">{found["body"]}</main>
<script type="application/json" id="charts">{data}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def _policy(scripts: Sequence[str], live: bool) -> str:
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    rules = {
        "default-src": "'none'",
        "script-src": hashes,
        "style-src": "'unsafe-inline'",  # plotly writes its own
        "img-src": "data: blob:",  # a chart saved as a picture
        "connect-src": "'self'" if live else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _section(key: str, title: str, inside: str) -> str:
    return f'<section aria-labelledby="{key}"><h2 id="{key}">{title}</h2>{inside}</section>' if inside else ""


def _folded(title: str, inside: str) -> str:
    return f'<details data-key="{title}"><summary>{title}</summary>{inside}</details>' if inside else ""


def _figures(charts: Sequence[Chart]) -> str:
    figures = "".join(
        f"<figure{' class=wide' if chart.wide else ''}><h3>{escape(chart.title)}</h3>"
        f'<div class="chart" id="chart-{chart.key}" role="img" aria-label="{escape(f"{chart.title}. {chart.text}")}"></div>'
        f"<figcaption>{escape(chart.text)}</figcaption></figure>"
        for chart in charts
    )
    return f'<div class="charts">{figures}</div>' if figures else ""
