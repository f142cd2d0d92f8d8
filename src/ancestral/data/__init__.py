"""What the user has, as tensors, with an invertible scale and facts about it."""

from ancestral.data.dataset import Data
from ancestral.data.facts import Facts, Scale
from ancestral.data.sources import load

__all__ = ["Data", "Facts", "Scale", "load"]
