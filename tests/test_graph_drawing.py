"""Drawings: every operation in a box, colours by space, large networks module by module."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur
from graph_nets import NETS, net
from secateur import SecateurError
from secateur.graph.drawing import picture
from secateur.graph.layout import layered


@pytest.mark.parametrize("name", NETS)
def test_drawings_are_well_formed(name: str, tmp_path: Path) -> None:
    graph = secateur.graph(*net(name))
    drawing = graph.draw(tmp_path / "net.svg")
    root = ElementTree.fromstring(drawing.read_text(encoding="utf-8"))
    drawn = picture(graph)
    boxes = [part for part in root if part.tag.endswith("}g")]
    assert len(boxes) == len(drawn.nodes)
    assert len([part for part in root if part.tag.endswith("}path")]) == len(drawn.edges)
    assert all(start < end for start, end in drawn.edges)
    text = graph.draw(str(tmp_path / "net.dot")).read_text(encoding="utf-8")
    assert text.count(" -> ") == len(drawn.edges)
    assert text.count("[label=") == len(drawn.nodes)


def test_boxes_have_the_spaces_of_what_they_make() -> None:
    graph = secateur.graph(*net("residual"))
    names = [space.name for space in graph.spaces]
    found = {node.title: {names[space] for space in node.spaces} for node in picture(graph).nodes}
    assert found["stem"] == found["outer"] == {"stem"}
    assert found["inner"] == found["inner_norm"] == {"inner"}
    assert found["head"] == found["input"] == set()


def test_large_networks_are_drawn_by_module() -> None:
    block = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(6)]
    graph = secateur.graph(nn.Sequential(*block).eval(), torch.randn(1, 4, 3, 3))
    assert [len(picture(graph, most).nodes) for most in (18, 17, 6, 2)] == [19, 7, 7, 7]
    assert [node.title for node in picture(graph, 17).nodes] == ["input", *map(str, range(6))]


@pytest.mark.parametrize("path", ["net.png", "net", "absent/net.svg"])
def test_no_drawing(path: str, tmp_path: Path) -> None:
    with pytest.raises(SecateurError) as failure:
        secateur.graph(*net("residual")).draw(tmp_path / path)
    assert (failure.value.code, failure.value.exit_code) == ("bad-drawing", 2)
    assert not list(tmp_path.iterdir())


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 25), st.lists(st.tuples(st.integers(0, 24), st.integers(0, 24)), max_size=60))
def test_layouts_keep_nodes_apart_and_edges_downward(count: int, pairs: list[tuple[int, int]]) -> None:
    edges = [(a % count, b % count) for a, b in pairs if a % count < b % count]
    found = layered(count, edges)
    for layer in {y for _, y in found.places}:
        across = sorted(x for x, y in found.places if y == layer)
        assert all(b - a > 1 - 1e-6 for a, b in pairwise(across))
    for (start, end), route in found.routes.items():
        assert (route[0], route[-1]) == (found.places[start], found.places[end])
        assert [y for _, y in route] == list(range(route[0][1], route[-1][1] + 1))
