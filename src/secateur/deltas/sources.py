"""A fine-tune beside its base, place by place: a checkpoint of its own, or an adapter that is added to the base.

What is pruned are *pieces*: canonical matrices of the delta, or, where an adapter loses entries of its factors, these.
``assemble`` makes canonical deltas of pieces again, at both ends of the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from secateur.checkpoints import Checkpoint
from secateur.checkpoints.folder import read_json
from secateur.deltas.selection import Signal
from secateur.errors import refuse
from secateur.families import Architecture, Block
from secateur.families.packing import Packed
from secateur.families.roles import MATRICES, TABLES
from secateur.inference import open_checkpoint

ADAPTER: Final = "adapter_config.json"
_ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
_WHOLE: Final = (*TABLES, "head", "sinks", "router", "shared_router", "attention_shortcut", "ffn_shortcut")
PRUNED_ROLES: Final = tuple(role for role, axes in MATRICES.items() if role not in _WHOLE and len(axes) == 2)
"""Roles of the matrices that lose entries; all else travels whole, as in the published code."""
Signals = Mapping[str, Signal]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which deltas of weights of a type are computed: float32, or float64 of float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pruned_names(architecture: Architecture, place: Block) -> list[str]:
    """Canonical names of the matrices of one place that lose entries."""
    if place is None:
        return []
    tensors = architecture.tensors_of(place)
    return [t.name for t in tensors if t.kind == "weight" and t.role in PRUNED_ROLES]


def factor_names(packed: str) -> tuple[str, str]:
    """Names of the two factors that are added to a parameter: A [rank, in], B [out, rank]."""
    return f"{packed}.lora_A", f"{packed}.lora_B"


def assemble(
    architecture: Architecture, place: Block, pieces: Mapping[str, Tensor], adapters: Mapping[str, float]
) -> dict[str, Tensor]:
    """Canonical deltas of one place, of its pieces.

    Args:
        adapters: weight of the product of two factors, by the parameter to which it is added.
    """
    found = {name: piece for name, piece in pieces.items() if name in architecture.tensors}
    for packed in architecture.packed_of(place):
        if packed.name not in adapters:
            continue
        one, other = (pieces.get(name) for name in factor_names(packed.name))
        if one is not None and other is not None:
            product = adapters[packed.name] * (other @ one)
            found.update(packed.unpack(product.t() if packed.transposed else product, architecture.shapes))
    return found


class Tuned:
    """A fine-tune that is a checkpoint of its own.

    Args:
        base: what it was made of.
        checkpoint: the fine-tune.

    Attributes:
        adapters: weight of the product of two factors, by parameter: none, but for an :class:`Adapter` whose factors
            are pruned.
        ranks: of these.
    """

    def __init__(self, base: Checkpoint, checkpoint: Checkpoint) -> None:
        self.base, self.checkpoint = base, checkpoint
        self.adapters: dict[str, float] = {}
        self.ranks: dict[str, int] = {}
        self._require_alike()

    @property
    def architecture(self) -> Architecture:
        """Of the fine-tune."""
        return self.checkpoint.architecture

    @property
    def path(self) -> Path:
        return self.checkpoint.folder.path

    @property
    def adapter_bytes(self) -> int | None:
        """Size of the adapter's file; None where there is none."""
        return None

    def _require_alike(self) -> None:
        """The blocks of both must be of the same shapes; the vocabulary may differ."""
        asked = f"delta between {self.base.folder.path.name!r} and {self.path.name!r}"
        ours, theirs = self.architecture, self.base.architecture
        kinds = [found.raw.get("model_type") for found in (ours, theirs)]
        if kinds[0] != kinds[1]:
            refuse("other-architecture", asked, f"one is {kinds[1]}, the other {kinds[0]}", "name the model's own base")
        for place in ours.places:
            for name in pruned_names(ours, place):
                mine, other = ours.shapes[name], theirs.shapes.get(name)
                if mine != other:
                    found = f"{name} is {list(mine)} here and {'absent' if other is None else list(other)} in the base"
                    refuse("other-architecture", asked, found, "name the model's own base")

    def read(self, place: Block) -> dict[str, Tensor]:
        """Canonical tensors of one place of the fine-tune."""
        return self.checkpoint.read(place)

    def pieces(self, place: Block, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is pruned of one place: matrices [rows, columns], in at least float32."""
        found = {}
        for name in pruned_names(self.architecture, place):
            dtype = wide(tuned[name].dtype)
            found[name] = tuned[name].to(dtype) - base[name].to(dtype)
        return found

    def signal(self, name: str, pieces: Mapping[str, Tensor], signals: Signals) -> Signal | None:
        """What the columns of a piece read."""
        del pieces
        return signals.get(name)

    def asked_roles(self) -> tuple[str, ...]:
        """Roles whose inputs have to be seen for the signals of all pieces."""
        return tuple(role for role in PRUNED_ROLES if role in self.architecture.roles)


class Adapter(Tuned):
    """A fine-tune that is a LoRA adapter (peft) beside its base.

    Args:
        base: to which it is added.
        path: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        factors: whether the factors are pruned, or their product.

    Raises:
        RequestError: an adapter of another kind, or one that fits no parameter of the base.
    """

    def __init__(self, base: Checkpoint, path: Path, factors: bool) -> None:
        self._path, self._factors = path, factors
        self._pairs, scales = _read_adapter(base.architecture, path)
        super().__init__(base, base)
        self.adapters = scales if factors else {}
        self.ranks = {name: len(pair[0]) for name, pair in self._pairs.items()}
        self._scales = scales

    @property
    def path(self) -> Path:
        return self._path

    @property
    def adapter_bytes(self) -> int | None:
        return (self._path / _ADAPTER_WEIGHTS).stat().st_size

    def _of(self, place: Block) -> list[Packed]:
        return [packed for packed in self.architecture.packed_of(place) if packed.name in self._pairs]

    def _both(self, place: Block) -> dict[str, Tensor]:
        return {
            name: factor
            for packed in self._of(place)
            for name, factor in zip(factor_names(packed.name), self._pairs[packed.name], strict=True)
        }

    def read(self, place: Block) -> dict[str, Tensor]:
        """Canonical tensors of the base with the adapter added, those in at least float32."""
        tensors = self.checkpoint.read(place)
        for name, delta in assemble(self.architecture, place, self._both(place), self._scales).items():
            dtype = wide(tensors[name].dtype)
            tensors[name] = tensors[name].to(dtype) + delta.to(dtype)
        return tensors

    def pieces(self, place: Block, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The product of the factors by canonical name, or the factors."""
        del base, tuned
        if self._factors:
            return self._both(place)
        return assemble(self.architecture, place, self._both(place), self._scales)

    def signal(self, name: str, pieces: Mapping[str, Tensor], signals: Signals) -> Signal | None:
        """What the columns of a piece read; of the second factor, what the first makes of its inputs, taken as
        uncorrelated."""
        if not self._factors:
            return signals.get(name)
        parameter, _, which = name.rpartition(".lora_")
        packed = self.architecture.packed[parameter]
        signal = next((signals[part] for part in packed.canonical if part in signals), None)
        if signal is None or which == "A":
            return signal
        first = pieces[factor_names(parameter)[0]].double().cpu()
        mean = first @ signal.mean
        spread = (signal.square - signal.mean.square()).clamp(min=0)
        return Signal(mean, mean.square() + first.square() @ spread)


def _read_adapter(architecture: Architecture, path: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """Factors (A, B) and weight of their product, by the name of the parameter to which it is added."""
    asked, hint = f"adapter {str(path)!r}", "merge it into its base with peft's merge_and_unload, and name the folder"
    config = read_json(path / ADAPTER)
    kind = str(config.get("peft_type"))
    if (
        kind != "LORA"
        or config.get("use_dora")
        or config.get("modules_to_save")
        or config.get("bias", "none") != "none"
    ):
        refuse("bad-adapter", asked, f"it is no plain LoRA ({kind} with more than factors of matrices)", hint)
    file = path / _ADAPTER_WEIGHTS
    if not file.is_file():
        refuse("bad-adapter", asked, f"it has no {_ADAPTER_WEIGHTS}")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        refuse("bad-safetensors", asked, f"{file.name} is truncated or damaged ({error})", "fetch the file again")
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, which = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        parameter = f"{module}.weight"
        packed = architecture.packed.get(parameter)
        if which not in ("A", "B") or packed is None or packed.stacked:
            refuse("bad-adapter", asked, f"{name} is no factor of a matrix of the base", hint)
        halves.setdefault(parameter, {})[which] = tensor.float()
    pairs, scales = {}, {}
    for parameter, both in halves.items():
        packed = architecture.packed[parameter]
        shape = packed.shape(architecture.shapes)
        rows, columns = shape[::-1] if packed.transposed else shape
        if set(both) != {"A", "B"} or both["A"].shape[1:] != (columns,) or both["B"].shape != (rows, len(both["A"])):
            shapes = {which: list(tensor.shape) for which, tensor in both.items()}
            refuse("bad-adapter", asked, f"factors {shapes} for {parameter} of {list(shape)}", "name its own base")
        pairs[parameter] = (both["A"].contiguous(), both["B"].contiguous())
        scales[parameter] = _scale(config, parameter.removesuffix(".weight"), len(both["A"]))
    return pairs, scales


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Weight of an adapter: alpha / rank, or alpha / root of rank; a pattern of the configuration may give alpha."""
    patterns: Mapping[str, Any] = config.get("alpha_pattern") or {}
    found = (alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))
    alpha = float(next(found, config.get("lora_alpha", rank)))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def open_tuned(base: Checkpoint, path: Path, factors: bool) -> Tuned:
    """A fine-tune from its folder, whichever of the two it is."""
    if (path / ADAPTER).is_file():
        return Adapter(base, path, factors)
    if factors:
        refuse("bad-option", "option lora=factors", f"{str(path)!r} is no adapter", "leave it out")
    return Tuned(base, open_checkpoint(path))
