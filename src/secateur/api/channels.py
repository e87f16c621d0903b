"""``prune`` and ``graph`` for any module: spaces from one run, cuts verified against masks."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, pairwise
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from secateur.api.blocks import BlockDecision, blocks_decided
from secateur.api.outputs import PruneResult
from secateur.api.telling import REASONS, achieved_by, with_reasons
from secateur.budgets import Target, parse_target, ratio_target
from secateur.budgets.channels import Units, choose
from secateur.budgets.targets import OF_NETWORKS
from secateur.budgets.timed import Timed
from secateur.errors import InternalError, RequestError, refuse, validated
from secateur.evidence.batches import Batches
from secateur.evidence.losses import losses_of
from secateur.graph.host import Batch, Host, Literal
from secateur.graph.modules import ModuleHost
from secateur.graph.spaces import ChannelSpace, Gone, Graph, build
from secateur.graph.tape import record
from secateur.graph.verify import Verdict, faults, verify
from secateur.meters.memory import MemoryWatch
from secateur.methods.blocks import BlockMethod
from secateur.methods.channels import ChannelStudy, GraphMethod
from secateur.methods.registry import DEFAULT_ON_GRAPH, make_graph_method

PARTS = ("graph", "verify", "choose", "mend", "cut")


class ModuleRequest(BaseModel):
    """What a prune of a module can be asked, in the words of a prune of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = DEFAULT_ON_GRAPH
    ratio: float | None = None
    target: tuple[str, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)
    seed: int = Field(0, ge=0)
    tolerance: float = Field(0.02, ge=0)
    data: Any = None
    loss: Any = None

    @property
    def wanted(self) -> Target:
        """The one target."""
        found = [*([] if self.ratio is None else [ratio_target(self.ratio)]), *map(parse_target, self.target)]
        if len(found) != 1:
            hint = "give ratio=0.5, or target=['flops=50%']"
            refuse("no-target", "a prune of a module", f"{len(found)} targets", hint)
        if found[0].measure not in OF_NETWORKS:
            hint = f"name one of {', '.join(OF_NETWORKS)}"
            refuse("bad-target", f"target {found[0]}", "only language models are measured in it", hint)
        return found[0]


