"""The reports: one description, two self-contained files, nothing of the user's read as markup."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import grid
import models
import secateur
from conftest import Checkpoints
from secateur.checkpoints import Checkpoint
from secateur.engine.journal import work_folder
from secateur.errors import InternalError
from secateur.meters.counts import count_parts
from secateur.methods.registry import checkpoint_methods
from secateur.plans import Chart, Plan, points_of
from secateur.reports.document import Charts, Document, Listing, Paragraph, Section, Table
from secateur.reports.html import render_html
from secateur.reports.markdown import render_markdown
from secateur.reports.plots import HEIGHT, HINT, WIDTH, draw
from secateur.reports.words import number

PAGE = "secateur-report.html"
_VOID = {"meta", "link", "br", "hr", "img", "input"}


class Reader(HTMLParser):
    """Checks that tags are balanced; collects text, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check_page(text: str) -> Reader:
    """Well-formed, refers to nothing outside itself, and fit for screen readers."""
    page = Reader(text)
    assert page.all("html")[0]["lang"] == "en"
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), attributes
    assert not page.all("script")
    assert not page.all("link")
    assert "url(" not in text
    assert "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for picture in page.all("svg"):
        assert picture["role"] == "img"
        assert picture["aria-label"]
    for used in page.all("use"):
        assert (used["href"] or "").removeprefix("#") in ids
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(cell["scope"] in ("col", "row") for cell in page.all("th"))
    return page


def test_report_of_a_prune(checkpoint: Checkpoints, notes: Path, held_out: Path, tmp_path: Path) -> None:
    result = secateur.prune(
        checkpoint(), method="slicegpt", ratio=0.15, data=notes, samples=8, length=16, text=held_out,
        output=tmp_path / "out",
    )  # fmt: skip
    text = (tmp_path / "out" / PAGE).read_text()
    page, words = check_page(text), (tmp_path / "out" / grid.REPORT).read_text()
    assert len(text) < 300_000
    assert result.perplexity is not None
    for said in (
        f"{result.achieved['params']:,}",
        f"{result.achieved['params_before']:,}",
        f"{result.perplexity['after']:.3f}",
        str(checkpoint()),
        "embedding",
        "attention",
        "decode tokens per second",
        "kept energy",
        "Spectrum of the residual stream",
        "method: slicegpt",
    ):
        assert said in page.text, said
        assert said in words, said
    assert len(page.all("svg")) == 2 + 3 + 2  # widths, quality and speed, the method's own


def test_no_text_no_speed(checkpoint: Checkpoints, tmp_path: Path) -> None:
    secateur.prune(checkpoint(), method="random", ratio=0.15, output=tmp_path / "out")
    page = check_page((tmp_path / "out" / PAGE).read_text())
    assert "Not measured" in page.text
    assert "What the method saw" not in page.text  # chance saw nothing


def test_a_module_is_not_named_by_its_temporary_folder(tmp_path: Path) -> None:
    secateur.prune(models.stock("llama"), method="random", ratio=0.15, output=tmp_path / "out")
    page = check_page((tmp_path / "out" / PAGE).read_text())
    assert "a module in memory" in page.text
    assert "/model" not in page.text
    assert "model" not in (tmp_path / "out" / "recipe.yaml").read_text()


@pytest.mark.parametrize("name", [*sorted(models.ALL), "tied-repeated", "sharded", "gpt2-bare"])
def test_parts_add_up(name: str, checkpoint: Checkpoints) -> None:
    source = Checkpoint.open(checkpoint(name))
    parts = count_parts(source)
    assert sum(parts.values()) == source.params
    assert all(parts[part] > 0 for part in ("embedding", "attention", "FFN", "norms"))
    assert (parts["head"] == 0) == source.architecture.sizes.tied
    assert (parts["other"] > 0) == bool(source.architecture.unmapped), "what no role describes, and nothing else"


def test_blocks_that_went_are_drawn_as_gone(checkpoint: Checkpoints, tmp_path: Path) -> None:
    secateur.prune(checkpoint(), method="random", ratio=0.2, options={"spaces": "blocks"}, output=tmp_path / "out")
    text = (tmp_path / "out" / PAGE).read_text()
    check_page(text)
    table = text.split("FFN neurons per block: FFN neurons</caption>")[1].split("</table>")[0]
    after = [int(row[1]) for row in re.findall(r"<td>(\d+)</td><td>(\d+)</td>", table)]
    assert len(after) == 3
    assert after.count(0) == 1


