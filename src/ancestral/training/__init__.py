"""Training: the loop, its checkpoints, and recipes that set up a family for a data set."""

from ancestral.training import checkpoint, loop, processes, recipes, run, start

__all__ = ["checkpoint", "loop", "processes", "recipes", "run", "start"]