@dataclass(frozen=True)
class ModuleResult(PruneResult):
    """What ``prune`` did to a module.

    Attributes:
        removed: units that went, by the name of their space.
        refused: spaces that were not cut because cutting was found unsound or not allowed, with the reasons.
        parts: seconds by part: graph, verify, choose, mend, cut.
        notes: what the method says of how it decided.
    """

    removed: Mapping[str, Sequence[int]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


def graph(module: nn.Module, example_inputs: Batch) -> Graph:
    """The coupled channels of a module.

    Args:
        module: any module; it is not touched.
        example_inputs: a tensor, positional arguments, or arguments by name. Axes of the inputs and outputs stay.
    """
    return build(record(module, example_inputs))


def prune_module(module: Any, example_inputs: Batch, values: Mapping[str, Any], inplace: bool = False) -> ModuleResult:
    """Cut a module; see :func:`secateur.prune`.

    Args:
        module: any module; changed only with ``inplace``.
        example_inputs: what it is run on.
        values: fields of :class:`ModuleRequest`.
        inplace: cut this very module.

    Raises:
        RequestError: what is asked for is no module, unknown or impossible.
        InternalError: the cut module would not compute what the uncut one does with the same channels silenced.
    """
    if not isinstance(module, nn.Module):
        refuse(
            "no-module", "example_inputs", f"the model is {type(module).__name__}, no module", "pass the module itself"
        )
    request = validated(ModuleRequest, values, "a prune of a module")
    method, _ = make_graph_method(request.method, request.options), request.wanted  # refused before anything runs
    device = next((tensor.device for tensor in chain(module.parameters(), module.buffers())), None)
    batches = calibration(method, request, example_inputs, device)
    clock = [time.perf_counter()]
    with MemoryWatch() as memory:
        host = ModuleHost(module, example_inputs)
        decision = decided(host, example_inputs, request, method, batches, clock)
        result = _smaller(host, decision, inplace)
        clock.append(time.perf_counter())
    return ModuleResult(
        method=method.name,
        requested={"target": str(request.wanted), "options": method.model_dump(mode="json", exclude_unset=True)},
        achieved=dict(decision.achieved),
        perplexity=None,
        seconds=round(clock[-1] - clock[0], 3),
        peak_rss_bytes=memory.peak,
        output=None,
        layout="module",
        loads_in={},
        seed=request.seed,
        model=result,
        removed=decision.removed,
        refused=decision.refused,
        parts={part: end - start for part, (start, end) in zip(PARTS, pairwise(clock), strict=True)},
        notes=decision.notes,
    )


def _smaller(host: ModuleHost, decision: Decision | BlockDecision, inplace: bool) -> nn.Module:
    if isinstance(decision, BlockDecision):
        if inplace:
            return host.bypassed_in_place(decision.depth, decision.gone)
        return copy.deepcopy(host.bypassed(decision.depth, decision.gone).module)
    if inplace:
        host.write(decision.mended)
    small = host.cut_in_place if inplace else host.with_tensors(decision.mended).cut
    return small(decision.graph, decision.gone, decision.literals)


@dataclass(frozen=True)
class Decision:
    """What is to be done to a network.

    Attributes:
        graph: its channels.
        removed: units that go, by space.
        literals: what is known of attributes that may hold a size.
        mended: new values of what stays.
        refused: spaces that are not cut, with the reasons.
        latency: what was measured to remain of it, as a share; None where that was not asked for.
        notes: what the method says of how it decided.
    """

    graph: Graph
    removed: Units
    literals: frozenset[Literal]
    mended: Mapping[str, Tensor]
    refused: Mapping[str, str]
    latency: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gone(self) -> Gone:
        return self.graph.gone(self.removed)

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """Units of every space that is cut, before and after."""
        before = {space.name: space.size for space in self.graph.spaces}
        return {name: (before[name], before[name] - len(gone)) for name, gone in self.removed.items()}

    @cached_property
    def achieved(self) -> Mapping[str, float]:
        """What remains of every measure, and what there was."""
        return achieved_by(self.graph, self.removed, self.latency)


def decided(
    host: Host,
    example_inputs: Batch,
    request: ModuleRequest,
    method: GraphMethod | BlockMethod,
    batches: Batches | None,
    clock: list[float],
) -> Decision | BlockDecision:
    """Find what a network can lose, check each part of it, let a method choose and mend, and check what it chose.

    Args:
        clock: the time is appended at the end of every part of the work: graph, verify, choose, mend.

    Raises:
        RequestError: the target is out of reach, or the method cannot be used here.
        InternalError: the cut network would not compute what the uncut one does with the same channels silenced.
    """
    losses = losses_of(request.loss)
    if isinstance(method, BlockMethod):
        wanted, tick = request.wanted, lambda: clock.append(time.perf_counter())
        return blocks_decided(
            host, example_inputs, method, wanted, request.tolerance, batches, losses, request.seed, tick
        )
    found = build(host.network)
    clock.append(time.perf_counter())
    bench = host.bench(found, request.seed)
    verdict = verify(bench, request.seed)
    clock.append(time.perf_counter())
    spaces, refused = _allowed(found, verdict, method)
    generator = torch.Generator().manual_seed(request.seed)
    study = ChannelStudy(found, spaces, host, generator, example_inputs, batches, losses)
    pick = Timed(
        partial(_choose, found, method, request.tolerance),
        lambda units: host.runner(found, found.gone(units), verdict.literals),
        request.tolerance,
    )
    while True:
        try:
            units = method.decide(study, request.wanted, pick)
        except RequestError as error:
            raise with_reasons(error, "spaces", refused.values(), _unruled(found)) from error
        reason, _ = bench.compare(found.gone(units), verdict.literals)
        if not reason:
            break
        bad = faults(bench, units, verdict.literals)
        if not bad:
            raise InternalError("cut-not-masked", f"method {method.name}", reason, "nothing was changed")
        refused |= bad
        study = replace(study, spaces=[space for space in study.spaces if space.name not in bad])
    clock.append(time.perf_counter())
    mended = method.mend(study, units)
    clock.append(time.perf_counter())
    return Decision(found, units, verdict.literals, mended, refused, pick.latency, study.notes)


def calibration(
    method: GraphMethod | BlockMethod, request: ModuleRequest, example: Batch, device: torch.device | None = None
) -> Batches | None:
    """Calibration data, where there is some; what the method needs must be there."""
    if request.data is None:
        if method.data == "none":
            return None
        wanted = "data=[batch, ...]" if method.data == "inputs" else "data=[(inputs, labels), ...]"
        refuse("no-data", f"method {method.name}", "it needs data, and none was given", wanted)
    return Batches(request.data, example, method.data == "labels", device)


def _unruled(found: Graph) -> list[str]:
    """Operators that freeze what they touch, in a sentence."""
    return [f"operators without a rule: {', '.join(sorted(found.unknown)[:REASONS])}"] if found.unknown else []


def _choose(
    found: Graph, method: GraphMethod, tolerance: float, scores: Mapping[str, Tensor], target: Target, way: float = 1.0
) -> Units:
    return choose(found, scores, target, method.ranking, method.floor, method.quantum, tolerance, way)


def _allowed(found: Graph, verdict: Verdict, method: GraphMethod) -> tuple[list[ChannelSpace], dict[str, str]]:
    """Spaces that may be cut, and why the others may not."""
    spaces, refused = [], dict(verdict.refused)
    for space in map(found.space, verdict.sound):
        if space.flags and method.statistics == "keep":
            refused[space.name] = f"a statistic over it would change ({space.flags[0]}); statistics=change allows that"
        else:
            spaces.append(space)
    return spaces, refused
