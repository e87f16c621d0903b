"""The methods by name, imported on first use; third parties add theirs through the entry-point group below."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final

from secateur.errors import RequestError, near, refuse, validated

if TYPE_CHECKING:
    from pydantic import BaseModel

    from secateur.methods.base import Method, Named
    from secateur.methods.blocks import BlockMethod
    from secateur.methods.channels import GraphMethod


ENTRY_POINTS: Final = "secateur.methods"
_OURS: Final = {
    "adapt_pruner": "secateur.methods.adapt_pruner:AdaptPruner",
    "armor": "secateur.methods.armor:Armor",
    "bits_back": "secateur.methods.bits_back:BitsBack",
    "blockpruner": "secateur.methods.blockpruner:BlockPruner",
    "cfsp": "secateur.methods.cfsp:Cfsp",
    "d_pruner": "secateur.methods.d_pruner:DPruner",
    "disp_llm": "secateur.methods.disp_llm:DispLlm",
    "dotresize": "secateur.methods.dotresize:DotResize",
    "dynamic_slicing": "secateur.methods.dynamic_slicing:DynamicSlicing",
    "ecoflap": "secateur.methods.ecoflap:Ecoflap",
    "fasp": "secateur.methods.fasp:Fasp",
    "flap": "secateur.methods.flap:Flap",
    "gaprune": "secateur.methods.gaprune:GaPrune",
    "global_mp": "secateur.methods.densities:GlobalMp",
    "grasp": "secateur.methods.snip:Grasp",
    "joint": "secateur.methods.joint:Joint",
    "lamp": "secateur.methods.densities:Lamp",
    "layers_lottery": "secateur.methods.layers_lottery:LayersLottery",
    "llm_pruner": "secateur.methods.llm_pruner:LlmPruner",
    "lrp_pruning": "secateur.methods.lrp_pruning:LrpPruning",
    "magnitude": "secateur.methods.magnitude:Magnitude",
    "masksparsity": "secateur.methods.masksparsity:MaskSparsity",
    "modegpt": "secateur.methods.modegpt:MoDeGpt",
    "obspa": "secateur.methods.obspa:Obspa",
    "pagcp": "secateur.methods.pagcp:Pagcp",
    "precrop": "secateur.methods.precrop:PreCrop",
    "prunenet": "secateur.methods.prunenet:PruneNet",
    "random": "secateur.methods.random:Random",
    "random_pruning_erk": "secateur.methods.densities:RandomPruningErk",
    "rd_dp_allocation": "secateur.methods.rd_dp_allocation:RdDpAllocation",
    "ria": "secateur.methods.ria:Ria",
    "shortgpt": "secateur.methods.shortgpt:ShortGpt",
    "slicegpt": "secateur.methods.slicegpt:SliceGpt",
    "snip": "secateur.methods.snip:Snip",
    "spa": "secateur.methods.spa:Spa",
    "sparsegpt": "secateur.methods.sparsegpt:SparseGpt",
    "stun": "secateur.methods.stun:Stun",
    "synflow": "secateur.methods.synflow:SynFlow",
    "udfc": "secateur.methods.udfc:Udfc",
    "wanda": "secateur.methods.wanda:Wanda",
}
_ON_MODULES: Final = {
    "global_mp": "secateur.methods.coupled:GlobalMpOfChannels",
    "lamp": "secateur.methods.coupled:LampOfChannels",
}
"""What methods for checkpoints are on modules, where they are known for both."""
DEFAULT_WITH_DATA: Final = "joint"
DEFAULT_WITHOUT_DATA: Final = "prunenet"
DEFAULT_ON_GRAPH: Final = "spa"


def method_names() -> list[str]:
    """Names of all methods, installed ones included."""
    return sorted({*_OURS, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})


def checkpoint_methods() -> list[str]:
    """Names of the methods for checkpoints of language models, without those for modules."""
    return [name for name in method_names() if method_class(name).group != "graph"]


def module_methods() -> list[str]:
    """Names of the methods for modules."""
    return [name for name in method_names() if name in _ON_MODULES or method_class(name).group == "graph"]


def module_class(name: str) -> type[Named]:
    """The class of a method as it is on modules, if it is there; else that of :func:`method_class`."""
    return _loaded(_ON_MODULES[name]) if name in _ON_MODULES else method_class(name)


def _loaded(where: str) -> type[Named]:
    module, _, attribute = where.partition(":")
    found: type[Named] = getattr(import_module(module), attribute)
    return found


def method_class(name: str) -> type[Named]:
    """The class of a method; an unknown name is refused with near matches."""
    if name in _OURS:
        return _loaded(_OURS[name])
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == name:
            loaded: type[Named] = entry.load()
            return loaded
    raise RequestError("unknown-method", f"method {name!r}", "there is no such method", near(name, method_names()))


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """A method for checkpoints with its options checked against its schema.

    Raises:
        RequestError: unknown method, one for modules, unknown option (near matches), or a value out of range.
    """
    from secateur.methods.base import Method

    made = _make(method_class(name), name, options)
    if not isinstance(made, Method):
        refuse(
            "method-on-graphs",
            f"method {name!r} on a checkpoint",
            "it prunes modules",
            f"call secateur.prune(module, method={name!r}, example_inputs=x)",
        )
    return made


def make_graph_method(name: str, options: Mapping[str, Any]) -> GraphMethod | BlockMethod:
    """A method for modules with its options checked against its schema.

    Raises:
        RequestError: unknown method, one for checkpoints, unknown option (near matches), or a value out of range.
    """
    from secateur.methods.blocks import BlockMethod
    from secateur.methods.channels import GraphMethod

    made = _make(module_class(name), name, options)
    if not isinstance(made, GraphMethod | BlockMethod):
        known = ", ".join(module_methods())
        refuse(
            "method-on-checkpoints",
            f"method {name!r} with example_inputs",
            "it prunes checkpoints of language models",
            f"for any module: {known}",
        )
    return made


def _make(kind: type[Named], name: str, options: Mapping[str, Any]) -> Named:
    for (option, value), variant in kind.variants.items():
        if options.get(option) == value:
            kind = variant
    return validated(kind, options, name, f"see: secateur methods {name}")


def describe_method(name: str) -> dict[str, Any]:
    """Facts of a method: title, paper, data, output, group, and its options with values, default and description."""
    from secateur.methods.base import WORTH

    kind = method_class(name)
    default = kind.model_construct()
    return {
        "title": kind.title,
        "paper": kind.paper,
        "data": default.data,
        "output": kind.output,
        "group": kind.group,
        "seeded": default.seeded,  # as it is by default
        "worth": WORTH[kind.output],
        "options": describe_options(kind),
        "variants": {
            key: {
                "output": variant.output,
                "worth": WORTH[variant.output],
                "group": variant.group,
                "options": describe_options(variant),
            }
            for key, variant in _variants(kind).items()
        },
    }


def _variants(kind: type[Named]) -> dict[str, type[Named]]:
    """Variants of a method by what makes them, ``OPTION=VALUE|VALUE``."""
    values: dict[tuple[str, type[Named]], list[str]] = {}
    for (option, value), variant in kind.variants.items():
        values.setdefault((option, variant), []).append(value)
    return {f"{option}={'|'.join(each)}": variant for (option, variant), each in values.items()}


def describe_options(schema: type[BaseModel]) -> dict[str, Any]:
    """Type, choices, default and description of every option of a schema."""
    options = {}
    for key, entry in schema.model_json_schema()["properties"].items():
        parts = [entry, *entry.get("anyOf", ())]
        options[key] = {
            "type": next((part["type"] for part in parts if part.get("type", "null") != "null"), "any"),
            "choices": next((part["enum"] for part in parts if "enum" in part), None),
            "default": schema.model_fields[key].default,
            "description": entry.get("description", ""),
        }
    return options
