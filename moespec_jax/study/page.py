"""HTML page of a study: findings, pictures and tables, and the command that made them, in one file."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 22%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; }
dt { opacity: .75; } dd { margin: 0; overflow-wrap: anywhere; }
.finding { border-left: 4px solid #0072B2; padding: .1rem 0 .1rem 1rem; margin: 1rem 0; }
.finding ul { font-size: .9rem; padding-left: 1.2rem; }
.wide { overflow-x: auto; }
img { display: block; width: 100%; min-width: 34rem; max-width: 58rem; background: #fff; border-radius: 4px; }
table { border-collapse: collapse; font-size: .86rem; white-space: nowrap; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); }
td.exact { font-weight: 600; } td.lossy { font-style: italic; }
.note { opacity: .75; font-size: .9rem; }
"""


class Section(NamedTuple):
    """Section of the page.

    Fields:
        title: heading.
        text: description.
        picture: file name in the page's directory.
        tables: captions and rows; the first row holds the names of the columns.
    """

    title: str
    text: str
    picture: str | None = None
    tables: Sequence[tuple[str, Sequence[Sequence[str]]]] = ()


def page(
    title: str,
    facts: Mapping[str, str],
    findings: Sequence[tuple[str, Sequence[str]]],
    sections: Sequence[Section],
    directory: Path,
) -> str:
    """Render the page; pictures are read from `directory` and embedded. A finding is a paragraph and a list."""
    about = "".join(f"<dt>{_text(name)}</dt><dd>{_text(fact)}</dd>" for name, fact in facts.items())
    parts = [f"<h1>{_text(title)}</h1>", f"<dl>{about}</dl>", "<h2>Findings</h2>" if findings else ""]
    for whole, each in findings:
        lines = "".join(f"<li>{_text(line)}</li>" for line in each)
        parts.append(f'<div class="finding"><p>{_text(whole)}</p>{f"<ul>{lines}</ul>" if each else ""}</div>')
    for section in sections:
        parts.append(f"<h2>{_text(section.title)}</h2><p>{_text(section.text)}</p>")
        if section.picture is not None:
            parts.append(_picture(directory / section.picture, section.title))
        parts += [_table(caption, rows) for caption, rows in section.tables]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _picture(file: Path, title: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return f'<div class="wide"><img alt="{_text(title)}" src="data:image/png;base64,{data}"></div>'


def _table(caption: str, rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>\n" for row in rows[1:])
    note = f'<p class="note">{_text(caption)}</p>' if caption else ""
    return f'{note}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _cell(cell: str) -> str:
    marked = f' class="{cell}"' if cell in ("exact", "lossy") else ""
    return f"<td{marked}>{_text(cell)}</td>"


def _text(text: str) -> str:
    return html.escape(text)
