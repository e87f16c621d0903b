"""Which modules of an unknown architecture are its FFN, its experts and what chooses among them."""

from __future__ import annotations

import re
from typing import Any, Final

from secateur.families.packing import Shape
from secateur.inference.draft import Draft
from secateur.inference.measures import is_attention

_GATE: Final = re.compile(r"gate|w1$|fc_1$|wi_0$|linear$")
_DOWN: Final = re.compile(r"down|w2|out|c_proj|fc2")


def fill_ffn(draft: Draft) -> dict[str, Any]:
    """Roles of the FFN's and the experts' parameters; returns the keys of their sizes."""
    inner_of = {int(draft.anatomy.raw[k]): k for k in draft.measures.inner_keys if draft.anatomy.raw.get(k)}
    sizes: dict[str, Any] = {}
    stacked = {block for block, _, _, shape in draft.of_blocks() if len(shape) == 3}
    groups: dict[bool, dict[str, tuple[int, Shape]]] = {False: {}, True: {}}
    experts: dict[str, tuple[int, Shape]] = {}
    for block, module, leaf, shape in draft.of_blocks():
        local = f"{module}.{leaf}"
        if is_attention(module) or module in draft.block:
            continue
        if len(shape) == 3:
            experts.setdefault(local, (block, shape))
        elif len(shape) == 2 and leaf == "weight" and draft.is_matrix(block, module):
            groups[block in stacked].setdefault(module, (block, shape))
    count = next((shape[0] for _, shape in experts.values()), 0)
    for beside, modules in groups.items():
        inner = _dense(draft, modules, beside, count)
        if inner is not None:
            key = inner_of.get(inner)
            if key is not None:
                sizes["shared" if beside else "ffn"] = key
            elif not beside and 0 in draft.measures.inner_keys.values():
                sizes["ffn"] = next(iter(draft.measures.inner_keys))
    if experts:
        inner = _stacked(draft, experts)
        if inner in inner_of:
            sizes["expert_ffn"] = inner_of[inner]
        if draft.measures.experts_key is not None:
            sizes["experts"] = draft.measures.experts_key
        else:
            sizes["experts"] = count
        if draft.specimen.active_key is not None:
            sizes["active_experts"] = draft.specimen.active_key
    if "down" not in draft.roles:
        draft.notes["ffn"] = "its FFN is not found"
    return sizes


def _dense(draft: Draft, modules: dict[str, tuple[int, Shape]], beside: bool, experts: int) -> int | None:
    """Readers and writers of a dense FFN, or of the expert that every token visits; returns its width."""
    readers: dict[str, int] = {}
    writers: dict[str, int] = {}
    turned = {name: draft.transposed(block, name) for name, (block, _) in modules.items()}
    for name, (_, shape) in modules.items():
        rows, columns = shape[::-1] if turned[name] else shape
        if columns == draft.width and beside and rows == experts:
            draft.block[name] = {"roles": ["router"]}
        elif columns == draft.width and beside and rows == 1:
            draft.block[name] = {"roles": ["shared_router"]}
        elif columns == draft.width and rows != draft.width:
            readers[name] = rows
        elif rows == draft.width and columns != draft.width:
            writers[name] = columns
    if len(writers) != 1:
        return None
    ((writer, inner),) = writers.items()
    plain = [name for name, rows in readers.items() if rows == inner]
    double = [name for name, rows in readers.items() if rows == 2 * inner]
    found: dict[str, list[str]] = {writer: ["down"]}
    if len(plain) == 1 and not double:
        found[plain[0]] = ["up"]
    elif len(plain) == 2 and not double:
        gate = next((n for n in plain if _GATE.search(n.rpartition(".")[2])), plain[0])
        found |= {name: ["gate" if name == gate else "up"] for name in plain}
    elif len(double) == 1 and not plain:
        found[double[0]] = ["gate", "up"]
        draft.fused[double[0]] = "ffn"
    else:
        return None
    for name, roles in found.items():
        draft.block[name] = {"roles": roles, "transposed": turned[name], **({"shared": True} if beside else {})}
    return inner


def _stacked(draft: Draft, experts: dict[str, tuple[int, Shape]]) -> int | None:
    """Parameters that hold a matrix for every expert; returns the width of an expert."""
    inner = {
        name: (shape[1] if shape[2] == draft.width else shape[2])
        for name, (_, shape) in experts.items()
        if draft.width in shape[1:]
    }
    down = [name for name in inner if _DOWN.search(name.rpartition(".")[2])]
    if len(down) != 1 or len(inner) != len(experts):
        return None
    width = inner[down[0]]
    others = [name for name in inner if name != down[0]]
    roles: dict[str, list[str]] = {down[0]: ["down"]}
    if len(others) == 1 and inner[others[0]] == 2 * width:
        roles[others[0]] = ["gate", "up"]
        draft.fused[others[0]] = "ffn"
    elif len(others) == 1 and inner[others[0]] == width:
        roles[others[0]] = ["up"]
    elif len(others) == 2:
        gate = next((n for n in others if _GATE.search(n)), others[0])
        roles |= {name: ["gate" if name == gate else "up"] for name in others}
    else:
        return None
    for name, group in roles.items():
        _, shape = experts[name]
        writes = group == ["down"]
        draft.block[name] = {"roles": group, "experts": True, "transposed": (shape[1] == draft.width) != writes}
    flat = {f"{m}.{leaf}": shape for _, m, leaf, shape in draft.of_blocks() if len(shape) == 2 and "bias" in leaf}
    for name, shape in flat.items():
        of = next((n for n in roles if name.startswith(n)), None)
        if of is not None and shape[0] == experts[of][1][0]:
            draft.block[name] = {"roles": roles[of], "experts": True, "kind": "bias"}
            if name.endswith("bias") and of in draft.fused:
                draft.fused[name] = "ffn"
    return width
