"""Rotary positions: which dimensions of a head are turned together."""

from __future__ import annotations

from secateur.families.architecture import Architecture


def rotary_partners(architecture: Architecture, block: int) -> list[int]:
    """For every dimension of a head the one it is rotated with; itself where positions leave it alone."""
    config, head = architecture.config, architecture.sizes.head
    alone = list(range(head))
    rope = getattr(config, "rope_parameters", None)
    layers = getattr(config, "no_rope_layers", None)  # 0 where there is none
    if not rope or getattr(config, "alibi", False) or (layers and not layers[block]):
        return alone
    turned = int(head * float(rope.get("partial_rotary_factor", 1.0)))
    if architecture.family.rotation == "neighbours":
        return [i ^ 1 for i in range(turned)] + alone[turned:]
    return [(i + turned // 2) % turned for i in range(turned)] + alone[turned:]
