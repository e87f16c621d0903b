"""Targets, exact costs and the solver between them."""

from secateur.budgets.costs import Costs
from secateur.budgets.solver import Budget
from secateur.budgets.targets import MEASURES, OF_LANGUAGE_MODELS, Target, parse_target, ratio_target

__all__ = ["MEASURES", "OF_LANGUAGE_MODELS", "Budget", "Costs", "Target", "parse_target", "ratio_target"]
