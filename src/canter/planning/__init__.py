"""Planning: batches of utterances, optimiser steps and their ranks. Needs NumPy and no torch."""

from canter.planning.budget import Budget, Polynomial
from canter.planning.metrics import Limits
from canter.planning.plan import MicroBatch, Plan, Position
from canter.planning.shapes import analytic_budget
from canter.planning.strategies import STRATEGIES, strategy

__all__ = [
    "STRATEGIES",
    "Budget",
    "Limits",
    "MicroBatch",
    "Plan",
    "Polynomial",
    "Position",
    "analytic_budget",
    "strategy",
]
