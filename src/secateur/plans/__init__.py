"""The immutable, serialisable decision: what is kept, in which basis, and the sizes that follow."""

from secateur.plans.plan import Plan

__all__ = ["Plan"]
