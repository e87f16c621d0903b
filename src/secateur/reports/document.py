"""What a report says, apart from how it looks: one description, rendered to Markdown and to HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.plans import Chart


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: names of the columns.
        rows: cells.
        caption: what it shows.
        numbers: whether the columns after the first hold numbers (aligned to the right).
    """

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str
    numbers: bool = True


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Listing:
    """Text to be taken letter by letter: names, or the lines of a file."""

    text: str


@dataclass(frozen=True)
class Charts:
    """Drawings side by side."""

    charts: Sequence[Chart]


Part = Table | Paragraph | Listing | Charts


@dataclass(frozen=True)
class Section:
    """A heading and what follows it."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    lead: str
    sections: Sequence[Section]


def change(before: float | None, after: float | None, form: str = ",.0f") -> list[str]:
    """Cells: before, after, ratio."""
    if before is None or after is None:
        return ["-", "-", "-"]
    return [format(before, form), format(after, form), f"{after / before:.1%}" if before else "-"]
