"""Documents as one self-contained HTML file: styles and drawings inside, nothing loaded from anywhere.

The page names no other file, and its content security policy forbids what it might; it follows the reader's light or
dark setting, prints, and is marked up for screen readers (language, headings, header cells, drawings in words with
their numbers beside them). Without matplotlib the numbers stand alone, and a line says how to get the drawings.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from secateur.plans import Chart
from secateur.reports.document import Charts, Document, Table
from secateur.reports.plots import HINT, can_draw, draw
from secateur.reports.words import numbers
from secateur.version import __version__

if TYPE_CHECKING:
    from markupsafe import Markup

_TABLE = """\
<div class="wide"><table{% if part.numbers %} class="numbers"{% endif %}>
<caption>{{ part.caption }}</caption>
<thead><tr>{% for name in part.head %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for row in part.rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody></table></div>"""


def render_html(document: Document) -> str:
    """A document as the text of an HTML file; every word of it is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string((files("secateur.reports") / "page.html.j2").read_text(encoding="utf-8"))
    rows = environment.from_string(_TABLE)

    def table(part: Table) -> Markup:
        return Markup(rows.render(part=part))  # rendered by a template that escapes

    def drawing(chart: Chart, identity: str) -> Markup:
        return Markup(draw(chart, identity))  # escapes every word itself

    drawn = can_draw()
    wanted = any(isinstance(part, Charts) for section in document.sections for part in section.parts)
    context: dict[str, Any] = {"table": table, "draw": drawing if drawn else None, "numbers": numbers}
    context["hint"] = HINT if wanted and not drawn else ""
    return template.render(document=document, version=__version__, **context) + "\n"
