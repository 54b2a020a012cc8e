"""One set of weights for a whole Space: shared tensors, and one rule that says whose weights an Arch uses."""

from vitnas.supernet.sharing import AUTOFORMER_OFFICIAL, Coupling, Prefix, Sharing
from vitnas.supernet.supernet import Supernet, select

__all__ = ["AUTOFORMER_OFFICIAL", "Coupling", "Prefix", "Sharing", "Supernet", "select"]
