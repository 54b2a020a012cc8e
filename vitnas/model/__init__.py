"""The static network of one Arch. Imports nothing of search, so that deployment stays light."""

from vitnas.model.build import build, initialize
from vitnas.model.published import PUBLISHED
from vitnas.model.timm_keys import arch_of_timm, from_timm, to_timm
from vitnas.model.vit import Model

__all__ = ["PUBLISHED", "Model", "arch_of_timm", "build", "from_timm", "initialize", "to_timm"]
