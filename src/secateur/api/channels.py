"""``prune`` and ``graph`` for any module: spaces from one run, cuts verified against masks."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.budgets import Target, parse_target, ratio_target
from secateur.budgets.channels import FLOPS_PER_MAC, Units, choose
from secateur.errors import InternalError, refuse
from secateur.graph.edit import cut
from secateur.graph.spaces import Graph, build
from secateur.graph.state import tensor_at
from secateur.graph.tape import Inputs, record
from secateur.graph.verify import verify
from secateur.methods.channels import ChannelStudy
from secateur.methods.registry import DEFAULT_ON_GRAPH, make_graph_method


@dataclass(frozen=True)
class ModuleResult:
    """What ``prune`` did to a module.

    Attributes:
        model: the pruned module; the one passed in with ``inplace``.
        achieved: parameters, and floating-point operations of one run on the example inputs, before and after.
        removed: units that went, by the name of their space.
        refused: spaces that were not cut because cutting was found unsound, with the reasons.
        seconds: wall time by part: graph, verify, choose, cut.
    """

    method: str
    requested: str
    model: nn.Module
    achieved: Mapping[str, int]
    removed: Mapping[str, Sequence[int]]
    refused: Mapping[str, str]
    seconds: Mapping[str, float]
    seed: int

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "model"}


def graph(module: nn.Module, example_inputs: Inputs) -> Graph:
    """The coupled channels of a module.

    Args:
        module: any module; it is not touched.
        example_inputs: a tensor, positional arguments, or arguments by name. Axes of the inputs and outputs stay.
    """
    return build(record(module, example_inputs))


def prune_module(
    module: nn.Module,
    example_inputs: Inputs,
    method: str | None = None,
    ratio: float | None = None,
    target: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    inplace: bool = False,
    seed: int = 0,
    tolerance: float = 0.02,
) -> ModuleResult:
    """Prune a module: see :func:`secateur.prune`."""
    chosen = make_graph_method(method or DEFAULT_ON_GRAPH, options or {})
    wanted = _target(ratio, target)
    clock = [time.perf_counter()]
    found = graph(module, example_inputs)
    clock.append(time.perf_counter())
    verdict, bench = verify(found, module, example_inputs, seed)
    clock.append(time.perf_counter())
    sound = [found.space(name) for name in verdict.sound]
    spaces = [space for space in sound if chosen.statistics == "change" or not space.flags]
    refused = dict(verdict.refused)
    refused.update({s.name: "a statistic over it would change; statistics=change allows that" for s in sound if s.flags})
    refused = {name: reason for name, reason in refused.items() if name not in {space.name for space in spaces}}
    study = ChannelStudy(found, spaces, lambda name: tensor_at(module, name), torch.Generator().manual_seed(seed))
    units = choose(found, chosen.score(study), wanted, chosen.ranking, chosen.floor, chosen.quantum, tolerance)
    clock.append(time.perf_counter())
    gone = found.gone(units)
    reason, _ = bench.compare(gone, verdict.literals)
    if reason:
        raise InternalError("cut-not-masked", f"method {chosen.name} on a module", reason, "nothing was changed")
    result = module if inplace else copy.deepcopy(module)
    cut(result, found, gone, verdict.literals)
    clock.append(time.perf_counter())
    parts = dict(zip(("graph", "verify", "choose", "cut"), (b - a for a, b in zip(clock, clock[1:], strict=False)), strict=True))
    return ModuleResult(chosen.name, str(wanted), result, _achieved(found, units), units, refused, parts, seed)


def _target(ratio: float | None, target: Sequence[str]) -> Target:
    found = [*([] if ratio is None else [ratio_target(ratio)]), *(parse_target(text) for text in target)]
    if len(found) != 1:
        refuse("no-target", "a prune of a module", f"{len(found)} targets", "give ratio=0.5, or target=['flops=50%']")
    return found[0]


def _achieved(found: Graph, units: Units) -> dict[str, int]:
    before, after = found.gone({}), found.gone(units)
    return {
        "params": found.costs.params(after),
        "params_before": found.costs.params(before),
        "flops": FLOPS_PER_MAC * found.costs.macs(after),
        "flops_before": FLOPS_PER_MAC * found.costs.macs(before),
    }
