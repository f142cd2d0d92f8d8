"""Training: the loop, its checkpoints, and recipes that set up a family for a data set."""

from ancestral.training import checkpoint, loop, recipes, run

__all__ = ["checkpoint", "loop", "recipes", "run"]
