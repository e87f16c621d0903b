"""Rules for how much every matrix keeps that are published as methods of their own: scores are known, densities new."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat

from secateur.methods.elementwise import Allocation
from secateur.methods.magnitude import MagnitudeOfWeights
from secateur.methods.random import RandomWeights


class RandomPruningErk(RandomWeights):
    """Random weights go, as many of each matrix as its shape says (ERK)."""

    name = "random_pruning_erk"
    title = "The Unreasonable Effectiveness of Random Pruning"
    paper = "arXiv:2202.02643"

    allocation: Literal["uniform", "uniform+", "erk"] = Field("erk", description="a rule of the matrix's shape alone")


class GlobalMp(MagnitudeOfWeights):
    """One ranking of the absolute values of all weights; no matrix falls below a floor."""

    name = "global_mp"
    title = "Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning"
    paper = "arXiv:2209.14624"

    allocation: Allocation = Field("global", description="one ranking of all weights")
    floor: NonNegativeFloat = Field(
        0.05, le=100, description="percent of all these weights that every matrix keeps (the paper's minimum threshold)"
    )


class Lamp(MagnitudeOfWeights):
    """One ranking of all weights by their square over the sum of those of their matrix that are not smaller."""

    name = "lamp"
    title = "Layer-adaptive Sparsity for the Magnitude-based Pruning"
    paper = "arXiv:2010.07611"

    allocation: Allocation = Field("lamp", description="one ranking of LAMP scores")
