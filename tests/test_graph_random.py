"""Random networks: whatever hangs together however, a cut computes what its mask does, or is refused."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from secateur.api.channels import graph, prune_module
from secateur.graph.modules import ModuleBench
from secateur.graph.verify import verify

STEPS = (
    "conv",
    "grouped",
    "depthwise",
    "norm",
    "groupnorm",
    "add",
    "concat",
    "chunk",
    "shuffle",
    "gate",
    "pixel",
    "tokens",
)


class Random(nn.Module):
    """A program over a list of feature maps of one size: every step reads some of them and adds one."""

    def __init__(self, program: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.program: list[tuple[str, int, int]] = []
        self.layers = nn.ModuleDict()
        widths = [3]
        for number, (step, first, second) in enumerate([("conv", 0, 5), *program]):
            a, b = first % len(widths), second % len(widths)
            width, key = widths[a], str(number)
            made: nn.Module | None = None
            if step == "grouped" and width % 2 == 0:
                made, width = nn.Conv2d(width, 2 * (2 + second % 3), 3, padding=1, groups=2), 2 * (2 + second % 3)
            elif step == "depthwise":
                made = nn.Conv2d(width, width, 3, padding=1, groups=width)
            elif step == "norm":
                made = nn.BatchNorm2d(width)
            elif step == "groupnorm" and width % 2 == 0:
                made = nn.GroupNorm(2, width)
            elif step == "add" and widths[b] == width and a != b:
                pass
            elif step == "concat":
                width += widths[b]
            elif step in ("chunk", "shuffle") and width % 2 == 0:
                width = width // 2 if step == "chunk" else width
            elif step == "gate":
                made = nn.Conv2d(width, width, 1)
            elif step == "pixel" and width % 4 == 0:
                pass
            elif step == "tokens":
                made = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 7), nn.GELU(), nn.Linear(7, width))
            else:
                step, width = "conv", 4 + second % 5
                made = nn.Conv2d(widths[a], width, 1)
            if made is not None:
                self.layers[key] = made
            self.program.append((step, a, b))
            widths.append(width)
        self.head = nn.Linear(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for number, (step, a, b) in enumerate(self.program):
            x, key = maps[a], str(number)
            if step in ("conv", "grouped", "depthwise", "norm", "groupnorm"):
                x = functional.silu(self.layers[key](x))
            elif step == "add":
                x = x + maps[b]
            elif step == "concat":
                x = torch.cat([x, maps[b]], 1)
            elif step == "chunk":
                one, other = x.chunk(2, 1)
                x = one * other
            elif step == "shuffle":
                n, c, h, w = x.shape
                x = x.view(n, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2)
            elif step == "gate":
                x = x * self.layers[key](x.mean((2, 3), keepdim=True)).sigmoid()
            elif step == "pixel":
                x = functional.pixel_unshuffle(functional.pixel_shuffle(x, 2), 2)
            else:
                x = x + self.layers[key](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            maps.append(x)
        return self.head(maps[-1].mean((2, 3)))


programs = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=9)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(program=programs, seed=st.integers(0, 3))
def test_random_networks(program: list[tuple[str, int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    module, inputs = Random(program).eval(), torch.randn(2, 3, 4, 4)
    found = graph(module, inputs)
    assert not found.unknown
    verdict = verify(ModuleBench(module, found, inputs, seed), seed)
    values = {"ratio": 0.3, "tolerance": 1.0, "seed": seed, "options": {"statistics": "change", "score_by": "random"}}
    result = prune_module(module, inputs, values)  # an InternalError where the cut computes something else
    assert set(result.refused) <= set(verdict.refused) | set(result.removed) | {space.name for space in found.spaces}
    assert result.model is not None
    assert result.model(inputs).shape == (2, 3)
