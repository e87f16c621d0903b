"""A stock class at other sizes: which key of its configuration moves which parameter, and a model of a few kilobytes.

Everything here looks at configurations and at models on the meta device; no weight of the real model is read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

import torch
from torch import nn

from secateur.errors import RequestError, near, refuse
from secateur.families import family_names
from secateur.families.packing import Shape
from secateur.families.stock import meta_model, stock_config

Raw = dict[str, Any]
UNKNOWN: Final = "unknown-architecture"
"""Code of every refusal of an architecture."""
_FEWEST, _MOST = 5, 8
"""Blocks of a specimen: enough to see that they are a chain, and at most so many to see every sort of block."""
_WIDTHS: Final = ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "n_embed")
_HEADS: Final = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "num_query_heads")
_GROUPS: Final = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "multi_query_group_num")
_HEAD: Final = ("head_dim", "kv_channels", "attention_head_dim", "head_size", "attention_key_size")
_ACTIVE: Final = ("num_experts_per_tok", "top_k", "moe_topk", "num_experts_per_token", "moe_top_k", "moe_k")
_FOLLOWS_WIDTH: Final = ("word_embed_proj_dim",)
_INNER: Final = re.compile(r"inner|intermediate|ffn|feed_forward")
_INDEX: Final = re.compile(r"idx|index|layer_(id|number|num)$")
_REACH: Final = re.compile(r"window|chunk")
_SMALL_REACH: Final = 4
"""Tokens that a block of limited reach sees: fewer than a run has, so that it differs from one that sees all."""
VOCABULARY: Final = 101


def require_stock_decoder(raw: Mapping[str, Any]) -> None:
    """Refuse by name what is no causal language model of transformers itself."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(raw.get("model_type"))
    asked = f"architecture {kind!r}"
    code = raw.get("auto_map")
    if kind not in CONFIG_MAPPING:
        found = "transformers has no class of this name" + (": the folder brings its own code" if code else "")
        refuse(UNKNOWN, asked, found, near(kind, family_names()))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        refuse(UNKNOWN, asked, "transformers has no causal language model of this name", "see: secateur families")
    config = stock_config(raw)
    if getattr(config, "is_encoder_decoder", False):
        refuse(UNKNOWN, asked, "it is an encoder with a decoder", "Secateur prunes decoders")
    parts = [name for name in getattr(config, "sub_configs", {}) if name.endswith("_config")]
    if parts:
        refuse(UNKNOWN, asked, f"its configuration holds others ({', '.join(parts)})", "Secateur prunes plain decoders")


def shapes_of(raw: Raw) -> dict[str, Shape] | None:
    """Shape of every parameter of the stock class, None where it refuses the configuration."""
    try:
        model = meta_model(stock_config(raw))
    except RequestError:
        return None
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


