"""The architecture of other sizes: a rewritten stock configuration, and for layers that differ what is laid over it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from secateur.families.architecture import Architecture
from secateur.families.branches import cache_slots
from secateur.families.limits import Layout
from secateur.families.modeling_secateur import AUTO_MAPS
from secateur.families.sizes import BlockSizes, Sizes
from secateur.families.stock import PER_LAYER_KEYS, accepts


def modeling_file() -> Path:
    """The file that lies beside a checkpoint whose layers differ."""
    return Path(str(files("secateur.families") / "modeling_secateur.py"))


def resized(
    architecture: Architecture, sizes: Sizes, kept_blocks: Iterable[int] | None = None, layout: Layout = "native"
) -> Architecture:
    """The architecture at other sizes.

    Args:
        architecture: the present one.
        sizes: new sizes, in the native layout uniform over the blocks.
        kept_blocks: surviving blocks in order, for a depth cut.
        layout: ``native`` writes the sizes into the configuration, ``per-layer`` leaves it as it is but for the depth.
    """
    raw = copy.deepcopy(architecture.raw)
    depth = len(architecture.sizes.blocks)
    kept = list(range(depth)) if kept_blocks is None else list(kept_blocks)
    if layout == "native" and not architecture.per_layer:
        _write_sizes(raw, architecture, sizes)
    if sizes.tied != architecture.sizes.tied:
        raw["tie_word_embeddings"] = sizes.tied
    if len(kept) != depth:
        _write_depth(raw, architecture, kept)
    if layout == "native" and not architecture.per_layer:
        return Architecture(raw, architecture.origin)
    for key in PER_LAYER_KEYS:
        raw.pop(key, None)
    configured = architecture.stock_sizes.size("experts")
    if any(block.experts not in (0, configured) for block in sizes.blocks) and raw.get("output_router_logits"):
        raw["output_router_logits"] = False  # the loss that balances experts takes as many of each layer
    made = Architecture(raw, architecture.origin, sizes)
    # code of the source's own, if any, knows nothing of these layers
    made.raw["auto_map"] = dict(AUTO_MAPS[made.auto_class])
    if overrides := _layer_overrides(made):
        made.raw["per_layer_config"] = overrides
        if not accepts(made.raw):  # the stock configuration validates itself with values it says to be ambiguous
            made.raw["allow_global_per_layer_attribute_access"] = True
        if not accepts(made.raw):  # or holds every layer to what only the whole has to meet
            for key in PER_LAYER_KEYS:
                made.raw.pop(key, None)
    return made


def _values(block: BlockSizes) -> dict[str, int]:
    """Sizes of one block by their key in a family file."""
    widths = {"ffn": block.ffn}
    if block.experts:
        widths = {"expert_ffn": block.ffn, "shared": block.shared, "experts": block.experts}
    return {**widths, "kv": block.kv, "heads": block.kv * block.group}


def _write(raw: dict[str, Any], architecture: Architecture, name: str, value: int) -> None:
    """Set a key, which the file may know by another name of the stock configuration."""
    if (own := architecture.config.attribute_map.get(name)) in raw:
        name = own
    for other, own in architecture.config.attribute_map.items():
        if own == name:
            raw.pop(other, None)
    raw[name] = value


def _write_sizes(raw: dict[str, Any], architecture: Architecture, sizes: Sizes) -> None:
    """The native layout: uniform sizes under the stock configuration's keys."""
    keys, present = architecture.family.sizes, architecture.sizes
    wanted, current = {"residual": sizes.residual}, {"residual": present.residual}
    for after, before in zip(sizes.blocks, present.blocks, strict=False):
        wanted |= _values(after)
        current |= _values(before)
    for key, value in wanted.items():
        name = keys.get(key)
        if isinstance(name, str) and value != current[key]:
            _write(raw, architecture, name, value)
    if isinstance(name := keys.get("head"), str):
        _write(raw, architecture, name, sizes.head)
    if "word_embed_proj_dim" in raw and sizes.residual != present.residual:
        raw["word_embed_proj_dim"] = sizes.residual


