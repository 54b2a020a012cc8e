"""Rewiring during the first epochs of a supernet's training (ViT-ResNAS, arXiv 2109.00642, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitnas.errors import UserError
from vitnas.sample import Moment
from vitnas.supernet import Supernet
from vitnas.supernet.rewire import rewire


@dataclass
class Rewiring:
    """A Hook for `fit`: rewire at the start of every epoch up to `epochs`."""

    epochs: float = 30

    def before(self, moment: Moment) -> Mapping[str, Any] | None:
        if moment.epoch > self.epochs or not float(moment.epoch).is_integer():
            return None
        if not isinstance(moment.network, Supernet):
            raise UserError(
                f"rewiring was asked for a {type(moment.network).__name__}; it sorts the weights of a Supernet. Leave "
                "it out."
            )
        return {"moved": rewire(moment.network, moment.optimizer, share=moment.share)}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        pass
