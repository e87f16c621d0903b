"""The self-check: what a family claims is tried on a small random model, and only what holds is believed.

Three questions, all in float64 throughout: do the logits stay when the units of every space are permuted; is the
model with one unit of every space silenced the same function as the one from which it is cut; and is the model without
a block the one whose block is passed by. A family that has the axes of a space wrong fails the first, one that misses
that a stock class computes with a size (attention scaled by the number of heads, norms over what is cut, slopes that
depend on the number of heads) fails the second, one that misses that a block knows its place fails the third.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from secateur.cuts.apply import EMBEDDING, HEAD, cut_place, select
from secateur.cuts.stream import SHARED
from secateur.engine.blocks import BlockRunner
from secateur.errors import SecateurError
from secateur.families import Architecture, Family, Kind, Layout, Sizes, resized
from secateur.families.limits import problems, refusals
from secateur.families.roles import TABLES, writes_stream
from secateur.inference.anatomy import random_weights, token_ids
from secateur.inference.precise import Precise
from secateur.inference.specimen import Raw, seeded
from secateur.plans import Plan
from secateur.spaces import all_spaces

TOLERANCE: Final = 1e-8
"""Largest relative difference of logits that counts as none; equal functions agree to 1e-12."""
_DOES_SOMETHING: Final = 1e-6

Tensors = Mapping[str, Tensor]


def difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference, relative to the largest value; infinite where there is a NaN."""
    error = float((expected - found).abs().max() / expected.abs().max())
    return error if error == error else float("inf")


