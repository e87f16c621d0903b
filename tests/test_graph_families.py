"""Language models: the graph finds by itself what the family files say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import models
from conftest import Checkpoints
from secateur.api.channels import graph
from secateur.checkpoints import Checkpoint, Folder
from secateur.graph.modules import ModuleHost
from secateur.graph.spaces import ChannelSpace
from secateur.graph.verify import verify
from secateur.spaces import BlockView, Kind, all_spaces


def marked_by_family(folder: Path, kind: Kind) -> dict[str, list[dict[str, Tensor]]]:
    """For every unit of every space of a kind, the entries of the stock tensors that go with it."""
    source = Checkpoint(Folder(folder))
    architecture = source.architecture
    dense = {place: source.read(place) for place in architecture.places}
    found = {}
    for space in all_spaces(architecture.sizes, kind):
        units = []
        for unit in range(space.size):
            marks: dict[str, Tensor] = {}
            for place, tensors in dense.items():
                blank = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
                for member in BlockView(architecture, place, blank).members(space):
                    width = range(unit * member.span, (unit + 1) * member.span)
                    member.values.index_fill_(member.axis, torch.tensor(list(width)), 1)
                marks |= {packed.name: packed.pack(blank) != 0 for packed in architecture.packed_of(place)}
            units.append({name: mark for name, mark in marks.items() if mark.any()})
        found[space.name] = units
    return found


def marked_by_graph(model: torch.nn.Module, space: ChannelSpace) -> list[dict[str, Tensor]]:
    """The same of one space of the graph."""
    parameters = dict(model.named_parameters())
    units = []
    for unit in range(space.size):
        marks: dict[str, Tensor] = {}
        for entry in space.entries:
            if entry.parameter:
                mark = marks.setdefault(entry.name, torch.zeros(parameters[entry.name].shape, dtype=torch.bool))
                mark.index_fill_(entry.dim, torch.from_numpy(entry.index[unit]), True)
        units.append(marks)
    return units


@pytest.mark.parametrize("kind", ["ffn", "kv", "residual"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_graph_and_family_file_agree(family: str, kind: Kind, checkpoint: Checkpoints) -> None:
    folder = checkpoint(family)
    model = models.load(folder)
    spaces = graph(model, {"input_ids": models.token_ids(1, 7), "use_cache": False}).spaces
    by_graph = [marked_by_graph(model, space) for space in spaces]
    wanted = marked_by_family(folder, kind)
    assert wanted
    for name, units in wanted.items():
        matches = [found for found in by_graph if _equal(found, units)]
        assert len(matches) == 1, name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_a_family_file_cuts_is_cut_soundly_as_a_module(family: str, checkpoint: Checkpoints) -> None:
    """Residual width, neurons and key/value heads: masked equals cut, norms that the code writes out included.

    Heads of gpt2 are refused: its code splits by a number that is the width of the stream as well.
    """
    folder = checkpoint(family)
    model = models.load(folder)
    inputs = {"input_ids": models.token_ids(1, 7), "use_cache": False}
    found = graph(model, inputs)
    verdict = verify(ModuleHost(model, inputs).bench(found))
    by_graph = {space.name: marked_by_graph(model, space) for space in found.spaces}
    kinds: tuple[Kind, ...] = ("residual", "ffn", "kv")
    for kind in kinds:
        for name, units in marked_by_family(folder, kind).items():
            (own,) = [space for space, marks in by_graph.items() if _equal(marks, units)]
            assert (own in verdict.sound) == (len(units) > 1 and (family, kind) != ("gpt2", "kv")), (name, own)


def _equal(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> bool:
    """Whether the units are the same, in whatever order."""

    def told(units: list[dict[str, Tensor]]) -> set[tuple[object, ...]]:
        return {
            tuple((name, tuple(mark.nonzero().flatten().tolist())) for name, mark in sorted(u.items())) for u in units
        }

    return len(found) == len(wanted) and told(found) == told(wanted)
