"""Learned gates: which units of a frozen network stay, found by gradient descent on the gates alone."""

from secateur.gates.estimators import ESTIMATORS, Estimator, gate
from secateur.gates.learning import LearningOptions, fisher, learn
from secateur.gates.network import GatedNetwork
from secateur.gates.vectors import Gate, Gates

__all__ = ["ESTIMATORS", "Estimator", "Gate", "GatedNetwork", "Gates", "LearningOptions", "fisher", "gate", "learn"]