class SelfCheck:
    """A family on trial.

    Args:
        raw: configuration of a small model.
        family: what is claimed of it.

    Raises:
        RequestError: the family does not fit the stock class.
    """

    def __init__(self, raw: Raw, family: Family) -> None:
        self.architecture = Architecture(raw, family)
        weights = random_weights(self.architecture.stock_shapes)
        if self.architecture.sizes.tied:
            weights = {**weights, **self._tied(weights)}
        shapes = self.architecture.shapes
        self.tensors = {
            name: tensor.contiguous()
            for packed in self.architecture.packed.values()
            for name, tensor in packed.unpack(weights[packed.name], shapes).items()
        }
        self.rest = {name: weights[name] for name in self.architecture.unmapped}

    def _tied(self, weights: Tensors) -> dict[str, Tensor]:
        names = {p.canonical[0]: n for n, p in self.architecture.packed.items()}
        return {names[HEAD]: weights[names[EMBEDDING]]} if HEAD in names else {}

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds of spaces there are: query heads are one of their own where one key/value head serves all."""
        single = all(block.kv == 1 for block in self.architecture.sizes.blocks)
        return ("ffn", "heads" if single else "kv", "residual", "blocks")

    # -- running ---------------------------------------------------------------------------------------------------

    def _runner(self, architecture: Architecture, tensors: Tensors, rest: Tensors | None = None) -> BlockRunner:
        runner = BlockRunner(architecture, torch.float64, torch.device("cpu"), self.rest if rest is None else rest)
        for place in architecture.places:
            runner.load(place, tensors)
        return runner

    def _logits(self, architecture: Architecture, tensors: Tensors, rest: Tensors | None = None) -> Tensor:
        runner = self._runner(architecture, tensors, rest)
        with torch.no_grad(), Precise():
            found: Tensor = runner.model(input_ids=token_ids(), use_cache=False).logits
        return found

    @cached_property
    def logits(self) -> Tensor:
        """Of the small model as it is."""
        return self._logits(self.architecture, self.tensors)

    def replay(self) -> str | None:
        """Why the blocks cannot be run one by one, None if they can."""
        try:
            runner = self._runner(self.architecture, self.tensors)
            with Precise():
                hidden, calls = runner.capture(token_ids())
                for block, call in enumerate(calls):
                    hidden = runner.run(block, hidden, call)
                found = runner.outputs(token_ids(), hidden)
        except Exception as error:  # whatever a stock class trips over
            return f"its blocks do not run one by one ({_short(error)})"
        gap = difference(self.logits, found)
        return None if gap < TOLERANCE else f"its blocks run one by one give other logits (off by {gap:.1g})"

    # -- questions -------------------------------------------------------------------------------------------------

    def trouble(self, kind: Kind, layout: Layout) -> str | None:
        """Why a layout must not cut a kind of space, None where all checks hold."""
        reasons = refusals(self.architecture, kind, layout)
        if reasons:
            return reasons[0]
        try:
            if kind != "blocks":
                found = self.permuted(kind)
                if found is not None:
                    return found
            return self._cut_differs(kind, layout)
        except SecateurError as error:
            return f"the cut model cannot be built ({error.found})"
        except Exception as error:
            return f"the cut model does not run ({_short(error)})"

    def permuted(self, kind: Kind) -> str | None:
        """Why the units of a kind are not interchangeable, None where they are."""
        generator, orders = seeded(3), {}
        for space in all_spaces(self.architecture.sizes, kind):
            orders[space.name] = torch.randperm(space.size, generator=generator)
        moved = {name: select(self.architecture, name, t, orders) for name, t in self.tensors.items()}
        if self.architecture.sizes.tied:
            moved.pop(HEAD, None)
        error = difference(self.logits, self._logits(self.architecture, moved))
        return None if error < TOLERANCE else f"a permutation of its units changes the logits (by {error:.1g})"

    def _cut_differs(self, kind: Kind, layout: Layout) -> str | None:
        for plan in self._plans(kind, layout):
            target = resized(self.architecture, plan.after, plan.blocks if kind == "blocks" else None, layout)
            if not self._alike(plan, target):
                return "which blocks have experts follows from their number, in a way that is not known"
            if target.sizes != plan.after:
                return "the configuration cannot hold the size"
            expected = self._masked(plan)
            if difference(self.logits, expected) < _DOES_SOMETHING:
                return "its units do nothing in the small model, so nothing can be checked"
            found = self._logits(target, self._cut(plan, target), self._renumbered_rest(plan))
            error = difference(expected, found)
            if not error < TOLERANCE:
                return f"the model with units silenced and the cut one differ (by {error:.1g})"
        return None

    def _alike(self, plan: Plan, target: Architecture) -> bool:
        """Whether the stock class builds every surviving block of the sort it was."""
        if "blocks" not in plan.kept:
            return True
        sizes = self.architecture.sizes.blocks
        return [sizes[old] for old in plan.blocks] == list(target.sizes.blocks)

    def _admitted(self, kind: Kind, layout: Layout, base: Sizes) -> Sizes:
        """The sizes with the fewest units gone that the layout admits."""
        present = base.size(kind)
        for size in range(present - 1, max(0, present - 17), -1):
            sizes = base.resized(kind, size)
            if not problems(self.architecture, sizes, 8, layout) and self._builds(sizes, layout):
                return sizes
        return base.resized(kind, present - 1)

    def wants_heads_to_divide(self) -> bool:
        """Whether the stock class takes only widths of the stream that the number of heads divides."""
        sizes, heads = self.architecture.sizes.untied(), self.architecture.query_heads
        if "head" not in self.architecture.family.sizes:
            return False
        widths = range(sizes.residual - 1, max(1, sizes.residual - heads - 1), -1)
        taken = [width for width in widths if self._builds(sizes.resized("residual", width), "native")]
        return heads > 1 and taken == [width for width in widths if width % heads == 0]

    def _builds(self, sizes: Sizes, layout: Layout) -> bool:
        try:
            return resized(self.architecture, sizes, None, layout).sizes == sizes
        except SecateurError:
            return False

    def _plans(self, kind: Kind, layout: Layout) -> Iterable[Plan]:
        """Cuts of one unit, or of the fewest that the stock class admits."""
        before = self.architecture.sizes
        if kind == "blocks":
            depth = len(before.blocks)
            for gone in sorted({0, depth // 2, depth - 1}):  # without the first, every other has another number
                kept = [i for i in range(depth) if i != gone]
                yield Plan(before, before.kept_blocks(kept), {"blocks": torch.tensor(kept)})
        elif kind == "residual":
            yield from self._stream_plans(layout)
        else:
            after = self._admitted(kind, layout, before)
            generator, kept_units = seeded(4), {}
            for space, left in zip(all_spaces(before, kind), all_spaces(after, kind), strict=True):
                kept_units[space.name] = torch.randperm(space.size, generator=generator)[: left.size].sort().values
            yield Plan(before, after, kept_units)

    def _stream_plans(self, layout: Layout) -> Iterable[Plan]:
        sizes = self.architecture.sizes
        after = self._admitted("residual", layout, sizes.untied())
        count = after.residual - after.mean_free
        kept = torch.randperm(sizes.residual, generator=seeded(6))[:count].sort().values
        noise = torch.randn(sizes.residual, sizes.residual, dtype=torch.float64, generator=seeded(7))
        rotation = torch.linalg.qr(noise).Q[:, :count].contiguous()
        if not after.mean_free:
            tied = dataclasses.replace(after, tied=sizes.tied)
            yield Plan(sizes, tied, {"residual": kept})
        else:
            yield Plan(sizes, after, bases={SHARED: torch.eye(sizes.residual, dtype=torch.float64)[:, kept]})
        yield Plan(sizes, after, bases={SHARED: rotation})

    # -- masked and cut --------------------------------------------------------------------------------------------

    def _masked(self, plan: Plan) -> Tensor:
        """Logits of the dense model with what the plan removes silenced."""
        if "blocks" in plan.kept:
            return self._bypassed(set(range(len(plan.before.blocks))) - set(plan.blocks))
        silenced = dict(self.tensors)
        if plan.bases or "residual" in plan.kept:
            basis = plan.bases.get(SHARED)
            if basis is None:
                basis = torch.eye(plan.before.residual, dtype=torch.float64)[:, plan.kept["residual"]]
            projector = basis @ basis.t()
            for name, tensor in silenced.items():
                role = self.architecture.tensors[name].role
                if role in TABLES:
                    silenced[name] = tensor @ projector
                elif writes_stream(role):
                    silenced[name] = projector @ tensor
            if plan.before.tied:  # the head reads what is left of the stream, the table is projected where it writes
                return self._untied_logits(silenced)
        else:
            for name, tensor in silenced.items():
                silenced[name] = self._without(name, tensor, plan)
        return self._logits(self.architecture, silenced)

    def _untied_logits(self, tensors: Tensors) -> Tensor:
        sizes = self.architecture.sizes.untied()
        return self._logits(resized(self.architecture, sizes), {**tensors, HEAD: self.tensors[EMBEDDING]})

    def _without(self, name: str, tensor: Tensor, plan: Plan) -> Tensor:
        """A reader of units with the columns of those that go set to zero."""
        described = self.architecture.tensors[name]
        if described.role not in ("down", "out") or described.kind != "weight":
            return tensor
        count = tensor.shape[1]
        kept = dict(plan.kept)
        marks = select(self.architecture, name, torch.arange(count).expand_as(tensor), kept)[0]
        silenced = torch.zeros_like(tensor)
        silenced[:, marks] = tensor[:, marks]
        return silenced

    def _bypassed(self, gone: set[int]) -> Tensor:
        """Logits of the model in which some blocks give back what they read."""
        runner = self._runner(self.architecture, self.tensors)

        def passing(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
            read = args[0] if args else kwargs["hidden_states"]
            return (read, *output[1:]) if isinstance(output, tuple) else read

        for index in gone:
            runner.blocks[index].register_forward_hook(passing, with_kwargs=True)
        with torch.no_grad(), Precise():
            found: Tensor = runner.model(input_ids=token_ids(), use_cache=False).logits
        return found

    def _cut(self, plan: Plan, target: Architecture) -> dict[str, Tensor]:
        result = {}
        for place in (None, *plan.blocks):
            names = [t.name for t in self.architecture.tensors_of(place)]
            cut = cut_place(self.architecture, target, place, {n: self.tensors[n] for n in names}, plan)
            result.update({plan.survivors.new_name(name) or name: tensor for name, tensor in cut.items()})
        return result

    def _renumbered_rest(self, plan: Plan) -> dict[str, Tensor]:
        """What no role describes, under the names that it has after a depth cut."""
        prefix, found = self.architecture.family.blocks + ".", {}
        new = {old: index for index, old in enumerate(plan.blocks)}
        for name, tensor in self.rest.items():
            number, _, local = name.removeprefix(prefix).partition(".")
            if not name.startswith(prefix):
                found[name] = tensor
            elif int(number) in new:
                found[f"{prefix}{new[int(number)]}.{local}"] = tensor
        return found


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
