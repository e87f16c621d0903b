"""Documents as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from secateur.reports.document import Charts, Document, Listing, Paragraph, Part, Table


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def escape(value: object) -> str:
    """Text that stays text: no markup, no new cell, no new line."""
    text = " ".join(str(value).split())
    for mark in "\\`*[]|":  # an underscore inside a word is no markup
        text = text.replace(mark, f"\\{mark}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fenced(text: str) -> str:
    """A block of literal text, its fence longer than any inside."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text.rstrip()}\n{fence}"


def render_table(part: Table) -> str:
    """A table of plain text."""
    return table([escape(name) for name in part.head], [[escape(cell) for cell in row] for row in part.rows])


def render_markdown(document: Document, pictures: str) -> str:
    """A document as Markdown.

    Args:
        pictures: name of the file beside it that shows the charts.
    """

    def render(part: Part) -> str:
        match part:
            case Table():
                return render_table(part)
            case Paragraph(text):
                return escape(text)
            case Listing(text):
                return fenced(text)
            case Charts(charts):
                named = "; ".join(
                    f"{escape(chart.title)} ({escape(chart.y)} over {escape(chart.x)})" for chart in charts
                )
                return f"Shown in [{pictures}]({pictures}): {named}."

    blocks = [f"# {escape(document.title)}", escape(document.lead)]
    for section in document.sections:
        blocks += [f"## {escape(section.title)}", *map(render, section.parts)]
    return "\n\n".join(blocks) + "\n"
