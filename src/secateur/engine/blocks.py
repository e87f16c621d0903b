"""Run the stock model block by block: capture the arguments it feeds each block, replay them one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.windows import PADDING
from secateur.engine.heap import give_back
from secateur.errors import InternalError
from secateur.families import Architecture, Block, Packed
from secateur.families.resizing import layer_record
from secateur.families.roles import INDICES
from secateur.families.stock import skeleton_model


@dataclass(frozen=True)
class Call:
    """Arguments of one block besides its hidden states, exactly as the stock model passed them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def fed(ids: Tensor) -> dict[str, Tensor]:
    """What the stock model is called with for token ids [batch, length], of which some may be padding."""
    there = ids != PADDING
    return {"input_ids": ids} if there.all() else {"input_ids": ids.clamp(min=0), "attention_mask": there.long()}


def given_by(output: Any) -> Tensor:
    """Logits, or the last signal of a model without a head; a loss that balances experts may stand before them."""
    found: Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return found


class _Captured(Exception):  # noqa: N818  (a signal, not an error)
    """Raised once the last block's arguments are known."""


class BlockRunner:
    """The stock model with weights only where they are needed.

    Args:
        architecture: what to build.
        dtype: data type of weights and activations.
        device: where to compute.
        rest: values of what roles do not describe (``Checkpoint.rest``); zeros where they are not given.
    """

    def __init__(
        self,
        architecture: Architecture,
        dtype: torch.dtype,
        device: torch.device,
        rest: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.architecture, self.dtype, self.device = architecture, dtype, device
        resize = layer_record(architecture) if architecture.per_layer else None
        self.model = skeleton_model(architecture.config, dtype, resize)
        self.rest = rest = rest or {}
        for name, shape in architecture.unmapped.items():
            self._assign(name, rest[name] if name in rest else torch.zeros(shape))
        for name in set(rest).intersection(architecture.buffers):
            path, _, leaf = name.rpartition(".")
            self.model.get_submodule(path)._buffers[leaf] = rest[name]  # in its own data type, as transformers keeps it
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self.blocks: nn.ModuleList = self.model.get_submodule(architecture.family.blocks)
        self._in_tuples = False  # whether the model takes the first of what a block returns, once captured

    def load(self, place: Block, tensors: Mapping[str, Tensor]) -> None:
        """Give the modules of a place their canonical tensors, converted to the compute type."""
        for packed in self.architecture.packed_of(place):
            self._assign(packed.name, packed.pack(tensors))
        if place is None:
            with torch.no_grad():
                self.model.tie_weights()

    def unload(self, place: Block) -> None:
        """Free the weights of a place."""
        for packed in self.architecture.packed_of(place):
            module, leaf = self._locate(packed)
            if leaf in module._buffers:
                continue  # an index
            shape = module.get_parameter(leaf).shape
            module._parameters[leaf] = nn.Parameter(torch.empty(shape, dtype=self.dtype, device="meta"), False)
        if place is None:
            self.model.tie_weights()  # a tied head lets go of the embedding too
        give_back()

    def _locate(self, packed: Packed) -> tuple[nn.Module, str]:
        path, _, leaf = packed.name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def parameter(self, packed: Packed) -> nn.Parameter:
        """The parameter that holds a packed tensor."""
        module, leaf = self._locate(packed)
        found: nn.Parameter = module.get_parameter(leaf)
        return found

    def _assign(self, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in INDICES:
            module._buffers[leaf] = value.to(self.device)
            return
        expected = module._parameters.get(leaf)
        if expected is None or expected.shape != value.shape:
            found = None if expected is None else list(expected.shape)
            raise InternalError("shape", f"loading {name} of shape {list(value.shape)}", f"the module holds {found}")
        sent = value.to(device=self.device, dtype=self.dtype, non_blocking=value.is_pinned())
        module._parameters[leaf] = nn.Parameter(sent, requires_grad=False)

    @torch.no_grad()
    def capture(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """Input of the first block and the arguments of every block, for token ids [batch, length].

        Only the stem needs its weights. Nothing is built by hand: masks, positions and rotary tables are what the stock
        model makes.
        """
        return self.captured(ids)

    def captured(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """The same, differentiable where gradients are on."""
        calls: list[Call] = []
        hidden: list[Tensor] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            state: Tensor = args[0] if args else kwargs["hidden_states"]
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            hidden.append(state)
            calls.append(Call(args[1:], rest))
            if len(calls) == len(self.blocks):
                raise _Captured
            # a model that takes the first of what a block returns took the first window of what it was given
            self._in_tuples |= state.ndim < hidden[0].ndim
            return (hidden[0],) if self._in_tuples else hidden[0]

        with self._blocks_replaced(record):
            try:
                self.model(**fed(ids.to(self.device)), use_cache=False)
            except _Captured:
                return hidden[0], calls
        raise InternalError("capture", "capturing the blocks' arguments", "the model did not call its blocks")

    @torch.no_grad()
    def run(self, block: int, hidden: Tensor, call: Call) -> Tensor:
        """Output of one block."""
        return self.compute(block, hidden, call)

    def compute(self, block: int, hidden: Tensor, call: Call) -> Tensor:
        """Output of one block, differentiable where gradients are on."""
        output = self.blocks[block](hidden, *call.args, **call.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def replay(self, block: int, tensors: Mapping[str, Tensor], hidden: Tensor, call: Call) -> Tensor:
        """Output of one block that holds ``tensors`` for this call only."""
        self.load(block, tensors)
        output = self.run(block, hidden, call)
        self.unload(block)
        return output

    @torch.no_grad()
    def outputs(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits of the stock model's own final norm and head, or what the norm gives where there is no head.

        Args:
            ids: token ids.
            hidden: the last block's output for them.
        """
        return self.outputs_of(ids, hidden)

    def outputs_of(self, ids: Tensor, hidden: Tensor, head: bool = True) -> Tensor:
        """The same, differentiable where gradients are on; without ``head``, never more than what it reads."""
        if "final_norm" not in self.architecture.roles_of(None):  # one without weights has no role
            with self._blocks_replaced(lambda *_, **__: (hidden,) if self._in_tuples else hidden):
                return self._whole(ids, head)
        norm = self.norm_on_stream("final_norm", None)
        given = norm.register_forward_pre_hook(lambda *_: (hidden,))
        try:
            with self._blocks_replaced(lambda *_, **__: (hidden,)):
                return self._whole(ids, head)
        finally:
            given.remove()

    def _whole(self, ids: Tensor, head: bool) -> Tensor:
        model = self.model if head else self.model.base_model
        return given_by(model(**fed(ids.to(self.device)), use_cache=False))

    @contextmanager
    def _blocks_replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        try:
            for block in self.blocks:
                block.forward = forward
            yield
        finally:
            for block in self.blocks:
                del block.forward

    @contextmanager
    def experts_one_by_one(self) -> Iterator[None]:
        """Let fused experts compute one after the other inside."""
        config = self.model.config
        before = config._experts_implementation
        try:
            config._experts_implementation = "eager"
            yield
        finally:
            config._experts_implementation = before

    def norm_on_stream(self, role: str, block: Block) -> nn.Module:
        """The module of a norm, to hook."""
        found: nn.Module = self.model.get_submodule(self.architecture.module_of(role, block))
        return found
