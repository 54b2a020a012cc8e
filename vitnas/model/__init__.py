"""The static network of one Arch. Imports nothing of search, so that deployment stays light."""

from vitnas.model.build import build, initialize
from vitnas.model.vit import Model

__all__ = ["Model", "build", "initialize"]
