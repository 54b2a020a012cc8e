"""Halving: a search without a supernet. Random Archs are trained briefly from new weights; in the run's finals the
better half of them trains on, rung by rung, and the best is chosen.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943). On little data it is the honest rival of a supernet,
whose scores are of weights that no Arch would have by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitnas.searching.random_search import RandomSearch


@dataclass(frozen=True)
class Halving(RandomSearch):
    """Proposes as random search does; what differs is how Archs are scored, and that all of them go to the finals."""

    word = "halving"
    trains = True
