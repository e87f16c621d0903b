"""A decoder whose layers differ in size, on top of the stock transformers class.

This file lies in the folder of the checkpoint, beside ``config.json`` (its ``auto_map`` names it) and
``secateur.json``, whose ``resize`` says how the layers differ. The stock class is built from the uniform
configuration, the parameters named there get their own shapes, and the rest of transformers (generation, caches,
saving) works as ever:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

or, where Secateur is installed, ``secateur.load(folder)``, which uses its own copy of this file.

Where the stream changes its basis from norm to norm, the change is a triangular map S, stored packed beside the matrix
that writes the stream. A block adds its branch to what its norm saw, x + f(norm(x)); what is wanted is x S +
f(norm(x)), so the branch is given x (S - 1) on its way.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

RECORD = "secateur.json"
AUTO_MAP = {"AutoModelForCausalLM": "modeling_secateur.SecateurForCausalLM"}


def resize(model: nn.Module, record: dict[str, Any]) -> None:
    """Give the modules of a stock model the sizes in ``record`` (``resize`` of ``secateur.json``), without values."""
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


class _Shortcut:
    """Remembers what a norm reads and adds x (S - 1) to what the writer behind it gives."""

    def __init__(self, norm: nn.Module, writer: nn.Module, settings: dict[str, Any]) -> None:
        self.mean_free, self.gain = settings["mean_free"], settings["gain"]
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
        moved = signal + (seen @ self._map(writer.shortcut)).view(signal.shape).to(signal.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    def _map(self, packed: torch.Tensor) -> torch.Tensor:
        """(S - 1) / gain, kept until the parameter changes."""
        state = (packed.data_ptr(), packed._version, packed.dtype, packed.device)
        if self.map is None or self.state != state or (torch.is_grad_enabled() and packed.requires_grad):
            self.map, self.state = change_of_basis(packed, self.mean_free) / self.gain, state
        found: torch.Tensor = self.map
        return found


def change_of_basis(packed: torch.Tensor, mean_free: bool) -> torch.Tensor:
    """S - 1 from its packed lower triangle.

    Of a stream without a mean (LayerNorm), the triangle acts in the hyperplane orthogonal to the vector of ones.
    """
    size = (math.isqrt(8 * packed.numel() + 1) - 1) // 2
    rows, columns = torch.tril_indices(size, size, device=packed.device)
    wide = packed if packed.dtype == torch.float64 else packed.float()
    square = wide.new_zeros(size, size).index_put((rows, columns), wide)
    square = square - torch.eye(size, dtype=wide.dtype, device=wide.device)
    if mean_free:
        plane = hyperplane(size + 1).to(square)
        square = plane @ square @ plane.t()
    return square.to(packed.dtype)


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


def resized_class(stock: Any, record: dict[str, Any]) -> Any:
    """A subclass of a stock class whose instances have the sizes in ``record``."""

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
            config["auto_map"] = AUTO_MAP
            config["architectures"] = [stock.__name__]
            (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    Resized.__name__ = Resized.__qualname__ = stock.__name__
    Resized.__module__ = stock.__module__  # transformers renames tensors on disk for its own classes only
    return Resized


class SecateurForCausalLM:
    """What ``AutoModelForCausalLM`` finds under ``auto_map``; instances are of the stock class."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Nothing to do: a model made here saves this file itself."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a checkpoint whose layers differ."""
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import cached_file

        if config is None:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        places = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}
        path = Path(folder) / RECORD
        record = json.loads(Path(path if path.is_file() else cached_file(folder, RECORD, **places)).read_text())[
            "resize"
        ]
        stock = AutoModelForCausalLM._model_mapping[type(config)]
        kwargs.pop("trust_remote_code", None)
        return resized_class(stock, record).from_pretrained(folder, *args, config=uniform_config(config), **kwargs)