def _write_depth(raw: dict[str, Any], architecture: Architecture, kept: list[int]) -> None:
    """Fewer blocks; what the stock configuration derives from their indices is written out."""
    family, depth = architecture.family, len(architecture.sizes.blocks)
    key = family.sizes["blocks"]
    assert isinstance(key, str)
    _write(raw, architecture, key, len(kept))
    for name, value in architecture.config.to_dict().items():
        # lists over the layers, also those the class derives from their indices, follow the survivors
        if isinstance(value, list) and len(value) == depth:
            raw[name] = [value[i] for i in kept]
    if family.dense_blocks is not None:
        dense = [new for new, old in enumerate(kept) if not architecture.sizes.blocks[old].experts]
        rule = family.dense_blocks
        raw.update({rule.listed: dense} if rule.listed else {})
        raw.update({rule.step: 1} if rule.step else {})
        raw.update({rule.first: len(dense)} if rule.first else {})


def _layer_overrides(architecture: Architecture) -> dict[str, dict[str, int]]:
    """transformers' ``per_layer_config``: the keys of every layer that differ from the configuration.

    They only inform: the bundled modelling file goes by its own record.
    """
    found = {}
    for index, block in enumerate(architecture.sizes.blocks):
        keys = {architecture.family.sizes.get(k): v for k, v in _values(block).items() if v}
        differing = {k: v for k, v in keys.items() if isinstance(k, str) and getattr(architecture.config, k, v) != v}
        if differing:
            found[str(index)] = differing
    return found


def layer_record(architecture: Architecture) -> dict[str, Any]:
    """What the bundled modelling file lays over the stock class (``resize`` in ``secateur.json``).

    Returns:
        ``parameters``: shape of every parameter that differs from the stock class's, by name; ``attributes``: what
        else its modules must be told, by module; ``shortcuts``: by the module whose output is added to the stream,
        the norm whose input is the stream, and the directions before and behind; ``ports``: by module, how many
        entries of a signal it reads or writes, and of how many; ``gone``: what stands in for modules that are not
        there; ``sizes``: all sizes.
    """
    parameters, shortcuts = {}, {}
    attributes: dict[str, dict[str, int]] = {}
    for name, packed in architecture.packed.items():
        shape = packed.shape(architecture.shapes)
        if shape != architecture.stock_shapes.get(name) and not architecture.is_index(packed):
            parameters[name] = list(shape)
    sizes, family = architecture.sizes, architecture.family
    for block in range(len(sizes.blocks)):
        for module, wanted in family.attributes.items():
            path = f"{family.blocks}.{block}.{module}"
            inside = any(name.startswith(path + ".") for name in architecture.stock_shapes)  # not every block has it
            if inside and path not in architecture.gone:
                attributes[path] = {attribute: sizes.axis(axis, block) for attribute, axis in wanted.items()}
        for role in architecture.shortcut_roles if sizes.shortcuts else ():
            norm = "attention_norm" if role == "attention_shortcut" else "ffn_norm"
            shortcuts[architecture.writer_of(role, block)] = {
                "norm": architecture.module_of(norm, block),
                "mean_free": bool(sizes.mean_free),
                "gain": float(getattr(architecture.config, family.branch_multiplier or "", 1.0)),
                "shape": list(sizes.change_of_basis(role, block)),
            }
    for path, slot in cache_slots(architecture).items():
        attributes.setdefault(path, {})["layer_idx"] = slot
    return {
        "parameters": parameters,
        "attributes": attributes,
        "shortcuts": shortcuts,
        "ports": architecture.ports,
        "gone": architecture.gone,
        "sizes": asdict(sizes),
    }


def sizes_of(record: dict[str, Any]) -> Sizes:
    """Sizes as ``asdict`` wrote them."""
    blocks = tuple(BlockSizes(**block) for block in record["blocks"])
    return Sizes(**{**record, "blocks": blocks})
