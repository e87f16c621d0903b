"""Taps: hooks on the modules of one block that feed what they see into evidence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.engine.activations import real
from secateur.engine.blocks import BlockRunner
from secateur.engine.pairs import Pairs, head_inputs
from secateur.errors import InternalError, refuse
from secateur.evidence import Influence, Later, Moments, Routes, Samples, Total
from secateur.families import Block, Packed
from secateur.spaces.weights import every_input

STREAM, SAMPLES, INFLUENCE, ENDS, ROUTES = "stream", "samples", "influence", "ends", "routes"
Collector = Moments | Samples
Behind = tuple[tuple[int, int] | None, Later]
_OF_INPUTS = ("gram", "moments", "samples")


class Enough(Exception):  # noqa: N818  (a signal, not an error)
    """Raised where nothing that comes later in the block is looked at."""


class Taps:
    """What a method's evidence asks for at one place, gathered while the block runs.

    ``stream`` is the Gram of every norm's input, named by the norm's role; ``ROLE.gram`` and ``ROLE.moments`` are
    taken from the inputs of a role's matrix (``down.gram``, or ``experts.E.down.gram`` of every expert, see
    :class:`secateur.evidence.Moments` for the names); ``samples`` and ``ROLE.samples`` are rows of the same signals
    (:class:`secateur.evidence.Samples`); ``inputs.KIND`` is that kind at every distinct input of the block's matrices
    (:func:`secateur.spaces.weights.input_key` names them); ``influence`` compares what enters and leaves the block;
    ``ends`` is what enters it at the last token of every window, [windows, width];
    ``routes`` is where the router of a block with experts sends its tokens (:class:`secateur.evidence.Routes`, as
    ``router.coactivation`` and ``router.mass``);
    ``ROLE.cross`` and ``ROLE.target`` hold the dense model against it (:class:`secateur.engine.pairs.Pairs`).

    Args:
        runner: whose block runs.
        block: which; None for the stem, whose final norm and head have inputs.
        wanted: the names above; those of roles that are not there are passed over.
        behind: where other processes hold the windows in front, how many rows samples see there (of signals with
            and without windows, where that is known), and what keeps sums until theirs come.
    """

    def __init__(
        self, runner: BlockRunner, block: Block, wanted: Collection[str], behind: Behind | None = None
    ) -> None:
        self._runner, self._block, self._architecture = runner, block, runner.architecture
        self.wanted = sorted(wanted)
        self._before: tuple[int, int] | None = (0, 0) if behind is None else behind[0]
        self._later = None if behind is None else behind[1]
        self._influence = Influence() if INFLUENCE in wanted and block is not None else None
        self._ends: list[Tensor] | None = [] if ENDS in wanted and block is not None else None
        experts = 0 if block is None else self._architecture.sizes.blocks[block].experts
        self._routes = Routes(experts, runner.device, self._later) if ROUTES in wanted and experts else None
        self._at_norms: dict[str, list[Collector]] = {}
        self._inputs: dict[str, list[Collector]] = {}
        self._stacked: dict[str, Packed] = {}
        wanted = every_input(self._architecture, block, wanted)
        self._modules: dict[str, nn.Module] = {}
        self.roles = frozenset(role for role in (name.rpartition(".")[0] for name in wanted) if role)
        self.pairs = Pairs(runner, block, wanted, self._later)
        for role in ["final_norm"] if block is None else self._architecture.norms_on_stream(block):
            kinds = (("gram", STREAM), ("samples", SAMPLES))
            width = self._architecture.sizes.residual
            self._at_norms[role] = [self._collector(width, kind) for kind, name in kinds if name in wanted]
        for name in sorted(wanted):
            role, _, kind = name.rpartition(".")
            if role and kind in _OF_INPUTS:
                self._tap_inputs(role, kind)

    def _collector(self, width: int, kind: str, routed: bool = False) -> Collector:
        if kind == "samples":  # how many tokens visit an expert is known only at the end
            return Samples(start=None if routed and self._later is not None else self._before, later=self._later)
        return Moments(width, self._runner.device, kind == "gram", self._later)

    def _tap_inputs(self, role: str, kind: str) -> None:
        if self._block is None and role == "head":  # also one that is tied, which is no tensor of its own
            if not self._architecture.family.has_head:
                return
            self._inputs.setdefault(role, []).append(self._collector(self._architecture.sizes.residual, kind))
            return
        for packed in self._architecture.packed_of(self._block):
            for canonical in packed.canonical:
                tensor = self._architecture.tensors[canonical]
                if (tensor.role, tensor.kind) != (role, "weight"):
                    continue
                key = role if tensor.expert is None else f"experts.{tensor.expert}.{role}"
                width = self._architecture.shapes[canonical][1]
                self._inputs.setdefault(key, []).append(self._collector(width, kind, tensor.expert is not None))
                if packed.stacked:
                    self._stacked[role] = packed
                else:
                    self._modules[key] = self._runner.model.get_submodule(packed.name.rpartition(".")[0])

    @property
    def collectors(self) -> list[Collector | Pairs | Routes]:
        routes = [] if self._routes is None else [self._routes]
        return [*chain.from_iterable((*self._at_norms.values(), *self._inputs.values())), *routes, self.pairs]

    @property
    def of_modules(self) -> bool:
        """Whether the inputs of modules are all that is looked at."""
        others = (
            any(self._at_norms.values()),
            self._stacked,
            self._influence,
            self._routes,
            self._ends is not None,
            self.pairs.wanted,
        )
        return bool(self._modules) and not any(others)

    @contextmanager
    def open(self, stop: bool = False, there: Tensor | None = None) -> Iterator[None]:
        """Gather from every call of the block inside.

        Args:
            stop: raise ``Enough`` once every tapped module was called, which a block does once.
            there: where the windows have tokens, if some are shorter than others.
        """
        if there is not None and (self._stacked or self._routes is not None):
            found = "its texts differ in length, and what experts see of them is not told apart from nothing"
            refuse("experts", "statistics of a model with experts", found, "texts of one length")
        left = set(self._modules)

        def enough(key: str) -> None:
            left.discard(key)
            if stop and not left:
                raise Enough

        with ExitStack() as stack:
            for role, collectors in self._at_norms.items():
                norm = self._runner.norm_on_stream(role, self._block)
                for collector in collectors:
                    stack.enter_context(_fed(norm, collector.add, there))
            for key, module in self._modules.items():
                for collector in self._inputs[key]:
                    stack.enter_context(_fed(module, collector.add, there))
                stack.callback(module.register_forward_pre_hook(lambda *_, key=key: enough(key)).remove)
            if self._routes is not None:
                router = self._runner.model.get_submodule(self._architecture.module_of("router", self._block))
                stack.callback(router.register_forward_hook(self._see_routes).remove)
            if self._stacked:
                stack.enter_context(self._runner.experts_one_by_one())
                places = {role: self._parameter(packed) for role, packed in self._stacked.items()}
                stack.enter_context(_Experts(places, self._inputs))
            yield

    def _see_routes(self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Routers of stock classes give their logits, the weights of the chosen experts, and which those are."""
        assert self._routes is not None
        self._routes.add(output[2], output[1])

    def _parameter(self, packed: Packed) -> nn.Parameter:
        return self._runner.parameter(packed)

    def see_stem(self, signal: Tensor, dense: tuple[BlockRunner, Tensor] | None) -> None:
        """Take note of what the last block gives, to the final norm and to the head, where there are tokens."""
        for collector in self._at_norms["final_norm"]:
            collector.add(signal)
        for collector in self._inputs.get("head", ()):
            collector.add(head_inputs(self._runner, signal))
        if dense is not None and self.pairs.wanted:
            self.pairs.see_head(head_inputs(*dense), head_inputs(self._runner, signal))
            self.pairs.add()

    def compare(self, before: Tensor, after: Tensor, there: Tensor | None = None) -> None:
        """Take note of what entered and what left the block."""
        if self._influence is not None:
            one, other = (signal if there is None else real(signal, there)[None] for signal in (before, after))
            self._influence.add(one, other)
        if self._ends is not None:
            last = -1 if there is None else there.sum(1) - 1
            self._ends.append(before[torch.arange(len(before), device=before.device), last].clone())

    def close_shard(self) -> None:
        """End a logical shard of the data."""
        for collector in self.collectors:
            collector.close_shard()

    @property
    def totals(self) -> list[Total]:
        """All sums over shards, in an order that every process has them in."""
        return [total for each in self.collectors if not isinstance(each, Samples) for total in each.totals]

    def parts(self) -> list[list[Tensor]]:
        """What is no sum over shards, for the process that decides: rows, and what is summed batch by batch."""
        samples = [each.part() for each in self.collectors if isinstance(each, Samples)]
        return [*samples, [] if self._influence is None else self._influence.parts, self._ends or []]

    def join(self, others: Sequence[Sequence[Sequence[Tensor]]]) -> None:
        """Go on with the parts of the processes behind this one, in their order."""
        samples = [each for each in self.collectors if isinstance(each, Samples)]
        for index, each in enumerate(samples):
            each.join([parts[index] for parts in others])
        for *_, influence, ends in others:
            if self._influence is not None:
                self._influence.parts += influence
            if self._ends is not None:
                self._ends += ends

    def evidence(self) -> dict[str, Tensor]:
        """Everything gathered, by name."""
        found: dict[str, Tensor] = {}
        for role, collectors in self._at_norms.items():
            for collector in collectors:
                found.update({role: collector.second} if isinstance(collector, Moments) else collector.named(role))
        for key, collectors in self._inputs.items():
            for collector in collectors:
                found.update(collector.named(key))
        found.update(self.pairs.evidence())
        if self._routes is not None:
            found.update(self._routes.named("router"))
        if self._influence is not None:
            found.update(self._influence.named())
        if self._ends is not None:
            found[ENDS] = torch.cat(self._ends)
        where = "the stem" if self._block is None else f"block {self._block}"
        for name, tensor in found.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor.sum()) and not tensor.isfinite().all():
                told = f"sums of products of its signals ({name}) are beyond float32"
                refuse("not-finite", f"what was seen in {where}", told, "look at the checkpoint: it has huge outliers")
        return found


@contextmanager
def _fed(module: nn.Module, take: Callable[[Tensor], None], there: Tensor | None) -> Iterator[None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        take(real(inputs[0], there))

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _Experts(TorchFunctionMode):
    """Sees the products with one expert's slice of a stacked parameter, where no module stands to be hooked."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], inputs: Mapping[str, list[Collector]]) -> None:
        super().__init__()
        self._places = {p.untyped_storage().data_ptr(): (role, p) for role, p in parameters.items()}
        self._inputs = inputs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("linear", "matmul", "__matmul__") and len(args) > 1 and isinstance(args[1], Tensor):
            weight = args[1]
            found = self._places.get(weight.untyped_storage().data_ptr())
            if found is not None and weight.ndim == 2:
                role, parameter = found
                expert = weight.storage_offset() // parameter.stride(0)
                for collector in self._inputs[f"experts.{expert}.{role}"]:
                    collector.add(args[0])
            elif found is not None:
                raise InternalError("experts", f"the inputs of {found[0]}", "the experts do not run one by one")
        return func(*args, **(kwargs or {}))
