"""Objectives: what is trained, and on what loss. ``OBJECTIVES`` names them."""

from scoresde.objectives.objective import At, Average, Objective

__all__ = ["At", "Average", "Objective"]
