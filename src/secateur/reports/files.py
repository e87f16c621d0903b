"""A document as two files: Markdown for whoever reads text, HTML with the drawings for a browser."""

from __future__ import annotations

from pathlib import Path

from secateur.engine.files import write_whole
from secateur.reports.document import Document
from secateur.reports.html import render_html
from secateur.reports.markdown import render_markdown


def write_document(document: Document, markdown: Path, page: Path) -> None:
    """Write one description in both forms; the Markdown refers to the page for the drawings."""
    write_whole(markdown, render_markdown(document, page.name))
    write_whole(page, render_html(document))
