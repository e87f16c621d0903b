"""Architectures as data: one YAML per ``model_type``, roles, canonical tensors, packings, what each layout admits."""

from secateur.families.architecture import Architecture
from secateur.families.limits import LAYOUTS, Layout
from secateur.families.packing import Packed
from secateur.families.resizing import resized
from secateur.families.schema import Family, family_names, load_family
from secateur.families.sizes import BlockSizes, Expert, Kind, Sizes
from secateur.families.tensors import Block, CanonicalTensor, Survivors, canonical_name, place_name

__all__ = [
    "LAYOUTS",
    "Architecture",
    "Block",
    "BlockSizes",
    "CanonicalTensor",
    "Expert",
    "Family",
    "Kind",
    "Layout",
    "Packed",
    "Sizes",
    "Survivors",
    "canonical_name",
    "family_names",
    "load_family",
    "place_name",
    "resized",
]
