"""A training that is cut short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vitnas.sample import Moment


class Killed(Exception):
    """Nothing of ours catches it."""


@dataclass(frozen=True)
class Kill:
    """A Hook for `fit`, after all others: ends the training before step `at`, as a kill would."""

    at: int

    def before(self, moment: Moment) -> None:
        if moment.step == self.at:
            raise Killed

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """There is nothing to take back."""
