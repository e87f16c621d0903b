"""A document as two files: Markdown for whoever reads text, HTML with the drawings for a browser."""

from __future__ import annotations

from pathlib import Path

from secateur.reports.document import Document
from secateur.reports.html import render_html
from secateur.reports.markdown import render_markdown


def write_document(document: Document, markdown: Path, page: Path) -> None:
    """Write one description in both forms; the Markdown refers to the page for the drawings."""
    markdown.write_text(render_markdown(document, page.name), encoding="utf-8")
    page.write_text(render_html(document), encoding="utf-8")
