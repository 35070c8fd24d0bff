"""Pieces of a self-contained HTML page: tables, numbers in words, pictures inside the file."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnlab.files import replace_file

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0 } td, th { padding: .2rem .9rem .2rem 0;
       text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } tr.own td { font-weight: 600 }
pre { background: #f6f6f4; padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere }
img { max-width: 100% } .note { color: #666 } .wide { overflow-x: auto }
.wide { font-size: 13px } .wide td, .wide th { white-space: nowrap }
"""

NUMBER = re.compile(r"[\d,]+(\.\d+)?(e\+\d+)?[kMGT]?( [kMGT]?B)?")
"""A number, perhaps with a decimal prefix or bytes as its unit."""


def write_page(path: Path, title: str, body: Sequence[str], width: int = 60) -> None:
    """Writes one HTML file that needs nothing but itself, at most ``width`` rem wide; ``body``
    holds HTML, ``title`` text."""
    style = f"{STYLE}body {{ max-width: {width}rem }}\n"
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    replace_file(path, page.encode())


def table(head: Sequence[str], rows: Sequence[Sequence[str]], own: int = -1) -> str:
    """HTML of a table in which row ``own`` stands out; columns of numbers are set to the right."""
    numeric = [i > 0 and all(_is_number(row[i]) for row in rows) for i in range(len(head))]

    def line(tag: str, cells: Sequence[str], mark: str = "") -> str:
        marked = (
            f"<{tag}{' class=n' if numeric[i] else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr{mark}>{''.join(marked)}</tr>"

    lines = (line("td", row, " class=own" * (i == own)) for i, row in enumerate(rows))
    return f"<table>{line('th', head)}{''.join(lines)}</table>"


def count(number: int, thing: str) -> str:
    """``1 step``, ``2,000 steps``."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def number(value: Any) -> str:
    """A whole number with commas, another with four digits, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4f}" if value < 1e6 else f"{value:.3e}"


def plain(value: Any) -> str:
    """What JSON can hold, as a reader would write it."""
    if isinstance(value, Mapping):
        return "; ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return f"{value:,}" if type(value) is int else str(value)


def image(path: Path) -> str:
    """A PNG file as part of the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def _is_number(text: str) -> bool:
    return text == "–" or bool(NUMBER.fullmatch(text))
