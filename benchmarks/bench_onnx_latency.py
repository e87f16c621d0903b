"""Latency of a ResNet-50 in onnxruntime, cut to shares of its FLOPs through the door for ONNX files.

The network is exported by torch with random weights. Every cut file is timed in one session beside the uncut one, in
alternation; one thread. What the cut file computes was checked when it was written.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur
from common import Goal, Result, conditions, parser, record, work_folder
from secateur.budgets.timed import relative_latency
from secateur.graph.onnx_files import read_onnx, running
from secateur.graph.onnx_host import OnnxHost

LEFT = (0.75, 0.5, 0.25)
QUANTUM = 8
"""What stays of a layer is a multiple of it: kernels of a CPU work on so many channels at once."""
STEP = 0.1
"""How far the share of the latency that remains may lie above that of the FLOPs, to be in step with it."""


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions with a shortcut."""

    def __init__(self, entering: int, inner: int, stride: int) -> None:
        super().__init__()
        sizes = ((entering, inner, 1, 1), (inner, inner, 3, stride), (inner, 4 * inner, 1, 1))
        layers: list[nn.Module] = []
        for a, b, kernel, step in sizes:
            layers += [nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.branch = nn.Sequential(*layers[:-1])
        plain = stride == 1 and entering == 4 * inner
        down = [nn.Conv2d(entering, 4 * inner, 1, stride, bias=False), nn.BatchNorm2d(4 * inner)]
        self.shortcut = nn.Identity() if plain else nn.Sequential(*down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def resnet50(depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> nn.Module:
    """The shape of ResNet-50 with random weights."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    entering = width
    for stage, depth in enumerate(depths):
        for number in range(depth):
            inner = width * 2**stage
            blocks.append(Bottleneck(entering, inner, 2 if stage and not number else 1))
            entering = 4 * inner
    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(entering, 1000)]
    return nn.Sequential(*stem, *blocks, *head).eval()


def export(model: nn.Module, size: int, path: Path) -> None:
    image = torch.randn(1, 3, size, size)
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "opset_version": 17}
    torch.onnx.export(model, (image,), str(path), dynamo=False, **names)


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    for needed in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(needed) is None:
            sys.exit(f"{needed} is not installed: pip install 'secateur[onnx]'")
    import onnxruntime

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    where = conditions() | {"onnxruntime": onnxruntime.__version__}
    size, rounds = (32, 3) if arguments.small else (224, 9)
    rows: dict[str, dict[str, float]] = {}
    with work_folder(arguments.work) as folder:
        whole = folder / "resnet50.onnx"
        export(resnet50((1, 1, 1, 1), 16) if arguments.small else resnet50(), size, whole)
        source = read_onnx(whole)
        inputs = OnnxHost.of(source).first
        for left in LEFT:
            small = folder / f"resnet50-{left:.0%}.onnx"
            options = {"ranking": "local", "quantum": 1 if arguments.small else QUANTUM}
            result = secateur.prune(
                whole, output=small, method="spa", target=[f"flops={left:.0%}"], tolerance=0.05, options=options
            )
            told = result.achieved
            flops = told["flops"] / told["flops_before"]
            both = (running(source, inputs), running(read_onnx(small), inputs))
            wall, latency = (relative_latency(*both, rounds, clock) for clock in (time.perf_counter, time.process_time))
            rows[f"{left:.0%}"] = {
                "flops": round(flops, 4),
                "latency": round(latency, 4),
                "latency_by_the_clock": round(wall, 4),
                "params": round(told["params"] / told["params_before"], 4),
                "bytes": round(told["bytes"] / told["bytes_before"], 4),
                "prune_s": result.seconds,
            }
            print(left, rows[f"{left:.0%}"], flush=True)
    goals = [
        Goal(
            f"ResNet-50 shape cut to {row['flops']:.0%} of its FLOPs: latency in onnxruntime beside the uncut file",
            f"<= {row['flops'] + STEP:.2f} x",
            f"{row['latency']:.2f} x ({row['latency_by_the_clock']:.2f} x by the clock)",
            row["latency"] <= row["flops"] + STEP,
        )
        for row in rows.values()
    ]
    notes = [
        f"exported by torch.onnx, random weights, one image of {size} x {size}, onnxruntime on the CPU with its "
        f"fusions, one thread; the median over {rounds} rounds of the ratio of both, in alternating order; in "
        "processor time, which other work on the machine disturbs less, and by the clock",
        f"`spa`, `ranking=local`, `quantum={QUANTUM}`: the same share of every layer",
    ]
    title = "latency of cut ONNX files against their FLOPs"
    record(Result("onnx_latency", title, where, goals, {"rows": rows}, notes), arguments.small)


if __name__ == "__main__":
    main()
