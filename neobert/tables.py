"""Tables as Markdown and HTML, and a page of them that needs no other file."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ccc; padding: .25em .7em; text-align: left; white-space: nowrap }
td.number { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100% }
"""


@dataclass(frozen=True)
class Table:
    """Columns and rows of text; columns from ``numbers_from`` on are set to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers_from: int | None = None

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows)

    def _is_number(self, column: int) -> bool:
        return self.numbers_from is not None and column >= self.numbers_from

    def markdown(self) -> str:
        ruler = ["---:" if self._is_number(i) else "---" for i in range(len(self.columns))]
        lines = [self.columns, ruler, *self.rows]
        return "\n".join(f"| {' | '.join(map(_one_cell, line))} |" for line in lines)

    def html(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = []
        for row in self.rows:
            cells = (
                f"<td{' class=number' if self._is_number(i) else ''}>{escape(cell)}</td>"
                for i, cell in enumerate(row)
            )
            body.append(f"<tr>{''.join(cells)}</tr>")
        lines = "\n".join(body)
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>"


@dataclass(frozen=True)
class Section:
    """A part of a page: each of heading, text, table and ``.png`` may be missing."""

    heading: str = ""
    text: str = ""
    table: Table | None = None
    picture: Path | None = None


def markdown_page(title: str, text: str, sections: Sequence[Section]) -> str:
    """A text and the sections below it, without their pictures."""
    parts = [f"# {title}", text]
    for section in sections:
        heading = f"## {section.heading}" if section.heading else ""
        table = section.table.markdown() if section.table is not None else ""
        parts += [part for part in (heading, section.text, table) if part]
    return "\n\n".join(parts) + "\n"


def html_page(title: str, text: str, sections: Sequence[Section]) -> str:
    """The same as one page that needs no other file, pictures inside."""
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(text)}</p>"]
    for section in sections:
        if section.heading:
            parts.append(f"<h2>{escape(section.heading)}</h2>")
        if section.text:
            parts.append(f"<p>{escape(section.text)}</p>")
        if section.table is not None:
            parts.append(section.table.html())
        if section.picture is not None:
            data = base64.b64encode(section.picture.read_bytes()).decode()
            name = escape(section.heading or title)
            parts.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _one_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
