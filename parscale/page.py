"""One HTML page that needs nothing beside itself: text, tables, and figures for light and dark."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from parscale.law_figures import STYLE

INK = {"light": "#1b1f24", "dark": "#e6e6e6"}
CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --back: #ffffff; --line: #d0d4da;
  --soft: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --back: #15181c; --line: #3a4048; --soft: #1f2328; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 64rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem;
  border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { background: var(--soft); }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; }
figcaption, .note { font-size: .9rem; opacity: .8; }
.warning { border-left: 4px solid #D55E00; padding: .4rem .8rem; background: var(--soft); }
"""


def page(title: str, subtitle: str, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """The whole page.

    Args:
      title: its heading, plain text as all text here.
      subtitle: the line below.
      sections: for each, a heading and blocks of HTML made by the functions below.
    """
    body = [f"<h1>{html.escape(title)}</h1>", text(subtitle, "note")]
    for heading, blocks in sections:
        body += [f"<section><h2>{html.escape(heading)}</h2>", *blocks, "</section>"]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title><style>{CSS}</style></head><body>",
            *body,
            "</body></html>",
        ]
    )


def text(words: str, kind: str = "") -> str:
    """A paragraph; `kind` is "", "note" or "warning"."""
    return f'<p class="{kind}">{html.escape(words)}</p>' if kind else f"<p>{html.escape(words)}</p>"


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table; the first column names the row."""
    cell = lambda tag, value: f"<{tag}>{html.escape(str(value))}</{tag}>"
    line = lambda tag, cells: "<tr>" + "".join(cell(tag, value) for value in cells) + "</tr>"
    body = "\n".join(line("td", row) for row in rows)
    return (
        f'<div class="wide"><table><thead>{line("th", header)}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(draw: Callable[[], Figure], caption: str) -> str:
    """A figure, drawn once in dark ink and once in light, of which a browser shows one."""
    light, dark = (_data_url(draw, INK[mode]) for mode in ("light", "dark"))
    return (
        f'<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{html.escape(caption)}"></picture>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _data_url(draw: Callable[[], Figure], ink: str) -> str:
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style = STYLE | dict.fromkeys(names, ink) | {"svg.fonttype": "path"}
    file = io.BytesIO()
    with matplotlib.rc_context(style):
        draw().savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
