"""2:4 matrices run sparse on a GPU, beside the same matrices run dense: seconds of a product, by number of tokens."""

from __future__ import annotations

import statistics

import torch
from torch import nn

from common import Goal, Result, conditions, parser, record
from secateur.runtimes.semi_structured import run_sparse

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
"""Outputs and inputs of the matrices of a model of 7 billion parameters."""
TOKENS = (1, 16, 256, 4096)
GOAL = 1.0


def linear(outputs: int, inputs: int) -> nn.Linear:
    """A layer with the larger two of every four inputs."""
    layer = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    groups = layer.weight.view(-1, 4)
    groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0)
    return layer


def microseconds(layer: nn.Module, signal: torch.Tensor, rounds: int) -> float:
    """Median time of one product."""
    found = []
    for turn in range(rounds + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        layer(signal)
        end.record()
        torch.cuda.synchronize()
        if turn >= 5:
            found.append(1e3 * start.elapsed_time(end))
    return statistics.median(found)


@torch.no_grad()
def main() -> None:
    """Every shape and number of tokens."""
    arguments = parser(__doc__ or "").parse_args()
    if not torch.cuda.is_available():
        print("bench_semi_structured: not run, it needs an NVIDIA GPU (on a CPU zeros do not speed anything up)")
        return
    rounds = 5 if arguments.small else 50
    figures: dict[str, float] = {}
    for outputs, inputs in SHAPES:
        dense = linear(outputs, inputs).cuda()
        whole = nn.Sequential(linear(outputs, inputs))
        whole[0].load_state_dict(dense.state_dict())
        run_sparse(whole, torch.device("cuda"))
        for tokens in TOKENS:
            signal = torch.randn(tokens, inputs, dtype=torch.bfloat16, device="cuda")
            times = [microseconds(layer, signal, rounds) for layer in (dense, whole)]
            error = float((dense(signal) - whole(signal)).abs().max() / dense(signal).abs().max())
            assert error < 0.02, error
            name = f"{outputs}x{inputs}_{tokens}_tokens"
            figures |= {f"{name}_dense_us": round(times[0], 1), f"{name}_sparse_us": round(times[1], 1)}
            figures[f"{name}_speedup"] = round(times[0] / times[1], 2)
    best = max(value for name, value in figures.items() if name.endswith("4096_tokens_speedup"))
    goal = Goal("speed of the best product of 4096 tokens, of dense", f"> {GOAL}", f"{best}", best > GOAL)
    note = f"{torch.cuda.get_device_name()}, bfloat16, median of {rounds}"
    record(Result("semi_structured", "2:4 on a GPU", conditions(), [goal], figures, [note]), arguments.small)


if __name__ == "__main__":
    main()
