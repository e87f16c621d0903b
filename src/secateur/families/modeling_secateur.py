"""A transformer whose layers differ in size, on top of the stock transformers class.

This file lies in the folder of the checkpoint, beside ``config.json`` (its ``auto_map`` names it) and
``secateur.json``, whose ``resize`` says how the layers differ. The stock class is built from the uniform
configuration, the parameters named there get their own shapes, and the rest of transformers (generation, caches,
saving) works as ever:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

(``AutoModel`` where there is no head), or, where Secateur is installed, ``secateur.load(folder)``, which uses its own
copy of this file.

Where the stream changes its basis from norm to norm, the change is a triangular map S, stored packed beside the matrix
that writes the stream. A block adds its branch to what its norm saw, x + f(norm(x)); what is wanted is x S +
f(norm(x)), so the branch is given x (S - 1) on its way.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

RECORD = "secateur.json"
AUTO_MAPS = {
    name: {name: f"modeling_secateur.{ours}"}
    for name, ours in (("AutoModelForCausalLM", "SecateurForCausalLM"), ("AutoModel", "SecateurModel"))
}
"""``auto_map`` of a configuration, by the class of transformers that loads it."""


def resize(model: nn.Module, record: dict[str, Any]) -> None:
    """Give the modules of a stock model the sizes in ``record`` (``resize`` of ``secateur.json``), without values."""
    for path, stand_in in record.get("gone", {}).items():
        _leave_out(model, path, stand_in)
    for name, shape in record["parameters"].items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        like = module._parameters.get(leaf)
        if like is None:
            like = next(model.parameters())
        empty = torch.empty(shape, dtype=like.dtype, device=like.device)
        module.register_parameter(leaf, nn.Parameter(empty, requires_grad=like.requires_grad))
        if leaf == "weight":
            _tell(module, shape)
    for path, values in record["attributes"].items():
        told: Any = model.get_submodule(path)
        for name, value in values.items():
            inner, _, leaf = name.rpartition(".")
            if inner:
                told.config = copy.copy(told.config)
            setattr(told.config if inner else told, leaf, value)
    for path, indices in record.get("ports", {}).items():
        _narrow(model.get_submodule(path), indices)
    for path, shortcut in record["shortcuts"].items():
        _Shortcut(model.get_submodule(shortcut["norm"]), model.get_submodule(path), shortcut)


def _tell(module: Any, shape: list[int]) -> None:
    """Bring what a module says of its sizes in line with its weight."""
    if isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(shape)
    elif hasattr(module, "nf"):  # transformers' Conv1D: [in, out]
        module.nx, module.nf = shape
    elif hasattr(module, "in_features"):
        module.out_features, module.in_features = shape


def _narrow(module: nn.Module, indices: dict[str, list[int]]) -> None:
    """Let a matrix read some entries of its input, and write some of its output; the others are zero.

    Which ones stands in an int32 buffer beside the matrix.
    """
    for kind, (count, whole) in indices.items():
        module.register_buffer(kind, torch.zeros(count, dtype=torch.int32))
        if kind == "read_index":
            module.register_forward_pre_hook(_read)
        else:
            module.register_forward_hook(_writer(whole))


def _read(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].index_select(-1, module.read_index), *inputs[1:])


def _writer(whole: int) -> Any:
    def write(module: Any, _: Any, output: Any) -> Any:
        return output.new_zeros(*output.shape[:-1], whole).index_copy(-1, module.write_index.long(), output)

    return write


def _leave_out(model: nn.Module, path: str, stand_in: str | int) -> None:
    """Put in a module's place what adds nothing to the stream."""
    parent, _, leaf = path.rpartition(".")
    around = model.get_submodule(parent)
    made = _NoAttention(around._modules[leaf]) if stand_in == "attention" else _StandIn(stand_in)
    around._modules[leaf] = made
    around._is_hf_initialized = True  # type: ignore[assignment]  # transformers would give values to what is gone


