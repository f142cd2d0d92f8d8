"""Training: the loop, its checkpoints, and recipes that set up a family for a data set."""
