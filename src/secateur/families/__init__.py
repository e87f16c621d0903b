"""Architectures as data: one YAML per ``model_type``, roles, canonical tensors, packings."""

from secateur.families.architecture import Architecture, Block, CanonicalTensor, canonical_name
from secateur.families.packing import Packed
from secateur.families.schema import Family, family_names, load_family
from secateur.families.sizes import BlockSizes, Sizes

__all__ = [
    "Architecture",
    "Block",
    "BlockSizes",
    "CanonicalTensor",
    "Family",
    "Packed",
    "Sizes",
    "canonical_name",
    "family_names",
    "load_family",
]