# -- charts of the methods -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", checkpoint_methods())
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_charts_are_bounded_and_survive_the_disk(
    name: str, family: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    cell = grid.first_cell(family, name)
    if cell.refused:
        pytest.skip(cell.refused)
    plan, _ = grid.plan_of(checkpoint(family), tmp_path / "out", **grid.arguments(cell, tmp_path))
    again = Plan.load(work_folder(tmp_path / "out"))
    assert [chart.as_dict() for chart in again.charts] == [chart.as_dict() for chart in plan.charts]
    assert (work_folder(tmp_path / "out") / "plan.json").stat().st_size < 200_000
    assert bool(plan.charts) == (name != "random")
    for chart in plan.charts:
        check_page(render_html(Document("t", "l", [Section("s", [Charts([chart])])])))


def test_spectrum_says_what_the_note_says(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """The cumulative energy at the mark is the kept energy."""
    cell = grid.Cell("llama", "slicegpt")
    plan, _ = grid.plan_of(checkpoint(), tmp_path / "out", **grid.arguments(cell, tmp_path))
    spectrum, energy = plan.charts
    assert energy.mark is not None
    assert dict(energy.series["sum"])[energy.mark[0]] == pytest.approx(plan.notes["kept_energy"], abs=2e-6)
    shares = [y for _, y in spectrum.series["eigenvalue"]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", grid.SPACES)
def test_score_charts_count_every_unit(kind: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    cell = grid.Cell("llama", "magnitude", {"spaces": kind})
    plan, _ = grid.plan_of(checkpoint(), tmp_path / "out", **grid.arguments(cell, tmp_path))
    scores = plan.charts[0].series
    sizes = {
        name: sum(y if plan.charts[0].y == "units" else y > 0 for _, y in points) for name, points in scores.items()
    }
    assert sizes["kept"] == sum(len(kept) for kept in plan.kept.values())
    units = {"ffn": 3 * 64, "kv": 3 * plan.before.blocks[0].kv, "residual": 48, "blocks": 3}[kind]
    assert sizes["kept"] + sizes["removed"] == units


def test_learning_curve_ends_where_the_note_says(checkpoint: Checkpoints, tmp_path: Path) -> None:
    plan, _ = grid.plan_of(checkpoint(), tmp_path / "out", method="prunenet", ratio=0.15, options={"episodes": 3})
    distance, reward, final = plan.charts
    assert distance.series["distance"][-1] == (3, pytest.approx(plan.notes["mean_ks"], abs=1e-5))
    assert reward.series["reward"][-1][1] == pytest.approx(plan.notes["mean_reward"], rel=1e-4)
    assert [x for x, _ in final.series["distance"]] == [0, 1, 2]


@pytest.mark.parametrize(
    "series",
    [{}, {"a": []}, {"a": [(0.0, float("nan"))]}, {"a": [(float(i), 0.0) for i in range(513)]},
     {str(i): [(0.0, 0.0)] for i in range(25)}],
)  # fmt: skip
def test_charts_without_bounds_are_refused(series: dict[str, list[tuple[float, float]]]) -> None:
    with pytest.raises(InternalError, match="chart 't'"):
        Chart("t", "x", "y", series)


def test_long_vectors_are_thinned() -> None:
    points = points_of(torch.arange(10_000))
    assert len(points) == 256
    assert points[0] == (0, 0)
    assert points[-1] == (9999, 9999)


# -- rendering -------------------------------------------------------------------------------------------------------

NASTY = "<script>alert('1')</script>|`x`*\"&\n# new [a](http://b)"


def test_everything_is_escaped() -> None:
    chart = Chart(NASTY, NASTY, NASTY, {NASTY: [(0.0, 1.0)]}, kind="bars", labels=(NASTY,))
    parts = [
        Table([NASTY, NASTY], [[NASTY, NASTY]], NASTY),
        Paragraph(NASTY),
        Listing(NASTY + "\n```"),
        Charts([chart]),
    ]
    document = Document(NASTY, NASTY, [Section(NASTY, parts)])
    page = check_page(render_html(document))
    assert page.text.count("<script>alert('1')</script>") >= 10
    words = render_markdown(document, "page.html")
    outside = words.split("````")[0] + words.split("````")[2]
    assert "<script>" not in outside
    assert re.search(r"(?<!\\)\]\(http", outside) is None
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows), rows
    assert [line for line in outside.splitlines() if line.startswith("# new")] == []


def test_a_hostile_folder_name(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "<img src=x onerror=alert(1)>")
    secateur.prune(folder, method="random", ratio=0.15, output=tmp_path / "out")
    page = check_page((tmp_path / "out" / PAGE).read_text())
    assert not page.all("img")
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "<img" not in (tmp_path / "out" / grid.REPORT).read_text().split("```")[0]


_EXTREMES: dict[str, dict[str, Any]] = {
    "one point": {"series": {"a": [(3.0, 7.0)]}},
    "constant": {"series": {"a": [(0.0, 2.0), (1.0, 2.0)]}},
    "zeros": {"series": {"a": [(0.0, 0.0), (1.0, 0.0)]}},
    "negative bars": {"series": {"a": [(0.0, -2.0), (1.0, 3.0)]}, "kind": "bars"},
    "zero bars": {"series": {"a": [(0.0, 0.0)]}, "kind": "bars"},
    "logarithm of nothing": {"series": {"a": [(0.0, 0.0), (1.0, -1.0)]}, "logarithmic": True},
    "twelve decades": {"series": {"a": [(0.0, 1e-9), (1.0, 1e3)]}, "logarithmic": True},
    "many bars": {"series": {n: [(float(i), float(i)) for i in range(512)] for n in "ab"}, "kind": "bars"},
    "many lines": {"series": {"a long name of a line " + n: [(0.0, 1.0), (1.0, 2.0)] for n in "abcdefgh"}},
    "a line for every method": {"series": {f"method-{i}:spaces=kv": [(0.0, 1.0), (1.0, 2.0)] for i in range(24)}},
    "words": {"series": {"$\\frac{$ \u540d\x00\n": [(0.0, 1.0)], "b": [(1.0, 2.0)]}, "mark": (0.0, "$<&")},
}


@pytest.mark.parametrize("name", _EXTREMES)
def test_extremes_are_drawn_inside(name: str) -> None:
    svg = draw(Chart("t", "x", "y", **_EXTREMES[name]), "i")
    page = Reader(svg)
    assert "nan" not in svg
    assert "inf" not in svg
    assert "#" not in svg.replace("#i-", "")  # no colour but the page's
    width, height = map(float, str(page.all("svg")[0]["viewbox"]).split()[2:])
    assert width == WIDTH
    assert height == HEIGHT or (height > HEIGHT and len(_EXTREMES[name]["series"]) > 8)
    places = [(a["x"], a["y"]) for _, a in page.tags if "x" in a]
    drawn = [attributes["d"] or "" for tag, attributes in page.tags if tag == "path" and "id" not in attributes]
    places += [point for d in drawn for point in re.findall(r"([-\d.]+) ([-\d.]+)", d)]
    assert places
    for x, y in places:
        assert -1 <= float(x or "nan") <= WIDTH + 1, (x, y)
        assert -1 <= float(y or "nan") <= height + 1, (x, y)


def test_drawings_depend_on_nothing_else() -> None:
    """Not on the caller's settings, which stay, nor on another drawing of the page."""
    import matplotlib

    chart = Chart("t", "x", "y", {"a": [(0.0, 1.0), (1.0, 3.0)], "b": [(0.0, 2.0)]})
    before = draw(chart, "i")
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "other", "lines.linewidth": 9}):
        kept = dict(matplotlib.rcParams)
        assert draw(chart, "i") == before
        assert dict(matplotlib.rcParams) == kept
    page = check_page(render_html(Document("t", "l", [Section("s", [Charts([chart, chart])])])))
    assert len(page.all("use")) == 2 * 5  # the points and those of the legend


def test_without_matplotlib_the_numbers_stand_alone(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    secateur.prune(checkpoint(), method="magnitude", ratio=0.15, output=tmp_path / "out")
    page = check_page((tmp_path / "out" / PAGE).read_text())
    assert not page.all("svg")
    assert page.text.count(HINT) == 1
    assert "pip install 'secateur[plots]'" in HINT
    assert len(page.all("figure")) == len([a for a in page.all("details") if "open" in a]) > 2


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0, 1234, 56_000, 7_999_744, 0.00012)] == ["0", "1234", "56k", "8M", "0.00012"]