class _NoAttention(nn.Module):
    """Zeros, or the stream itself where the attention of a stock class adds it."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.signature = inspect.signature(stock.forward)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, None]:
        given = self.signature.bind_partial(*args, **kwargs).arguments
        stream = given.get("residual")
        return (torch.zeros_like(next(iter(given.values()))) if stream is None else stream), None


class _StandIn(nn.Module):
    """What is left of a norm (its input), a router (nothing) or a matrix (zeros of some width)."""

    def __init__(self, what: str | int) -> None:
        super().__init__()
        self.what = what

    def forward(self, signal: Any, *_: Any, **__: Any) -> Any:
        if isinstance(self.what, int):
            return signal.new_zeros(*signal.shape[:-1], self.what)
        return signal if self.what == "same" else (None, None, None)


class _Shortcut:
    """Remembers what a norm reads and adds x (S - 1) to what the writer behind it gives."""

    def __init__(self, norm: nn.Module, writer: nn.Module, settings: dict[str, Any]) -> None:
        self.mean_free, self.gain, self.shape = settings["mean_free"], settings["gain"], settings.get("shape")
        self.seen: Any = None
        self.map: Any = None
        self.state: Any = None
        norm.register_forward_pre_hook(self._remember)
        writer.register_forward_hook(self._add)

    def _remember(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.seen = inputs[0]

    def _add(self, writer: Any, _: Any, output: Any) -> Any:
        seen, self.seen = self.seen, None
        signal = output[0] if isinstance(output, tuple) else output
        change = self._map(writer.shortcut)
        added = seen[..., : change.shape[0]] @ change
        if change.shape[1] < signal.shape[-1]:
            added = nn.functional.pad(added, (0, signal.shape[-1] - change.shape[1]))
        moved = signal + added.view(signal.shape).to(signal.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    def _map(self, packed: torch.Tensor) -> torch.Tensor:
        """(S - 1) / gain, kept until the parameter changes."""
        state = (packed.data_ptr(), packed._version, packed.dtype, packed.device)
        if self.map is None or self.state != state or (torch.is_grad_enabled() and packed.requires_grad):
            self.map, self.state = change_of_basis(packed, self.mean_free, self.shape) / self.gain, state
        found: torch.Tensor = self.map
        return found


def change_of_basis(packed: torch.Tensor, mean_free: bool, shape: list[int] | None = None) -> torch.Tensor:
    """S - 1 from the packed lower triangle of S.

    Of a stream without a mean (LayerNorm), the triangle acts in the hyperplane orthogonal to the vector of ones.

    Args:
        packed: the entries of S on and below its diagonal, row by row.
        mean_free: whether the stream has no mean.
        shape: of S, where the stream is narrower on one side: a trapezoid. Square when omitted.

    Returns:
        [width before, the wider of both]: what is added to the stream, S filled up with zeros.
    """
    size = (math.isqrt(8 * packed.numel() + 1) - 1) // 2
    before, behind = shape or (size, size)
    rows, columns = torch.tril_indices(before, behind, device=packed.device)
    wide = packed if packed.dtype == torch.float64 else packed.float()
    change = wide.new_zeros(before, behind).index_put((rows, columns), wide)
    if mean_free:
        change = hyperplane(before + 1).to(wide) @ change @ hyperplane(behind + 1).to(wide).t()
    change = nn.functional.pad(change, (0, max(0, change.shape[0] - change.shape[1])))
    return (change - torch.eye(*change.shape, dtype=wide.dtype, device=wide.device)).to(packed.dtype)


def hyperplane(size: int) -> torch.Tensor:
    """Orthonormal basis [size, size - 1] of the vectors whose entries sum to zero (a Householder reflection)."""
    mirror = torch.full((size,), 1 / math.sqrt(size), dtype=torch.float64)
    mirror[0] += 1
    reflection = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(mirror, mirror) / mirror.dot(mirror)
    return reflection[:, 1:]


def uniform_config(config: Any) -> Any:
    """The configuration without its differences between layers: what the stock class can be built from."""
    config = copy.deepcopy(config)
    config.per_layer_config = None
    config.__dict__.pop("allow_global_per_layer_attribute_access", None)
    return config


def resized_class(stock: Any, record: dict[str, Any], auto: str = "AutoModelForCausalLM") -> Any:
    """A subclass of a stock class whose instances have the sizes in ``record``; ``auto`` names what loads them."""

    class Resized(stock):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(uniform_config(config), *args, **kwargs)
            resize(self, record)
            self.tie_weights()

        def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
            """Also write what a stock save does not know of: the record and this file."""
            super().save_pretrained(save_directory, *args, **kwargs)
            target = Path(save_directory)
            (target / RECORD).write_text(json.dumps({"resize": record}, indent=2) + "\n")
            shutil.copyfile(__file__, target / "modeling_secateur.py")
            config = json.loads((target / "config.json").read_text())
            config["auto_map"] = AUTO_MAPS[auto]
            config["architectures"] = [stock.__name__]
            (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    Resized.__name__ = Resized.__qualname__ = stock.__name__
    Resized.__module__ = stock.__module__  # transformers renames tensors on disk for its own classes only
    return Resized


class SecateurForCausalLM:
    """What ``AutoModelForCausalLM`` finds under ``auto_map``; instances are of the stock class."""

    auto = "AutoModelForCausalLM"

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "") -> None:
        """Nothing to do: a model made here saves this file itself."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a checkpoint whose layers differ."""
        import transformers
        from transformers.utils import cached_file

        if config is None:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        places = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}
        path = Path(folder) / RECORD
        record = json.loads(Path(path if path.is_file() else cached_file(folder, RECORD, **places)).read_text())[
            "resize"
        ]
        stock = getattr(transformers, cls.auto)._model_mapping[type(config)]
        kwargs.pop("trust_remote_code", None)
        weights = folder if kwargs.get("state_dict") is None else None  # the stock class takes one of the two
        made = resized_class(stock, record, cls.auto)
        return made.from_pretrained(weights, *args, config=uniform_config(config), **kwargs)


class SecateurModel(SecateurForCausalLM):
    """What ``AutoModel`` finds under ``auto_map``: the same without a head."""

    auto = "AutoModel"