class Specimen:
    """What can be told of a stock class without weights.

    Args:
        raw: the content of ``config.json``.

    Attributes:
        full: the configuration with every default filled in.
        blocks, embedding, head: names of modules; the head's is empty where there is none.
        depth: number of blocks, ``depth_key`` the key that holds it.
        short: ``full`` with a few blocks, as many as it takes to see every sort of them.

    Raises:
        RequestError: this is no chain of blocks of a stock decoder.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        require_stock_decoder(raw)
        self.model_type = str(raw["model_type"])
        config = stock_config(raw)
        self.full: Raw = {**config.to_dict(), "model_type": self.model_type}
        for dropped in ("auto_map", "per_layer_config", "quantization_config"):
            self.full.pop(dropped, None)
        self.aliases: Mapping[str, str] = getattr(config, "attribute_map", {}) or {}
        model = meta_model(stock_config(self.full))
        self._refuse_sharing(model)
        self.blocks = self._find_blocks(model)
        self.embedding = self._name(model, model.get_input_embeddings())
        self.head = self._name(model, model.get_output_embeddings())
        if not self.embedding or not self.head:
            refuse(UNKNOWN, self._asked, "the stock class names no token embedding or no head")
        self.depth = len(model.get_submodule(self.blocks))
        self.depth_key = self._find_depth_key()
        self.short = self._shorten(model)

    @property
    def _asked(self) -> str:
        return f"architecture {self.model_type!r}"

    @staticmethod
    def _name(model: nn.Module, wanted: Any) -> str:
        for name, module in model.named_modules():
            if module is wanted:
                return str(name)
        return ""

    def _refuse_sharing(self, model: Any) -> None:
        ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
        seen: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in seen and id(parameter) not in ends:
                refuse(UNKNOWN, self._asked, f"{seen[id(parameter)]} and {name} are one parameter")
            seen[id(parameter)] = name

    def _find_blocks(self, model: nn.Module) -> str:
        lists: list[str] = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and any(True for _ in module.parameters())
        ]
        outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
        if len(outer) != 1:
            found = "it has no list of blocks" if not outer else f"it has several lists of blocks ({', '.join(outer)})"
            refuse(UNKNOWN, self._asked, found)
        return outer[0]

    # -- depth -----------------------------------------------------------------------------------------------------

    def at_depth(self, raw: Raw, key: str, depth: int) -> Raw:
        """``raw`` with the first ``depth`` blocks; lists over the blocks follow."""
        made = copy.deepcopy(raw)
        made[key] = depth
        for name, value in raw.items():
            if isinstance(value, list) and len(value) == self.depth:
                made[name] = value[:depth]
        return made

    def _find_depth_key(self) -> str | None:
        candidates = [k for k, v in self.full.items() if type(v) is int and v == self.depth]
        for key in sorted(candidates, key=lambda name: "layer" not in name):
            shapes = shapes_of(self.at_depth(self.full, key, max(1, self.depth - 1)))
            if shapes is not None and not any(n.startswith(f"{self.blocks}.{self.depth - 1}.") for n in shapes):
                return key
        return None

    def _shorten(self, model: nn.Module) -> Raw:
        """The first blocks, until every sort is there: by parameters, settings and entries in lists over the blocks."""
        if self.depth_key is None:
            return copy.deepcopy(self.full)
        sorts: list[Any] = []
        lists = {k: v for k, v in self.full.items() if isinstance(v, list) and len(v) == self.depth}
        for index, block in enumerate(model.get_submodule(self.blocks).children()):
            sorts.append((_sort(block), tuple(str(value[index]) for value in lists.values())))
        needed = max((sorts.index(sort) for sort in sorts), default=0) + 1
        made = self.at_depth(self.full, self.depth_key, min(self.depth, max(_FEWEST, min(_MOST, needed))))
        for name, value in lists.items():  # sorts that come too late take the last places
            missing = [v for i, v in enumerate(value) if v not in made[name] and value.index(v) == i]
            for place, late in enumerate(missing[: max(0, len(made[name]) - 1)]):
                made[name][-1 - place] = late
        shown = {_sort(block) for block in meta_model(stock_config(made)).get_submodule(self.blocks).children()}
        if not {sort for sort, _ in sorts} <= shown:
            refuse(UNKNOWN, self._asked, f"sorts of blocks that the first {_MOST} do not show")
        return made

    # -- what moves ------------------------------------------------------------------------------------------------

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Parameters of the short model."""
        found = shapes_of(self.short)
        if found is None:
            refuse(UNKNOWN, self._asked, "the stock class refuses its own configuration with fewer blocks")
        return found

    def moved(self, key: str, value: int) -> dict[tuple[str, int], float] | None:
        """Dimensions of parameters that another value of a key changes, and by which factor."""
        changed = {**self.short, key: value}
        if key in _WIDTHS:
            changed |= {k: value for k in _FOLLOWS_WIDTH if k in self.short}
        after = shapes_of(changed)
        if after is None or set(after) - set(self.shapes) != set() or set(self.shapes) - set(after) != set():
            return None
        return {
            (name, d): new / old
            for name, shape in self.shapes.items()
            if len(shape) == len(after[name])
            for d, (old, new) in enumerate(zip(shape, after[name], strict=True))
            if old != new
        }

    @cached_property
    def responses(self) -> dict[str, dict[tuple[str, int], float]]:
        """What doubling (or halving) each number of the configuration does to the parameters."""
        found = {}
        for key, value in self.short.items():
            if type(value) is not int or value < 1 or key == self.depth_key or key.endswith("_token_id"):
                continue
            for other in (2 * value, value // 2):
                moved = self.moved(key, other) if other else None
                if moved is not None:
                    found[key] = moved
                    break
        return found

    def named(self, names: tuple[str, ...]) -> str | None:
        """The first of some usual names that the configuration has, as it spells it."""
        for name in names:
            key = self.aliases.get(name, name)
            if type(self.short.get(key)) is int:
                return key
        return None

    def _answering(self, name: str, dimension: int) -> list[str]:
        return [key for key, moved in self.responses.items() if (name, dimension) in moved]

    @cached_property
    def width_key(self) -> str:
        """Key of the stream's width."""
        keys = self._answering(f"{self.embedding}.weight", 1)
        usual = self.named(_WIDTHS)
        if usual in keys:
            return str(usual)
        if len(keys) != 1:
            found = f"no single key holds the stream's width (candidates: {', '.join(keys) or 'none'})"
            refuse(UNKNOWN, self._asked, found)
        return keys[0]

    @cached_property
    def heads_key(self) -> str:
        """Key of the number of query heads."""
        key = self.named(_HEADS)
        if key is None:
            refuse(UNKNOWN, self._asked, "no key holds the number of attention heads")
        return key

    @cached_property
    def groups_key(self) -> str | None:
        """Key of the number of key/value heads."""
        return self.named(_GROUPS)

    @cached_property
    def active_key(self) -> str | None:
        """Key of the number of routed experts that a token visits."""
        return self.named(_ACTIVE)

    def head_key(self, head: int, within: str) -> str | None:
        """Key of the size of a head, written out or not, that moves what is within a module."""
        for name in _HEAD:
            key = self.aliases.get(name, name)
            moved = self.moved(key, 2 * head)
            if moved and all(factor == 2 for factor in moved.values()) and any(n.startswith(within) for n, _ in moved):
                return key
        return None

    def unset_inner_key(self) -> str | None:
        """A key of the FFN's width that is null, and then a multiple of the stream's."""
        for key, value in self.short.items():
            if value is None and _INNER.search(key) and self.moved(key, 2 * VOCABULARY):
                return key
        return None

    # -- small -----------------------------------------------------------------------------------------------------

    def small(self, changes: Mapping[str, Any]) -> Raw:
        """The short configuration at other sizes, with few words."""
        made = {**copy.deepcopy(self.short), **changes}
        if self.width_key in changes:
            made |= {k: changes[self.width_key] for k in _FOLLOWS_WIDTH if k in made}
        vocabulary = self.aliases.get("vocab_size", "vocab_size")
        made[vocabulary] = VOCABULARY
        for key, value in made.items():
            if key.endswith("token_id") and isinstance(value, int):
                made[key] = min(value, 2)
            elif key.endswith("token_id") and isinstance(value, list):
                made[key] = [2]
            elif _REACH.search(key) and "layer" not in key and type(value) is int:
                made[key] = min(value, _SMALL_REACH)
        made["use_cache"] = False
        return made


def _sort(block: nn.Module) -> tuple[Any, ...]:
    """What tells one block from another but for its number: shapes of its parameters, settings of its modules."""
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    settings = tuple(
        (name, key, value)
        for name, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if not key.startswith("_") and not _INDEX.search(key) and type(value) in (bool, int, str, type(None))
    )
    return shapes, settings


def seeded(seed: int) -> torch.Generator:
    """The only source of randomness of an inference."""
    return torch.Generator().manual_seed(seed)
